"""Singular values and left singular vectors of a logit matrix that may not fit in memory.

The matrix is values [H, F, K] laid out as [H, F * K]: a row is a history, a column one token after
one future. It is read block by block and converted to fp64 there, so a memory map is never copied.

* gram: the smaller side's Gram matrix, added up over blocks in fp64, and its eigenvectors: all the
  singular values. An eigenvalue is a square, so rounding hides those below sqrt(n eps) times the
  first, n the smaller side: about 5e-7 at n = 1000. They are left out, not reported as noise.
* sketch: the largest singular values by randomised subspace iteration (Halko, Martinsson and Tropp
  2011, algorithm 4.4: *standard literature*), for matrices with both sides large: a Gaussian sketch
  of twice as many columns as are kept, then a few passes over the data with a QR between them. It
  finds none too large. The last are too small by less than half a percent where s_i falls as
  i^-0.5 or faster, by some percent where the spectrum is flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Values = NDArray[np.float32] | NDArray[np.float64]

Method = Literal["auto", "gram", "sketch"]

BLOCK = 1 << 23  # numbers that are in fp64 at a time: 64 MiB
GRAM_SIDE = 4096  # up to this smaller side: a Gram matrix of 128 MiB, with eigenvectors in 15 s
PASSES = 4  # over the data after the sketch's first


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix [H, F * K] that stand above rounding.

    singular_values: [k], falling; all of them by "gram", the largest by "sketch".
    left: [H, k], the left singular vectors, over histories.
    shape: (H, F, K).
    floor: singular values below it drown in rounding and are not here.
    frobenius: the matrix's Frobenius norm, exact by either method.
    complete: whether these are all the singular values above the floor.
    """

    singular_values: Floats
    left: Floats
    shape: tuple[int, int, int]
    method: str
    floor: float
    frobenius: float
    complete: bool

    def rank(self, tolerance: float) -> int | None:
        """How many singular values exceed tolerance times the first; None: all of a sketch's."""
        least = self.floor / self.singular_values[0]
        if not least <= tolerance < 1:
            raise ValueError(
                f"tolerance must be at least {least:.1e}, below which singular values drown in "
                f"rounding, and less than 1, got {tolerance}"
            )
        found = int((self.singular_values > tolerance * self.singular_values[0]).sum())
        return None if not self.complete and found == len(self.singular_values) else found

    @property
    def effective_rank(self) -> float | None:
        """exp(entropy of s / sum s), Roy and Vetterli's (2007): d for d equal singular values.

        None of a sketch that lacks the tail.
        """
        if not self.complete:
            return None
        share = self.singular_values / self.singular_values.sum()
        return float(np.exp(-share @ np.log(share)))

    def to_dict(self) -> dict[str, Any]:
        """All but the vectors."""
        return {
            "singular_values": self.singular_values.tolist(),
            "shape": list(self.shape),
            "method": self.method,
            "floor": self.floor,
            "frobenius": self.frobenius,
            "complete": self.complete,
            "effective_rank": self.effective_rank,
        }


def spectrum(
    values: Values, *, method: Method = "auto", count: int = 256, seed: int = 0
) -> Spectrum:
    """The singular values and left singular vectors of values [H, F, K] as a matrix [H, F * K].

    method: "auto" is "gram" while the smaller side is at most 4096, else "sketch".
    count: how many singular values a sketch finds.
    seed: of the sketch.
    """
    check(values)
    if method not in ("auto", "gram", "sketch"):
        raise ValueError(f"method must be auto, gram or sketch, got {method!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    smaller = min(len(values), values[0].size)
    if method == "auto":
        method = "gram" if smaller <= GRAM_SIDE else "sketch"
    if method == "sketch":
        squares, left, total = _sketch(values, count, min(2 * count, smaller), seed)
    elif len(values) == smaller:
        squares, left, total = _gram_of_rows(values)
    else:
        squares, left, total = _gram_of_columns(values)
    floor = math.sqrt(smaller * np.finfo(np.float64).eps * squares[0])
    found = np.sqrt(squares[squares > floor**2])
    return Spectrum(
        singular_values=found,
        left=left[:, : len(found)],
        shape=values.shape,
        method=method,
        floor=floor,
        frobenius=math.sqrt(total),
        complete=method == "gram" or len(found) < len(squares) or len(squares) == smaller,
    )


def column_blocks(*matrices: Values) -> Iterator[tuple[Floats, ...]]:
    """The same columns of each matrix in fp64 [its H, columns], some at a time, in order."""
    _, futures, tokens = matrices[0].shape
    columns = max(1, BLOCK // sum(map(len, matrices)))
    step = max(1, columns // tokens)
    for first in range(0, futures, step):
        for start in range(0, tokens, columns):
            where = (slice(None), slice(first, first + step), slice(start, start + columns))
            yield tuple(_matrix(each[where]) for each in matrices)


def row_blocks(values: Values, futures: slice = slice(None)) -> Iterator[tuple[slice, Floats]]:
    """Which rows, and these in fp64 [rows, columns], some at a time."""
    step = max(1, BLOCK // max(1, values[0, futures].size))
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        yield rows, _matrix(values[rows, futures])


def check(values: Values) -> None:
    """Refuse what is no logit matrix."""
    if values.ndim != 3 or values.size == 0 or values.dtype.kind != "f":
        raise ValueError(
            "values must be floating-point logits [histories, futures, tokens], some of each, "
            f"got {values.dtype} {list(values.shape)}"
        )


def _gram_of_rows(values: Values) -> tuple[Floats, Floats, float]:
    gram = np.zeros((len(values), len(values)))
    for (block,) in column_blocks(values):
        gram += block @ block.T
    return *_eigen(gram), float(gram.trace())


def _gram_of_columns(values: Values) -> tuple[Floats, Floats, float]:
    gram = np.zeros((values[0].size, values[0].size))
    for _, block in row_blocks(values):
        gram += block.T @ block
    squares, right = _eigen(gram)
    kept = squares > 0
    to_left = right[:, kept] / np.sqrt(squares[kept])
    left = np.concatenate([block @ to_left for _, block in row_blocks(values)])
    return squares[kept], left, float(gram.trace())


def _sketch(values: Values, count: int, width: int, seed: int) -> tuple[Floats, Floats, float]:
    """Subspace iteration on the rows' Gram matrix, which is never formed."""
    random = np.random.default_rng(seed)
    image, total = np.zeros((len(values), width)), 0.0
    for (block,) in column_blocks(values):
        image += block @ random.standard_normal((block.shape[1], width))
        total += float(np.vdot(block, block))
    _finite(total)
    for _ in range(PASSES):
        basis = np.linalg.qr(image)[0]
        image = np.zeros_like(basis)
        for (block,) in column_blocks(values):
            image += block @ (block.T @ basis)
    squares, within = _eigen(basis.T @ image)
    return squares[:count], basis @ within[:, :count], total


def _eigen(gram: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues, falling, and eigenvectors of a symmetric matrix."""
    _finite(gram.trace())
    squares, vectors = np.linalg.eigh(gram)
    return squares[::-1], vectors[:, ::-1]


def _finite(squares: float) -> None:
    if not 0 < squares < math.inf:
        raise ValueError(
            f"values must be finite and not all 0, but their squares add up to {squares}"
        )


def _matrix(values: Values) -> Floats:
    return np.asarray(values, dtype=np.float64).reshape(len(values), -1)
