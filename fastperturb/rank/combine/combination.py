"""A prompt's logits as a linear combination of those of other prompts.

If the matrix of logits is nearly of low rank, the row of a target history is nearly a combination
of rows of others, unrelated ones too. Its weights are fitted on query futures by ridge regression,

    v = argmin sum_f s_f |l_f - v L_f|^2 + ridge * mean |L_h|^2 * |v|^2       (L_f [N, K])

and then hold for futures that were never asked: `rank.streams` goes on with them. The idea is
*published* (arXiv 2510.24966); the shares s, the ridge, and how it is chosen, are *our
reconstruction*. Shares matter: what is written meets one future of each length, while of the
prefixes of some runs only one is empty, so that alike they all but ignore the first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastperturb.rank.ask.oracle import Tokens
from fastperturb.rank.measure.spectrum import Floats, Values, check, column_blocks

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Fit:
    """The weights [T, N] by which N histories stand for each of T targets.

    ridge: that of the fit; error: |l - v L| / |l| over all targets, of the futures of the fit, and
    held_out_error: of futures that it did not see, where these chose the ridge.
    """

    weights: Floats
    ridge: float
    error: float
    held_out_error: float | None


def fit(
    values: Values,
    targets: Values,
    *,
    shares: Floats | None = None,
    ridges: Sequence[float] = RIDGES,
    held_out: float = 0.25,
) -> Fit:
    """Weights of histories [N, F, K] that come closest to the targets' logits [T, F, K].

    shares: how much each future counts [F]; by default alike.
    ridges: several are tried on the last `held_out` share of the futures, and the best is taken for
        a fit on all of them; a single one is taken as it is.
    """
    check(values)
    check(targets)
    if values.shape[1:] != targets.shape[1:]:
        raise ValueError(
            "targets must be asked on the futures and tokens of the histories, "
            f"{list(values.shape[1:])}, got {list(targets.shape[1:])}"
        )
    shares = np.ones(values.shape[1]) if shares is None else shares
    if shares.shape != (values.shape[1],) or not (shares > 0).all():
        raise ValueError(
            f"shares must be positive, one for each of the {values.shape[1]} futures, got "
            f"{list(shares.shape)}"
        )
    if not ridges or min(ridges) < 0:
        raise ValueError(f"ridges must be one or more numbers from 0 on, got {tuple(ridges)}")
    if len(ridges) == 1:
        everything = _Products.of(values, targets, shares)
        weights = everything.solve(ridges[0])
        return Fit(weights, ridges[0], everything.error(weights), None)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}")
    seen = round((1 - held_out) * values.shape[1])
    if not 0 < seen < values.shape[1]:
        raise ValueError(
            f"{values.shape[1]} futures cannot be parted to choose among {len(ridges)} ridges: "
            "give more futures, or one ridge"
        )
    first = _Products.of(values[:, :seen], targets[:, :seen], shares[:seen])
    last = _Products.of(values[:, seen:], targets[:, seen:], shares[seen:])
    errors = [last.error(first.solve(ridge)) for ridge in ridges]
    best = int(np.argmin(errors))
    both = first + last
    weights = both.solve(ridges[best])
    return Fit(weights, ridges[best], both.error(weights), errors[best])


def shares_by_length(futures: Sequence[Tokens]) -> Floats:
    """Every length of futures counts alike, as it does when a text is written on."""
    lengths = np.array([len(future) for future in futures])
    return 1.0 / np.bincount(lengths)[lengths]


@dataclass(frozen=True)
class _Products:
    """All that a fit needs of the logits."""

    gram: Floats  # [N, N]
    cross: Floats  # [N, T]
    squares: float  # of the targets

    @classmethod
    def of(cls, values: Values, targets: Values, shares: Floats) -> _Products:
        histories, futures, tokens = values.shape
        gram, cross = np.zeros((histories, histories)), np.zeros((histories, len(targets)))
        roots, squares = np.sqrt(np.broadcast_to(shares[None, :, None], (1, futures, tokens))), 0.0
        for rows, wanted, root in column_blocks(values, targets, roots):
            rows, wanted = rows * root, wanted * root
            gram += rows @ rows.T
            cross += rows @ wanted.T
            squares += float(np.vdot(wanted, wanted))
        return cls(gram, cross, squares)

    def __add__(self, other: _Products) -> _Products:
        return _Products(
            self.gram + other.gram, self.cross + other.cross, self.squares + other.squares
        )

    def solve(self, ridge: float) -> Floats:
        size = len(self.gram)
        penalty = ridge * float(self.gram.trace()) / size
        if penalty == 0:
            found = np.linalg.lstsq(self.gram, self.cross, rcond=None)[0]
        else:
            found = np.linalg.solve(self.gram + penalty * np.eye(size), self.cross)
        return np.asarray(found.T, dtype=np.float64)

    def error(self, weights: Floats) -> float:
        missed = self.squares - 2 * float(np.vdot(weights.T, self.cross))
        missed += float(np.vdot(weights @ self.gram, weights))
        return math.sqrt(max(0.0, missed) / self.squares) if self.squares else 0.0
