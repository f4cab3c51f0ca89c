"""The power law s_i ~ i^-a of singular values: its exponent, with an interval over histories.

Singular values of one matrix depend on each other, and their deviations from a straight line are
bends of the spectrum rather than chance. So the residuals of the regression say nothing about the
exponent of other histories. Histories are the sampled units, so a delete-a-group jackknife leaves
out every group of them once, with Student's t at groups - 1 degrees of freedom. By the inequality
of Efron and Stein (1981) its variance is on average at least that of the estimate on one group
fewer,
whatever the statistic: intervals err to the wide side. A bootstrap would not do: rows drawn twice
are dependent, which bends the tail, and its exponents come out one or two standard errors too high.
The futures are held fixed, and histories are taken as independent. Pieces of one document are not
quite independent, so over documents the interval is wider.

A sub-matrix of rows has the singular values of the same rows of U S, so the jackknife reads no
data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastperturb.rank.measure.singular_values import Spectrum, check_logits, spectrum
from fastperturb.rank.types import Floats, Logits

_FEWEST_VALUES = 4  # singular values of a fit


class TooFewSingularValues(ValueError):
    """Raised for a matrix with fewer singular values than the fit of a line needs."""


@dataclass(frozen=True, kw_only=True)
class JackknifeEstimate:
    """An exponent, or a difference of two, with its interval over histories.

    low, high, level: the interval and its nominal coverage.
    standard_error, groups: the jackknife's, and the number of groups of histories it leaves out.
    first, last: the indices i of the singular values that are fitted, counted from 1.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    level: float
    groups: int
    first: int
    last: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Exponent(JackknifeEstimate):
    """The exponent a of s_i = scale * i^-a.

    r_squared: that of the fitted line in log-log; well below 1, the spectrum is no power law.
    """

    scale: float
    r_squared: float


@dataclass(frozen=True)
class SubmatrixFit:
    """The exponent and ranks of the sub-matrix of the first `histories` and `futures`.

    rank: the number of singular values above tolerance times the first.
    """

    histories: int
    futures: int
    exponent: Exponent
    rank: int | None
    tolerance: float
    effective_rank: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def power_law(
    spectrum: Spectrum,
    *,
    first: int | None = None,
    last: int | None = None,
    groups: int = 20,
    level: float = 0.95,
    seed: int = 0,
) -> Exponent:
    """Fit the exponent of the singular values number `first` to `last`, counted from 1.

    By default 10 to a quarter of the matrix's smaller side. The first few are single directions,
    such as a token's overall frequency, and off the power law. Towards the end the spectrum of any
    finite matrix bends down, even that of independent entries, so that the last three quarters
    reflect the matrix's size. If that leaves less than a factor of 4 between the two (a smaller
    side below 160), `first` is a quarter of `last`.

    The line is fitted by least squares in log-log with weight 1 / i: every octave counts alike.
    Without weights half of all points would lie in the last octave, the one next to the bend.

    groups, seed: the number of groups of histories that the jackknife leaves out in turn, and the
        seed by which they are drawn.
    level: the nominal coverage of the interval.
    """
    first, last = _window([spectrum], first, last, groups)
    slope, intercept, r_squared = _line(spectrum.singular_values, first, last)
    slopes = _jackknife_slopes(spectrum, first, last, groups, seed)
    return Exponent(
        **_with_interval(-slope, slopes, level),
        first=first,
        last=last,
        scale=float(np.exp(intercept)),
        r_squared=r_squared,
    )


def exponent_difference(
    ours: Spectrum,
    baseline: Spectrum,
    *,
    first: int | None = None,
    last: int | None = None,
    groups: int = 20,
    level: float = 0.95,
    seed: int = 0,
) -> JackknifeEstimate:
    """Return our exponent less the baseline's, for two models on the same histories and futures.

    The same histories are left out of both, so that whatever the two share cancels: the interval is
    often far narrower than those of the exponents. The other arguments are those of `power_law`.
    """
    if ours.shape != baseline.shape:
        raise ValueError(
            "ours and baseline must be over the same histories, futures and tokens, got "
            f"{list(ours.shape)} and {list(baseline.shape)}"
        )
    first, last = _window([ours, baseline], first, last, groups)
    slope, baseline_slope = (
        _line(spectrum.singular_values, first, last)[0] for spectrum in (ours, baseline)
    )
    slopes, baseline_slopes = (
        _jackknife_slopes(spectrum, first, last, groups, seed) for spectrum in (ours, baseline)
    )
    return JackknifeEstimate(
        **_with_interval(baseline_slope - slope, slopes - baseline_slopes, level),
        first=first,
        last=last,
    )


