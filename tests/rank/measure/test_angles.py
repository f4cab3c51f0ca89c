"""Principal angles: against scipy on explicit bases, known ones however small, random ones."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from fastperturb.rank.measure import spectrum as module
from fastperturb.rank.measure.angles import column_space_angles, random_angles, row_space_angles
from fastperturb.rank.measure.spectrum import spectrum


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 500)


def matrices(shape=(30, 6, 13), other_histories=45, shared=4):
    """Two whose rows share some directions, with falling singular values."""
    random, columns = np.random.default_rng(0), shape[1] * shape[2]
    common = random.standard_normal((shared, columns))
    found = []
    for histories in (shape[0], other_histories):
        own = np.vstack([common, random.standard_normal((8, columns))])
        weights = random.standard_normal((histories, len(own))) * np.geomspace(1, 0.01, len(own))
        found.append((weights @ own).reshape(histories, *shape[1:]))
    return found


def right_basis(values, rank):
    return np.linalg.svd(values.reshape(len(values), -1), full_matrices=False)[2][:rank].T


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_row_space_angles_are_scipys_between_explicit_right_singular_vectors(rank):
    ours, other = matrices()
    found = row_space_angles(ours, spectrum(ours), other, spectrum(other), rank=rank)
    expected = subspace_angles(right_basis(ours, rank), right_basis(other, rank))[::-1]
    np.testing.assert_allclose(found.angles, expected, rtol=1e-7)
    assert found.dimension == 6 * 13
    assert np.all(np.diff(found.angles) >= 0)


def test_column_space_angles_are_scipys_between_left_singular_vectors():
    ours = matrices()[0]
    other = np.random.default_rng(1).standard_normal((30, 4, 9))
    found = column_space_angles(spectrum(ours), spectrum(other), rank=5)
    left = [np.linalg.svd(each.reshape(30, -1))[0][:, :5] for each in (ours, other)]
    np.testing.assert_allclose(found.angles, subspace_angles(*left)[::-1], rtol=1e-7)
    assert found.dimension == 30


def test_known_angles_are_found_from_right_ones_down_to_rounding():
    given = np.array([0.0, 1e-12, 1e-9, 1e-6, 1e-3, 0.7, np.pi / 2])
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((90, 14)))[0].T
    turned = np.cos(given)[:, None] * axes[:7] + np.sin(given)[:, None] * axes[7:]
    ours, other = (
        ((random.standard_normal((20, 7)) * np.geomspace(1, 0.1, 7)) @ each).reshape(20, 9, 10)
        for each in (axes[:7], turned)
    )
    found = row_space_angles(ours, spectrum(ours), other, spectrum(other), rank=7).angles
    # 1e-14: the matrices are rounded themselves, and their condition is about 30.
    np.testing.assert_allclose(found, given, rtol=1e-9, atol=1e-14)


def test_a_matrix_spans_what_its_shuffled_histories_span():
    values = matrices()[0]
    shuffled = values[np.random.default_rng(2).permutation(30)]
    found = row_space_angles(values, spectrum(values), shuffled, spectrum(shuffled), rank=6)
    np.testing.assert_allclose(found.angles, 0, atol=1e-11)
    columns = column_space_angles(spectrum(values), spectrum(values[:, ::-1]), rank=6)
    np.testing.assert_allclose(columns.angles, 0, atol=1e-7)  # of eigenvectors of a Gram matrix


@pytest.mark.parametrize(("dimension", "rank"), [(200, 5), (12, 5), (8, 5), (5, 5)])
def test_random_angles_are_those_of_spans_of_gaussian_vectors(dimension, rank):
    random, draws = np.random.default_rng(3), 2000
    explicit = np.array(
        [subspace_angles(*random.standard_normal((2, dimension, rank)))[::-1] for _ in range(draws)]
    )
    found = random_angles(dimension, rank, draws=draws)
    error = np.sqrt((explicit.var(0) + found.var(0)) / draws)
    # Ten means: four standard errors; subspaces that must meet do so to rounding.
    assert np.all(np.abs(explicit.mean(0) - found.mean(0)) < 4 * error + 1e-7)
    np.testing.assert_allclose(found.std(0), explicit.std(0), rtol=0.15, atol=1e-7)


def test_the_reference_beside_the_angles_is_that_of_their_dimension():
    ours, other = matrices()
    found = row_space_angles(ours, spectrum(ours), other, spectrum(other), rank=4)
    np.testing.assert_array_equal(found.random, random_angles(6 * 13, 4).mean(0))
    assert found.angles[0] < 0.1 * found.random[0]


def test_refusals_name_what_differs():
    ours, other = matrices()
    of, of_other = spectrum(ours), spectrum(other)
    with pytest.raises(ValueError, match="must have the same futures and tokens"):
        row_space_angles(ours, of, other[:, 1:], of_other, rank=2)
    with pytest.raises(ValueError, match=r"other is \[45, 6, 13\], but its spectrum that of"):
        row_space_angles(ours, of, other, of, rank=2)
    with pytest.raises(ValueError, match="rank must be from 1 to the 12 singular values"):
        row_space_angles(ours, of, other, of_other, rank=13)
    with pytest.raises(ValueError, match="the spectra are of 30 and 45 histories"):
        column_space_angles(of, of_other, rank=2)
    with pytest.raises(ValueError, match="rank must be from 1 to the dimension 3, got 4"):
        random_angles(3, 4)
