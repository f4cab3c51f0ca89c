"""Spectra of logit matrices: against numpy's SVD, by either method, without a copy in memory."""

import tracemalloc

import numpy as np
import pytest
from rank_cases import matrix_with_spectrum

from fastperturb.rank.measure import kl_by_rank, row_space_angles, spectrum
from fastperturb.rank.measure import singular_values as module
from fastperturb.rank.measure.singular_values import column_blocks, row_blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks hold a fraction of one future's columns, or a few rows."""
    monkeypatch.setattr(module, "BLOCK", 200)


# Fewer histories than columns, more, and as many.
@pytest.mark.parametrize("shape", [(30, 7, 11), (90, 4, 9), (36, 4, 9)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_finds_numpys_singular_values_and_left_vectors(shape, dtype, small_blocks):
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    matrix = values.astype(np.float64).reshape(shape[0], -1)
    left, expected, _ = np.linalg.svd(matrix, full_matrices=False)
    measured = spectrum(values)
    np.testing.assert_allclose(measured.singular_values, expected, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(measured.left * left, 0)), 1, rtol=1e-9)
    np.testing.assert_allclose(measured.frobenius, np.linalg.norm(matrix), rtol=1e-12)


def test_a_strided_view_of_a_matrix_has_the_spectrum_of_its_copy(small_blocks):
    values = np.random.default_rng(0).standard_normal((60, 5, 13))
    view, expected = spectrum(values[::3, 1:]), spectrum(values[::3, 1:].copy())
    np.testing.assert_array_equal(view.singular_values, expected.singular_values)


@pytest.mark.parametrize("block", [1, 200, 10_000])
def test_blocks_cover_the_columns_and_rows_once_and_in_order(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    values = np.random.default_rng(0).standard_normal((6, 5, 70))
    others = np.random.default_rng(1).standard_normal((9, 5, 70))
    ours, theirs = zip(*column_blocks(values, others))
    np.testing.assert_array_equal(np.hstack(ours), values.reshape(6, -1))
    np.testing.assert_array_equal(np.hstack(theirs), others.reshape(9, -1))
    rows = np.vstack([part for _, part in row_blocks(values, slice(1, 3))])
    np.testing.assert_array_equal(rows, values[:, 1:3].reshape(6, -1))


@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("shape", [(40, 6, 12), (200, 4, 9)])
@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_a_matrix_of_exact_rank_has_no_other_singular_values(rank, shape, method):
    singular_values = np.geomspace(1, 1e-3, rank)
    measured = spectrum(matrix_with_spectrum(singular_values, shape), method=method, count=12)
    np.testing.assert_allclose(measured.singular_values, singular_values, rtol=1e-9)
    assert measured.complete and measured.rank(1e-6) == rank
    # In fp32 there are more, of the size of rounding, which a tolerance leaves out.
    single = spectrum(
        matrix_with_spectrum(singular_values, shape).astype(np.float32), method=method
    )
    assert single.rank(1e-5) == rank


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(900, 20, 40), (500, 20, 40)])
def test_a_sketch_is_right_to_half_a_percent_even_if_the_spectrum_is_nearly_flat(power, shape):
    side = min(shape[0], 800)
    singular_values = np.arange(1, side + 1) ** -power
    values = matrix_with_spectrum(singular_values, shape)
    measured = spectrum(values, method="sketch", count=64)
    np.testing.assert_allclose(measured.singular_values, singular_values[:64], rtol=5e-3)
    np.testing.assert_allclose(measured.singular_values[:32], singular_values[:32], rtol=1e-4)
    np.testing.assert_allclose(measured.left.T @ measured.left, np.eye(64), atol=1e-12)
    np.testing.assert_allclose(measured.frobenius, np.linalg.norm(singular_values), rtol=1e-12)


def test_a_sketch_depends_on_its_seed_and_not_on_the_size_of_blocks(monkeypatch):
    values = np.random.default_rng(0).standard_normal((80, 9, 10))
    first = spectrum(values, method="sketch", count=5, seed=1).singular_values
    other = spectrum(values, method="sketch", count=5, seed=2).singular_values
    monkeypatch.setattr(module, "BLOCK", 300)
    again = spectrum(values, method="sketch", count=5, seed=1).singular_values
    np.testing.assert_allclose(again, first, rtol=1e-12)
    assert not np.allclose(other, first, rtol=1e-6)


def test_matrices_with_both_sides_large_are_sketched(monkeypatch):
    monkeypatch.setattr(module, "GRAM_SIDE", 20)
    random = np.random.default_rng(0)
    methods = [
        spectrum(random.standard_normal(shape)).method
        for shape in [(20, 3, 7), (21, 4, 5), (21, 3, 7)]
    ]
    assert methods == ["gram", "gram", "sketch"]


def test_ranks_count_by_tolerance_and_by_entropy():
    measured = spectrum(matrix_with_spectrum([1, 0.5, 0.1, 0.01], (20, 4, 5)))
    assert [measured.rank(tolerance) for tolerance in (0.6, 0.2, 0.05, 1e-3)] == [1, 2, 3, 4]
    equal = spectrum(matrix_with_spectrum([2, 2, 2], (20, 4, 5)))
    assert equal.effective_rank == pytest.approx(3)
    uneven = spectrum(matrix_with_spectrum([3, 1], (20, 4, 5)))
    assert uneven.effective_rank == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_a_memory_map_is_never_copied_whole(method, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1 << 16)  # 512 KiB in fp64
    shape = (150, 100, 400)
    values = np.lib.format.open_memmap(tmp_path / "values.npy", mode="w+", shape=shape)
    values = values.view(np.float64)
    for number, row in enumerate(values):
        row[:] = np.random.default_rng(number).standard_normal(shape[1:])
    tracemalloc.start()
    measured = spectrum(values, method=method, count=8)
    kl_by_rank(values[75:], spectrum(values[:75]), ranks=[0, 8], learned_from=values[:75])
    row_space_angles(values, measured, values, measured, rank=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 8


def test_errors_name_the_argument():
    values = np.ones((4, 2, 3))
    with pytest.raises(
        ValueError, match=r"values must be .* \[histories, futures, tokens\].*\[4, 6\]"
    ):
        spectrum(values.reshape(4, 6))
    with pytest.raises(ValueError, match="values must be floating-point .* int64"):
        spectrum(values.astype(int))
    with pytest.raises(ValueError, match="method must be auto, gram or sketch, got 'svd'"):
        spectrum(values, method="svd")
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        spectrum(values, count=0)
    with pytest.raises(ValueError, match="finite and not all 0, but their squares add up to 0"):
        spectrum(np.zeros((4, 2, 3)))
    for method in ("gram", "sketch"):
        with pytest.raises(ValueError, match="values must be finite"):
            spectrum(np.full((4, 2, 3), np.nan), method=method)
    with pytest.raises(ValueError, match="tolerance must be at least .* rounding hides"):
        spectrum(values).rank(1e-12)
    flat = spectrum(matrix_with_spectrum(np.ones(15), (20, 4, 5)), method="sketch", count=6)
    assert flat.effective_rank is None
    assert flat.rank(0.5) is None
