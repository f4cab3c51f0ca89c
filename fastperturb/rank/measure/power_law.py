"""The power law s_i ~ i^-a of singular values: its exponent, and how far that can be trusted.

Singular values of one matrix depend on each other, and their deviations from a straight line are
its bends more than chance, so the residuals of the regression say nothing about what another
sample of histories would give. Histories are the sampled units, and they are what is left out
here: a delete-a-group jackknife, every group of them once, with Student's t at groups - 1 degrees
of freedom. By the inequality of Efron and Stein (1981) its variance is on average at least that of
the estimate on so many histories fewer, whatever the statistic: intervals err to the wide side.
A bootstrap would not do: rows drawn twice are dependent, which bends the tail, and its exponents
come out one or two standard errors too high. The futures are held: the interval is over histories,
as if these were independent. Pieces of one document are not quite: over documents it is wider.

A sub-matrix of rows has the singular values of the same rows of U S, so leaving out reads no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastperturb.rank.measure.spectrum import Floats, Spectrum, Values, check, spectrum

_LEAST = 4  # singular values of a fit


class TooFewValues(ValueError):
    """A matrix has fewer singular values than a line needs."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of an exponent, or of a difference of two, over first <= i <= last, with its interval.

    The interval is over histories; standard_error: the jackknife's, over so many groups of them.
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
class Exponent(Estimate):
    """a of s_i = scale * i^-a.

    r_squared: of the fitted line in log-log; no line of interest falls much below 1.
    """

    scale: float
    r_squared: float


@dataclass(frozen=True)
class Size:
    """What a sub-matrix of so many histories and futures shows."""

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
    """The exponent of singular values number `first` to `last`, counted from 1.

    By default 10 to a quarter of the matrix's smaller side. The first few are single directions of
    their own, a token's overall frequency above all, that follow no law; and towards the end any
    finite matrix bends down, a matrix of independent entries too, so that the last three quarters
    tell its size. Where that leaves less than a factor of 4 between the two (a smaller side below
    160) `first` is a quarter of `last`.

    The line is of least squares in log-log with weight 1 / i: every octave counts alike. Without
    weights half of all points would lie in the last octave, the one next to the bend.

    groups: of histories, left out in turn; drawn by `seed`.
    """
    first, last = _window([spectrum], first, last, groups)
    slope, intercept, r_squared = _line(spectrum.singular_values, first, last)
    without = _left_out(spectrum, first, last, groups, seed)
    half, error = _half_width(without, level)
    return Exponent(
        estimate=-slope,
        low=-slope - half,
        high=-slope + half,
        standard_error=error,
        level=level,
        groups=groups,
        scale=float(np.exp(intercept)),
        first=first,
        last=last,
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
) -> Estimate:
    """Our exponent less the baseline's, of two models asked on the same histories and futures.

    The same histories are left out of both, so what the two share cancels: the interval is that of
    the difference, often far narrower than those of the exponents. Arguments are `power_law`'s.
    """
    if ours.shape != baseline.shape:
        raise ValueError(
            f"ours is of {list(ours.shape)} histories, futures and tokens and baseline of "
            f"{list(baseline.shape)}: ask both models on the same"
        )
    first, last = _window([ours, baseline], first, last, groups)
    both = (ours, baseline)
    slopes = [_line(each.singular_values, first, last)[0] for each in both]
    without = [_left_out(each, first, last, groups, seed) for each in both]
    half, error = _half_width(without[0] - without[1], level)
    estimate = slopes[1] - slopes[0]
    return Estimate(
        estimate=estimate,
        low=estimate - half,
        high=estimate + half,
        standard_error=error,
        level=level,
        groups=groups,
        first=first,
        last=last,
    )


