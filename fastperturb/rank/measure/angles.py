"""Principal angles between what two logit matrices span.

Models asked on other histories (shuffled ones, say) and the same futures have rows in the same
space, and the angles between their leading right singular subspaces say how much of it they share:
0 is a shared direction, pi / 2 one that the other lacks. With the same histories and other
futures, left singular subspaces are what compares.

Right singular vectors are as long as the matrix is wide. Those of both sides are made a block of
columns at a time and only the triangular factor of their joint QR decomposition is kept, [2r, 2r]:
an isometry takes it back to the vectors, so it has their angles, small ones as accurately as if the
vectors had been there. (Cosines from a cross-Gram matrix would lose angles below 1e-8.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastperturb.rank.measure.spectrum import Floats, Spectrum, Values, column_blocks


@dataclass(frozen=True)
class Angles:
    """Principal angles in radians, rising, between two subspaces of so many dimensions.

    random: the mean angles between two random subspaces of the same dimensions, for reference.
    """

    angles: list[float]
    random: list[float]
    dimension: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def row_space_angles(
    values: Values, spectrum: Spectrum, other: Values, other_spectrum: Spectrum, *, rank: int
) -> Angles:
    """Between the top `rank` right singular subspaces of two matrices on the same futures.

    spectrum, other_spectrum: those of `values` and of `other` [their own H, F, K].
    """
    if values.shape[1:] != other.shape[1:]:
        raise ValueError(
            "values and other must have the same futures and tokens, got "
            f"{list(values.shape)} and {list(other.shape)}"
        )
    for name, matrix, of in (("values", values, spectrum), ("other", other, other_spectrum)):
        if of.shape != matrix.shape:
            raise ValueError(
                f"{name} is {list(matrix.shape)}, but its spectrum that of {list(of.shape)}"
            )
    _check_rank(rank, spectrum, other_spectrum)
    to_right = [
        each.left[:, :rank] / each.singular_values[:rank] for each in (spectrum, other_spectrum)
    ]
    factor: Floats = np.zeros((0, 2 * rank))
    for blocks in column_blocks(values, other):
        both = np.hstack([block.T @ each for block, each in zip(blocks, to_right)])
        factor = np.asarray(np.linalg.qr(np.vstack([factor, both]), mode="r"))
    return _angles(factor[:, :rank], factor[:, rank:], values[0].size)


def column_space_angles(spectrum: Spectrum, other_spectrum: Spectrum, *, rank: int) -> Angles:
    """Between the top `rank` left singular subspaces of two matrices on the same histories."""
    if spectrum.shape[0] != other_spectrum.shape[0]:
        raise ValueError(
            f"the spectra are of {spectrum.shape[0]} and {other_spectrum.shape[0]} histories: "
            "ask both on the same"
        )
    _check_rank(rank, spectrum, other_spectrum)
    return _angles(spectrum.left[:, :rank], other_spectrum.left[:, :rank], spectrum.shape[0])


def random_angles(dimension: int, rank: int, *, draws: int = 100, seed: int = 0) -> Floats:
    """Principal angles between random subspaces [draws, rank], rising, exactly distributed.

    The first subspace may be that of the first `rank` coordinates, and the other the span of a
    Gaussian matrix. Only its rows there and the Gram matrix of its other rows matter, and the
    latter is a Wishart matrix: Bartlett's triangular factor, a few random numbers, stands for any
    number of rows.
    """
    from scipy.linalg import subspace_angles

    if not 1 <= rank <= dimension:
        raise ValueError(f"rank must be from 1 to the dimension {dimension}, got {rank}")
    random, rest = np.random.default_rng(seed), dimension - rank
    first = np.eye(2 * rank, rank)
    found = np.empty((draws, rank))
    for number in range(draws):
        below = np.triu(random.standard_normal((rank, rank)), 1)
        if rest >= rank:
            np.fill_diagonal(below, np.sqrt(random.chisquare(rest - np.arange(rank))))
        else:
            below = random.standard_normal((rest, rank))
        second = np.vstack([random.standard_normal((rank, rank)), below])
        found[number] = subspace_angles(first[: len(second)], second)[::-1]
    return found


def _angles(first: Floats, second: Floats, dimension: int) -> Angles:
    from scipy.linalg import subspace_angles

    found = subspace_angles(first, second)[::-1]
    random = random_angles(dimension, first.shape[1]).mean(0)
    return Angles(found.tolist(), random.tolist(), dimension)


def _check_rank(rank: int, *spectra: Spectrum) -> None:
    most = min(len(each.singular_values) for each in spectra)
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank must be from 1 to the {most} singular values of the shorter spectrum, got {rank}"
        )
