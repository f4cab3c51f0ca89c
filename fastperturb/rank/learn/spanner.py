"""Which rows, and which columns, of a matrix of logits stand for the others.

Rows: a basis whose combinations give every row, with coefficients that stay small (an approximate
barycentric spanner: Awerbuch and Kleinberg 2008). Columns: enough of them to see every change of
such coefficients that the others would see (the elliptical-potential rule). And the coefficients
themselves, kept small by a linear program where least squares would not.
"""

from __future__ import annotations

import numpy as np

from fastperturb.rank.learn.states import Floats

# A column is admitted when its leverage is above this.
_LEVERAGE = 1.0


def spanner(rows: Floats, present: int, *, tolerance: float, bound: float) -> list[int]:
    """Rows [P, C] of which all others are combinations, up to `tolerance` in every entry.

    The first `present` rows are a basis already and are kept, unless exchanged. Rows join by the
    largest residual. Then a row whose coefficients exceed `bound` takes the place of the one with
    the largest: the basis's volume is multiplied by that coefficient, which is why this ends, and
    why no coefficient of these rows exceeds `bound` when it does.
    """
    basis = list(range(present))
    while True:
        _extend(basis, rows, tolerance)
        if not basis:
            return basis
        coefficients = np.abs(rows @ np.linalg.pinv(rows[basis]))
        row, place = np.unravel_index(coefficients.argmax(), coefficients.shape)
        if coefficients[row, place] <= bound:
            return basis
        basis[place] = int(row)


def _extend(basis: list[int], rows: Floats, tolerance: float) -> None:
    """Rows join while the basis does not give all of them."""
    directions = np.linalg.qr(rows[basis].T)[0]
    residual = _without(rows, directions)
    while len(residual) and np.abs(residual).max() > tolerance:
        outside = np.abs(residual).max(1) > tolerance
        joins = int(np.where(outside, np.linalg.norm(residual, axis=1), 0.0).argmax())
        basis.append(joins)
        new = residual[joins] / np.linalg.norm(residual[joins])
        residual = _without(residual, new[:, None])
        residual[basis] = 0.0


def _without(rows: Floats, directions: Floats) -> Floats:
    """Rows less their part along orthonormal directions [C, k]."""
    return rows - (rows @ directions) @ directions.T


def admitted(seen: Floats, candidates: Floats, *, tolerance: float) -> list[int]:
    """Which candidates [R, K, V], groups of V columns, join those seen [R, C], in that order.

    With Lambda = R tolerance^2 I + the sum of c c^T over columns seen, a change u of coefficients
    moves a column c by at most sqrt(u Lambda u * c Lambda^-1 c): one of leverage
    c Lambda^-1 c <= 1 is no further off than what is seen allows, |u Lambda u|^(1/2), which is
    tolerance times sqrt(C + R |u|^2) for a u that moves no column seen by more than tolerance.
    The candidate of the largest leverage above 1 joins, again and again. Each one doubles
    det Lambda at least, so of columns no longer than c_max at most

        R log2(1 + n c_max^2 / (R^2 tolerance^2))

    of n join: the elliptical potential.
    """
    size = len(seen)
    potential = size * tolerance**2 * np.eye(size) + seen @ seen.T
    joined: list[int] = []
    while size and len(joined) < candidates.shape[1]:
        leverage = _leverages(potential, candidates)
        leverage[joined] = 0.0
        best = int(leverage.argmax())
        if leverage[best] <= _LEVERAGE:
            break
        joined.append(best)
        potential += candidates[:, best] @ candidates[:, best].T
    return joined


def _leverages(potential: Floats, candidates: Floats) -> Floats:
    """The largest c Lambda^-1 c of each group of columns [R, K, V]: [K]."""
    columns = candidates.reshape(len(potential), -1)
    leverage = np.einsum("rc,rc->c", columns, np.linalg.solve(potential, columns))
    return leverage.reshape(candidates.shape[1:]).max(-1)


def bounded_fit(target: Floats, basis: Floats, bound: float) -> tuple[Floats, float]:
    """The coefficients v, none beyond `bound`, that bring v basis [R, C] closest to target [C].

    Closest in the largest entry of the residual, which comes with them. A linear program: it
    always has a solution, and the residual says how good that is.
    """
    from scipy.optimize import linprog

    size, columns = basis.shape
    ones = np.ones((columns, 1))
    found = linprog(
        c=np.append(np.zeros(size), 1.0),
        A_ub=np.block([[basis.T, -ones], [-basis.T, -ones]]),
        b_ub=np.concatenate([target, -target]),
        bounds=[(-bound, bound)] * size + [(0, None)],
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"the linear program of {size} coefficients failed: {found.message}")
    return found.x[:-1], float(found.x[-1])
