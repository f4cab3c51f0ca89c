"""Rows and columns that represent the others, and coefficients within a bound."""

import itertools

import numpy as np
import pytest

from fastperturb.rank.learn.spanner import admitted, bounded_fit, spanner


def low_rank(seed, *, rows=60, columns=12, rank=5, noise=0.0):
    """Rows of this rank whose sizes differ a lot."""
    random = np.random.default_rng(seed)
    sizes = np.exp(1.5 * random.standard_normal((rows, 1)))
    values = sizes * random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))
    return values + noise * random.standard_normal(values.shape)


def coefficients(rows, basis):
    return np.linalg.lstsq(rows[basis].T, rows.T)[0].T


@pytest.mark.parametrize("bound", [1.01, 1.5, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_spanner_gives_all_rows_by_bounded_coefficients(seed, bound):
    rows = low_rank(seed)
    basis = spanner(rows, 0, tolerance=1e-6, bound=bound)
    weights = coefficients(rows, basis)
    assert len(basis) == 5
    np.testing.assert_allclose(weights @ rows[basis], rows, atol=1e-9)
    assert np.abs(weights).max() <= bound + 1e-9


def test_a_bad_basis_is_exchanged_until_its_coefficients_are_bounded():
    rows = low_rank(1)
    smallest = np.linalg.norm(rows, axis=1).argsort()[:5]
    rows = np.concatenate([rows[smallest], np.delete(rows, smallest, axis=0)])
    assert np.abs(coefficients(rows, list(range(5)))).max() > 100
    basis = spanner(rows, 5, tolerance=1e-6, bound=2.0)
    assert len(basis) == 5
    assert np.abs(coefficients(rows, basis)).max() <= 2.0 + 1e-9


def test_a_basis_that_spans_already_stays():
    rows = low_rank(2)
    basis = spanner(rows, 0, tolerance=1e-6, bound=2.0)
    rows = np.concatenate([rows[basis], rows])
    assert spanner(rows, 5, tolerance=1e-6, bound=2.0) == [0, 1, 2, 3, 4]


def test_rows_within_tolerance_of_a_span_do_not_count():
    rows = low_rank(3, noise=1e-4)
    assert len(spanner(rows, 0, tolerance=1e-2, bound=2.0)) == 5
    assert len(spanner(rows, 0, tolerance=1e-6, bound=2.0)) == 12  # one a column
    assert spanner(np.full((3, 4), 1e-3), 0, tolerance=1e-2, bound=2.0) == []
    assert spanner(np.empty((0, 4)), 0, tolerance=1e-2, bound=2.0) == []


def test_columns_that_are_not_admitted_change_no_more_than_those_seen_allow():
    random, tolerance = np.random.default_rng(0), 0.1
    seen = random.standard_normal((6, 4))
    candidates = random.standard_normal((6, 40, 3)) * np.exp(random.standard_normal((40, 1)))
    joined = admitted(seen, candidates, tolerance=tolerance)
    assert 0 < len(joined) < 15
    columns = np.concatenate([seen, *(candidates[:, place] for place in joined)], axis=1)
    for _ in range(200):
        # A change that columns seen hardly show, where a column left out could matter.
        change = np.linalg.solve(columns @ columns.T, random.standard_normal(6))
        allowed = np.square(change @ columns).sum() + 6 * tolerance**2 * np.square(change).sum()
        assert np.square(np.einsum("r,rkv->kv", change, candidates)).max() <= allowed * (1 + 1e-9)


def test_the_potential_bounds_the_number_of_columns_admitted():
    random, tolerance = np.random.default_rng(1), 0.01
    seen = np.zeros((4, 1))
    candidates = random.standard_normal((4, 500, 1))
    candidates /= np.linalg.norm(candidates, axis=0)
    joined = admitted(seen, candidates, tolerance=tolerance)
    columns = 1 + len(joined)
    bound = 4 * np.log2(1 + columns / (4 * tolerance) ** 2)
    assert 4 <= len(joined) <= bound


def test_a_column_that_tells_rows_apart_is_admitted_and_its_copy_is_not():
    seen = np.array([[1.0, 2.0], [1.0, 2.0]])  # two equal rows
    alike, apart = [[1.0], [1.0]], [[1.0], [-1.0]]
    candidates = np.array([alike, apart, apart]).transpose(1, 0, 2)
    assert admitted(seen, candidates, tolerance=0.01) == [1]


def test_a_bounded_fit_is_least_squares_where_that_is_bounded_and_exact():
    random = np.random.default_rng(2)
    basis, expected = random.standard_normal((3, 10)), np.array([1.5, -0.5, 0.0])
    fitted, residual = bounded_fit(expected @ basis, basis, 2.0)
    np.testing.assert_allclose(fitted, expected, atol=1e-7)
    assert residual == pytest.approx(0, abs=1e-7)


def test_a_bounded_fit_has_the_smallest_largest_residual():
    random = np.random.default_rng(3)
    basis, target = random.standard_normal((2, 6)), 5 * random.standard_normal(6)
    fitted, residual = bounded_fit(target, basis, 1.5)
    assert np.abs(fitted).max() <= 1.5 + 1e-9
    assert np.abs(fitted @ basis - target).max() == pytest.approx(residual)
    grid = np.array(list(itertools.product(np.linspace(-1.5, 1.5, 301), repeat=2)))
    best = np.abs(grid @ basis - target).max(1).min()
    assert best - 0.05 < residual <= best + 1e-9


def test_a_bounded_fit_of_a_row_out_of_reach_returns_its_distance():
    fitted, residual = bounded_fit(np.array([3.0, 5.0]), np.array([[1.0, 1.0]]), 2.0)
    assert fitted.tolist() == [2.0]
    assert residual == pytest.approx(3.0)
