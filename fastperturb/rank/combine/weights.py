"""Weights by which the logits of other histories combine into those of a target.

If the matrix of logits is nearly of low rank, the row of a target history is nearly a combination
of the rows of others, even unrelated ones. Its weights are fitted on query futures by ridge
regression,

    v = argmin sum_f s_f |l_f - v L_f|^2 + ridge * mean |L_h|^2 * |v|^2       (L_f [N, K])

and then hold for futures that were never asked, which `streams` writes with. The idea is
*published* (arXiv 2510.24966); the shares s, the ridge, and its choice are *our reconstruction*.
The shares
matter: a text being written has one future of each length, but only one of the query futures is
empty, so that with equal shares the fit would all but ignore the first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastperturb.rank.measure.singular_values import check_logits, column_blocks
from fastperturb.rank.types import Floats, Logits, Tokens

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Fit:
    """The weights [T, N] by which N histories combine into each of T targets.

    ridge: the strength of the penalty.
    error: |l - v L| / |l| over all targets, on the futures of the fit.
    held_out_error: the same on held-out futures, for the fit that chose the ridge; None if a single
        ridge was given.
    """

    weights: Floats
    ridge: float
    error: float
    held_out_error: float | None


def fit(
    values: Logits,
    targets: Logits,
    *,
    shares: Floats | None = None,
    ridges: Sequence[float] = RIDGES,
    held_out: float = 0.25,
) -> Fit:
    """Fit weights with which histories [N, F, K] come closest to the targets' logits [T, F, K].

    shares: the weight of each future in the loss [F]; by default equal.
    ridges: the penalties to choose from. Several are tried on the last `held_out` share of the
        futures, and the best is used for a fit on all of them; a single one is used as it is.
    """
    check_logits(values)
    check_logits(targets)
    if values.shape[1:] != targets.shape[1:]:
        raise ValueError(
            "targets must have the futures and tokens of values, "
            f"{list(values.shape[1:])}, got {list(targets.shape[1:])}"
        )
    shares = np.ones(values.shape[1]) if shares is None else shares
    if shares.shape != (values.shape[1],) or not (shares > 0).all():
        raise ValueError(
            f"shares must be positive, one for each of the {values.shape[1]} futures, got "
            f"{list(shares.shape)}"
        )
    if not ridges or min(ridges) < 0:
        raise ValueError(f"ridges must be one or more numbers from 0 up, got {tuple(ridges)}")
    if len(ridges) == 1:
        products = _Products.of(values, targets, shares)
        weights = products.solve(ridges[0])
        return Fit(weights, ridges[0], products.error(weights), None)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}")
    seen = round((1 - held_out) * values.shape[1])
    if not 0 < seen < values.shape[1]:
        raise ValueError(
            f"{values.shape[1]} futures cannot be split to choose among {len(ridges)} ridges: "
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
    """Return shares with which every length of futures counts alike."""
    lengths = np.array([len(future) for future in futures])
    return 1.0 / np.bincount(lengths)[lengths]


@dataclass(frozen=True)
class _Products:
    """The inner products of logits that a fit needs."""

    gram: Floats  # [N, N]
    cross: Floats  # [N, T]
    squares: float  # of the targets

    @classmethod
    def of(cls, values: Logits, targets: Logits, shares: Floats) -> _Products:
        histories, futures, tokens = values.shape
        gram, cross = np.zeros((histories, histories)), np.zeros((histories, len(targets)))
        roots, squares = np.sqrt(np.broadcast_to(shares[None, :, None], (1, futures, tokens))), 0.0
        for rows, target_rows, root in column_blocks(values, targets, roots):
            rows, target_rows = rows * root, target_rows * root
            gram += rows @ rows.T
            cross += rows @ target_rows.T
            squares += float(np.vdot(target_rows, target_rows))
        return cls(gram, cross, squares)

    def __add__(self, other: _Products) -> _Products:
        return _Products(
            self.gram + other.gram, self.cross + other.cross, self.squares + other.squares
        )

    def solve(self, ridge: float) -> Floats:
        """Return the weights [T, N] under this ridge; without one, the shortest that fit."""
        size = len(self.gram)
        penalty = ridge * float(self.gram.trace()) / size
        if penalty == 0:
            weights = np.linalg.lstsq(self.gram, self.cross, rcond=None)[0]
        else:
            weights = np.linalg.solve(self.gram + penalty * np.eye(size), self.cross)
        return np.asarray(weights.T, dtype=np.float64)

    def error(self, weights: Floats) -> float:
        """Return |l - v L| / |l| over all targets l, for weights v."""
        residual = self.squares - 2 * float(np.vdot(weights.T, self.cross))
        residual += float(np.vdot(weights @ self.gram, weights))
        return math.sqrt(max(0.0, residual) / self.squares) if self.squares else 0.0