def submatrix_fits(
    values: Logits,
    whole: Spectrum,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 1.0),
    tolerance: float = 0.01,
    first: int | None = None,
    last: int | None = None,
) -> list[SubmatrixFit]:
    """Fit the leading sub-matrices with these fractions of histories and of futures.

    Sub-matrices with too few singular values to fit are left out. Histories and futures should be
    in random order, since the first ones are taken. The window of the exponent grows with the
    sub-matrix unless `first` and `last` are given.

    whole: the spectrum of `values`.
    tolerance: the share of the first singular value above which others count for the rank.
    """
    check_logits(values)
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must lie in (0, 1], got {list(fractions)}")
    if whole.shape != values.shape:
        raise ValueError(
            f"whole must be the spectrum of values, which are {list(values.shape)}, got that of "
            f"{list(whole.shape)}"
        )
    fits = []
    for futures_share, histories_share in itertools.product(fractions, repeat=2):
        futures = max(1, round(futures_share * values.shape[1]))
        histories = max(1, round(histories_share * len(values)))
        part = values[:histories, :futures]
        part_spectrum = whole if part.shape == values.shape else spectrum(part)
        try:
            exponent = power_law(part_spectrum, first=first, last=last)
        except TooFewSingularValues:
            continue
        rank, effective = part_spectrum.rank(tolerance), part_spectrum.effective_rank
        fits.append(SubmatrixFit(histories, futures, exponent, rank, tolerance, effective))
    return fits


def _window(
    spectra: Sequence[Spectrum], first: int | None, last: int | None, groups: int
) -> tuple[int, int]:
    """Return the first and last index to fit, counted from 1; raise if there are too few."""
    histories = spectra[0].shape[0]
    if not 2 <= groups <= histories:
        raise ValueError(f"groups must be from 2 to the {histories} histories, got {groups}")
    # Without the largest group of histories, ceil(histories / groups), there are fewer rows.
    available = min(
        histories - -(-histories // groups),
        *(len(spectrum.singular_values) for spectrum in spectra),
    )
    if last is None:
        last = min(available, *(_smaller_side(spectrum) // 4 for spectrum in spectra))
    if first is None:
        first = min(10, max(1, last // 4))
    if not 1 <= first <= last - _FEWEST_VALUES + 1 or last > available:
        raise TooFewSingularValues(
            f"an exponent needs {_FEWEST_VALUES} singular values or more out of the first "
            f"{available}, those above rounding whichever group of histories is left out, got "
            f"first = {first} and last = {last}"
        )
    return first, last


def _smaller_side(spectrum: Spectrum) -> int:
    histories, futures, tokens = spectrum.shape
    return min(histories, futures * tokens)


def _line(singular_values: Floats, first: int, last: int) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of log s_i against log i, weighted by 1 / i."""
    index = np.arange(first, last + 1)
    x, y = np.log(index), np.log(singular_values[first - 1 : last])
    weight = 1 / index / (1 / index).sum()
    x_mean, y_mean = weight @ x, weight @ y
    spread, total = weight @ (x - x_mean) ** 2, weight @ (y - y_mean) ** 2
    slope = float(weight @ ((x - x_mean) * (y - y_mean)) / spread)
    r_squared = float(slope**2 * spread / total) if total else 1.0
    return slope, float(y_mean - slope * x_mean), r_squared


def _jackknife_slopes(spectrum: Spectrum, first: int, last: int, groups: int, seed: int) -> Floats:
    """Return the slope without each group of histories [groups]."""
    rows = spectrum.left * spectrum.singular_values  # U S: inner products are those of histories
    group = np.random.default_rng(seed).permutation(len(rows)) % groups
    slopes = np.empty(groups)
    for number in range(groups):
        kept = rows[group != number]
        gram = kept @ kept.T if len(kept) < kept.shape[1] else kept.T @ kept
        squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], spectrum.floor**2)
        slopes[number] = _line(np.sqrt(squares), first, last)[0]
    return slopes


def _with_interval(estimate: float, slopes: Floats, level: float) -> dict[str, Any]:
    """Return an estimate and its jackknife interval, from the slopes without each group."""
    from scipy.stats import t

    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    groups = len(slopes)
    error = float(np.sqrt((groups - 1) * slopes.var()))
    half_width = float(t.ppf((1 + level) / 2, groups - 1)) * error
    return {
        "estimate": estimate,
        "low": estimate - half_width,
        "high": estimate + half_width,
        "standard_error": error,
        "level": level,
        "groups": groups,
    }
