"""Principal angles between the subspaces that two logit matrices span.

Matrices of different histories (shuffled ones, say) on the same futures have rows in one space, and
the angles between their leading right singular subspaces say how much of it they share: 0 is a
shared direction, pi / 2 one that the other lacks. Matrices of the same histories on different
futures are compared by their left singular subspaces.

Right singular vectors are as long as the matrix is wide. Those of both sides are made a block of
columns at a time and only the triangular factor of their joint QR decomposition is kept, [2r, 2r]:
an isometry takes it back to the vectors, so it has their angles, small ones as accurately as if the
vectors had been there. (Cosines from a cross-Gram matrix would lose angles below 1e-8.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastperturb.rank.measure.singular_values import Spectrum, column_blocks
from fastperturb.rank.types import Floats, Logits


@dataclass(frozen=True)
class Angles:
    """Principal angles in radians, rising, between two subspaces of one space.

    random: the mean angles between two random subspaces of the same dimensions, for reference.
    dimension: that of the space.
    """

    angles: list[float]
    random: list[float]
    dimension: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def row_space_angles(
    values: Logits, spectrum: Spectrum, other: Logits, other_spectrum: Spectrum, *, rank: int
) -> Angles:
    """Return the angles between the top `rank` right singular subspaces of two matrices.

    values, other: logits [H, F, K] of their own histories, on the same futures and tokens.
    spectrum, other_spectrum: the spectra of `values` and of `other`.
    """
    if values.shape[1:] != other.shape[1:]:
        raise ValueError(
            "values and other must have the same futures and tokens, got "
            f"{list(values.shape)} and {list(other.shape)}"
        )
    pairs = {"values": (values, spectrum), "other": (other, other_spectrum)}
    for name, (matrix, own_spectrum) in pairs.items():
        if own_spectrum.shape != matrix.shape:
            raise ValueError(
                f"{name} is {list(matrix.shape)}, but its spectrum that of "
                f"{list(own_spectrum.shape)}"
            )
    _check_rank(rank, spectrum, other_spectrum)
    ours, others = spectrum.to_right(rank), other_spectrum.to_right(rank)
    factor: Floats = np.zeros((0, 2 * rank))
    for block, other_block in column_blocks(values, other):
        right_vectors = np.hstack([block.T @ ours, other_block.T @ others])
        factor = np.asarray(np.linalg.qr(np.vstack([factor, right_vectors]), mode="r"))
    return _angles(factor[:, :rank], factor[:, rank:], values[0].size)


def column_space_angles(spectrum: Spectrum, other_spectrum: Spectrum, *, rank: int) -> Angles:
    """Return the angles between the top `rank` left singular subspaces, over the same histories."""
    if spectrum.shape[0] != other_spectrum.shape[0]:
        raise ValueError(
            "spectrum and other_spectrum must be over the same histories, got "
            f"{spectrum.shape[0]} and {other_spectrum.shape[0]}"
        )
    _check_rank(rank, spectrum, other_spectrum)
    return _angles(spectrum.left[:, :rank], other_spectrum.left[:, :rank], spectrum.shape[0])


def random_angles(dimension: int, rank: int, *, count: int = 100, seed: int = 0) -> Floats:
    """Draw `count` sets of principal angles between random subspaces [count, rank], rising.

    Their distribution is exact. The first subspace may be that of the first `rank` coordinates, and
    the other the span of a Gaussian matrix. Only its rows there and the Gram matrix of its other
    rows matter, and the latter is a Wishart matrix: Bartlett's triangular factor, a few random
    numbers, stands for any number of rows.
    """
    from scipy.linalg import subspace_angles

    if not 1 <= rank <= dimension:
        raise ValueError(f"rank must be from 1 to the dimension {dimension}, got {rank}")
    random, rest = np.random.default_rng(seed), dimension - rank
    first = np.eye(2 * rank, rank)
    angles = np.empty((count, rank))
    for number in range(count):
        below = np.triu(random.standard_normal((rank, rank)), 1)
        if rest >= rank:
            np.fill_diagonal(below, np.sqrt(random.chisquare(rest - np.arange(rank))))
        else:
            below = random.standard_normal((rest, rank))
        second = np.vstack([random.standard_normal((rank, rank)), below])
        angles[number] = subspace_angles(first[: len(second)], second)[::-1]
    return angles


def _angles(first: Floats, second: Floats, dimension: int) -> Angles:
    from scipy.linalg import subspace_angles

    angles = subspace_angles(first, second)[::-1]
    random = random_angles(dimension, first.shape[1]).mean(0)
    return Angles(angles.tolist(), random.tolist(), dimension)


def _check_rank(rank: int, *spectra: Spectrum) -> None:
    available = min(len(spectrum.singular_values) for spectrum in spectra)
    if not 1 <= rank <= available:
        raise ValueError(
            f"rank must be from 1 to the {available} singular values of the shorter spectrum, got "
            f"{rank}"
        )
