"""Choose rows and columns of a matrix of logits that represent the others.

Rows: a basis whose combinations give every row, with small coefficients (an approximate barycentric
spanner: Awerbuch and Kleinberg 2008). Columns: enough of them to show every change of such
coefficients that the others would show (the elliptical-potential rule). Coefficients: a linear
program keeps them small where least squares would not.
"""

from __future__ import annotations

import numpy as np

from fastperturb.rank.types import Floats

# A column is admitted if its leverage is above this.
_MAX_LEVERAGE = 1.0


def spanner(rows: Floats, present: int, *, tolerance: float, bound: float) -> list[int]:
    """Choose rows of [P, C] whose combinations give all others, up to `tolerance` in every entry.

    The first `present` rows are a basis already and are kept, unless exchanged. Rows join by the
    largest residual. Then a row with a coefficient above `bound` takes the place of the basis row
    that has the largest one. This multiplies the basis's volume by that coefficient, so it ends,
    and then no coefficient exceeds `bound`.
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
    """Add rows to the basis until it gives all of them."""
    directions = np.linalg.qr(rows[basis].T)[0]
    residual = _without(rows, directions)
    while len(residual) and np.abs(residual).max() > tolerance:
        outside = np.abs(residual).max(1) > tolerance
        farthest = int(np.where(outside, np.linalg.norm(residual, axis=1), 0.0).argmax())
        basis.append(farthest)
        new = residual[farthest] / np.linalg.norm(residual[farthest])
        residual = _without(residual, new[:, None])
        residual[basis] = 0.0


def _without(rows: Floats, directions: Floats) -> Floats:
    """Return rows less their part along orthonormal directions [C, k]."""
    return rows - (rows @ directions) @ directions.T


def admitted(seen: Floats, candidates: Floats, *, tolerance: float) -> list[int]:
    """Choose candidates [R, K, V], groups of V columns, to join those seen [R, C], in that order.

    With Lambda = R tolerance^2 I + the sum of c c^T over columns seen, a change u of coefficients
    changes a column c by at most sqrt(u Lambda u * c Lambda^-1 c). For a leverage c Lambda^-1 c <=
    1 this is at most |u Lambda u|^(1/2), which is tolerance times sqrt(C + R |u|^2) if u changes no
    column seen by more than tolerance. The candidate of the largest leverage above 1 joins, again
    and again. Each one at least doubles det Lambda, so of columns no longer than c_max at most

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
        if leverage[best] <= _MAX_LEVERAGE:
            break
        joined.append(best)
        potential += candidates[:, best] @ candidates[:, best].T
    return joined


def _leverages(potential: Floats, candidates: Floats) -> Floats:
    """Return the largest c Lambda^-1 c of each group of columns [R, K, V]: [K]."""
    columns = candidates.reshape(len(potential), -1)
    leverage = np.einsum("rc,rc->c", columns, np.linalg.solve(potential, columns))
    return leverage.reshape(candidates.shape[1:]).max(-1)


def bounded_fit(target: Floats, basis: Floats, bound: float) -> tuple[Floats, float]:
    """Return coefficients v, none beyond `bound`, that bring v basis [R, C] closest to target [C].

    Closest means the smallest largest entry of the residual, which is returned too. This linear
    program always has a solution; the residual says how good it is.
    """
    from scipy.optimize import linprog

    size, columns = basis.shape
    ones = np.ones((columns, 1))
    solution = linprog(
        c=np.append(np.zeros(size), 1.0),
        A_ub=np.block([[basis.T, -ones], [-basis.T, -ones]]),
        b_ub=np.concatenate([target, -target]),
        bounds=[(-bound, bound)] * size + [(0, None)],
        method="highs",
    )
    if not solution.success:
        raise RuntimeError(f"the linear program of {size} coefficients failed: {solution.message}")
    return solution.x[:-1], float(solution.x[-1])