def by_size(
    values: Values,
    whole: Spectrum,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 1.0),
    tolerance: float = 0.01,
    first: int | None = None,
    last: int | None = None,
) -> list[Size]:
    """Exponent and ranks of the leading sub-matrices with these fractions of histories and futures.

    Those are left out that have too few singular values to fit.

    Histories and futures should be in random order: these are the first ones. The window of the
    exponent grows with the sub-matrix unless `first` and `last` are given.

    whole: the spectrum of `values`; tolerance: of `Spectrum.rank`.
    """
    check(values)
    if not fractions or not all(0 < each <= 1 for each in fractions):
        raise ValueError(f"fractions must lie in (0, 1], got {list(fractions)}")
    if whole.shape != values.shape:
        raise ValueError(
            f"whole must be the spectrum of values, which are {list(values.shape)}, got that of "
            f"{list(whole.shape)}"
        )
    found = []
    for part in fractions:
        futures = max(1, round(part * values.shape[1]))
        for other in fractions:
            histories = max(1, round(other * len(values)))
            part_of = values[:histories, :futures]
            of = whole if part_of.shape == values.shape else spectrum(part_of)
            try:
                exponent = power_law(of, first=first, last=last)
            except TooFewValues:
                continue
            ranks = of.rank(tolerance), tolerance, of.effective_rank
            found.append(Size(histories, futures, exponent, *ranks))
    return found


def _window(
    spectra: Sequence[Spectrum], first: int | None, last: int | None, groups: int
) -> tuple[int, int]:
    """The indices to fit, from 1, both included."""
    histories = spectra[0].shape[0]
    if not 2 <= groups <= histories:
        raise ValueError(f"groups must be from 2 to the {histories} histories, got {groups}")
    # What is left without one group still has that many singular values.
    most = min(histories - -(-histories // groups), *(len(e.singular_values) for e in spectra))
    if last is None:
        last = min(most, *(_smaller_side(each) // 4 for each in spectra))
    if first is None:
        first = min(10, max(1, last // 4))
    if not 1 <= first <= last - _LEAST + 1 or last > most:
        raise TooFewValues(
            f"an exponent needs {_LEAST} singular values or more out of the first {most}, which "
            "are those that stand above rounding whichever group of histories is left out, got "
            f"first = {first} and last = {last}"
        )
    return first, last


def _smaller_side(spectrum: Spectrum) -> int:
    histories, futures, tokens = spectrum.shape
    return min(histories, futures * tokens)


def _line(singular_values: Floats, first: int, last: int) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of log s_i against log i, weighted by 1 / i."""
    index = np.arange(first, last + 1)
    x, y = np.log(index), np.log(singular_values[first - 1 : last])
    weight = 1 / index / (1 / index).sum()
    x_mean, y_mean = weight @ x, weight @ y
    spread, total = weight @ (x - x_mean) ** 2, weight @ (y - y_mean) ** 2
    slope = float(weight @ ((x - x_mean) * (y - y_mean)) / spread)
    r_squared = float(slope**2 * spread / total) if total else 1.0
    return slope, float(y_mean - slope * x_mean), r_squared


def _left_out(spectrum: Spectrum, first: int, last: int, groups: int, seed: int) -> Floats:
    """The slope without each group of histories [groups]."""
    rows = spectrum.left * spectrum.singular_values  # U S: inner products are those of histories
    group = np.random.default_rng(seed).permutation(len(rows)) % groups
    slopes = np.empty(groups)
    for number in range(groups):
        kept = rows[group != number]
        gram = kept @ kept.T if len(kept) < kept.shape[1] else kept.T @ kept
        squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], spectrum.floor**2)
        slopes[number] = _line(np.sqrt(squares), first, last)[0]
    return slopes


def _half_width(without: Floats, level: float) -> tuple[float, float]:
    """Half of the jackknife's interval, and its standard error."""
    from scipy.stats import t

    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    groups = len(without)
    error = float(np.sqrt((groups - 1) * without.var()))
    return float(t.ppf((1 + level) / 2, groups - 1)) * error, error
