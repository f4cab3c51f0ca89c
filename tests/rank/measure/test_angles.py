"""Principal angles: against scipy on explicit bases, known small ones, and random ones."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from fastperturb.rank.measure import (
    column_space_angles,
    random_angles,
    row_space_angles,
    singular_values,
    spectrum,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(singular_values, "BLOCK", 500)


def matrices(shape=(30, 6, 13), other_histories=45, shared=4):
    """Two matrices whose rows share some directions, with falling singular values."""
    random, columns = np.random.default_rng(0), shape[1] * shape[2]
    common = random.standard_normal((shared, columns))
    result = []
    for histories in (shape[0], other_histories):
        own = np.vstack([common, random.standard_normal((8, columns))])
        weights = random.standard_normal((histories, len(own))) * np.geomspace(1, 0.01, len(own))
        result.append((weights @ own).reshape(histories, *shape[1:]))
    return result


def right_basis(values, rank):
    return np.linalg.svd(values.reshape(len(values), -1), full_matrices=False)[2][:rank].T


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_row_space_angles_are_scipys_between_explicit_right_singular_vectors(rank):
    ours, other = matrices()
    angles = row_space_angles(ours, spectrum(ours), other, spectrum(other), rank=rank)
    expected = subspace_angles(right_basis(ours, rank), right_basis(other, rank))[::-1]
    np.testing.assert_allclose(angles.angles, expected, rtol=1e-7)
    assert angles.dimension == 6 * 13
    assert np.all(np.diff(angles.angles) >= 0)


def test_column_space_angles_are_scipys_between_left_singular_vectors():
    ours = matrices()[0]
    other = np.random.default_rng(1).standard_normal((30, 4, 9))
    angles = column_space_angles(spectrum(ours), spectrum(other), rank=5)
    left = [np.linalg.svd(matrix.reshape(30, -1))[0][:, :5] for matrix in (ours, other)]
    np.testing.assert_allclose(angles.angles, subspace_angles(*left)[::-1], rtol=1e-7)
    assert angles.dimension == 30


def test_known_angles_are_recovered_from_right_angles_down_to_rounding():
    expected = np.array([0.0, 1e-12, 1e-9, 1e-6, 1e-3, 0.7, np.pi / 2])
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((90, 14)))[0].T
    turned = np.cos(expected)[:, None] * axes[:7] + np.sin(expected)[:, None] * axes[7:]
    ours, other = (
        ((random.standard_normal((20, 7)) * np.geomspace(1, 0.1, 7)) @ basis).reshape(20, 9, 10)
        for basis in (axes[:7], turned)
    )
    angles = row_space_angles(ours, spectrum(ours), other, spectrum(other), rank=7).angles
    # 1e-14: the matrices are rounded themselves, and their condition is about 30.
    np.testing.assert_allclose(angles, expected, rtol=1e-9, atol=1e-14)


def test_a_matrix_with_its_rows_permuted_spans_the_same_subspaces():
    values = matrices()[0]
    permuted = values[np.random.default_rng(2).permutation(30)]
    angles = row_space_angles(values, spectrum(values), permuted, spectrum(permuted), rank=6)
    np.testing.assert_allclose(angles.angles, 0, atol=1e-11)
    columns = column_space_angles(spectrum(values), spectrum(values[:, ::-1]), rank=6)
    np.testing.assert_allclose(columns.angles, 0, atol=1e-7)  # of eigenvectors of a Gram matrix


@pytest.mark.parametrize(("dimension", "rank"), [(200, 5), (12, 5), (8, 5), (5, 5)])
def test_random_angles_are_those_of_spans_of_gaussian_vectors(dimension, rank):
    random, count = np.random.default_rng(3), 2000
    explicit = np.array(
        [subspace_angles(*random.standard_normal((2, dimension, rank)))[::-1] for _ in range(count)]
    )
    angles = random_angles(dimension, rank, count=count)
    error = np.sqrt((explicit.var(0) + angles.var(0)) / count)
    # Four standard errors for ten means; subspaces that must meet do so up to rounding.
    assert np.all(np.abs(explicit.mean(0) - angles.mean(0)) < 4 * error + 1e-7)
    np.testing.assert_allclose(angles.std(0), explicit.std(0), rtol=0.15, atol=1e-7)


def test_the_random_reference_is_that_of_the_same_dimensions():
    ours, other = matrices()
    angles = row_space_angles(ours, spectrum(ours), other, spectrum(other), rank=4)
    np.testing.assert_array_equal(angles.random, random_angles(6 * 13, 4).mean(0))
    assert angles.angles[0] < 0.1 * angles.random[0]


def test_errors_name_the_arguments_that_differ():
    ours, other = matrices()
    our_spectrum, other_spectrum = spectrum(ours), spectrum(other)
    with pytest.raises(ValueError, match="must have the same futures and tokens"):
        row_space_angles(ours, our_spectrum, other[:, 1:], other_spectrum, rank=2)
    with pytest.raises(ValueError, match=r"other is \[45, 6, 13\], but its spectrum that of"):
        row_space_angles(ours, our_spectrum, other, our_spectrum, rank=2)
    with pytest.raises(ValueError, match="rank must be from 1 to the 12 singular values"):
        row_space_angles(ours, our_spectrum, other, other_spectrum, rank=13)
    with pytest.raises(ValueError, match="over the same histories, got 30 and 45"):
        column_space_angles(our_spectrum, other_spectrum, rank=2)
    with pytest.raises(ValueError, match="rank must be from 1 to the dimension 3, got 4"):
        random_angles(3, 4)
