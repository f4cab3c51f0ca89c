"""Singular values and left singular vectors of a logit matrix that may not fit in memory.

The matrix is values [H, F, K] laid out as [H, F * K]: a row is a history, a column one token after
one future. It is read block by block and converted to fp64 there, so a memory map is never copied.

* gram: the smaller side's Gram matrix, added up over blocks in fp64, and its eigenvectors: all the
  singular values. An eigenvalue is a square, so rounding hides those below sqrt(n eps) times the
  first, n the smaller side: about 5e-7 at n = 1000. They are left out.
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

from fastperturb.rank.types import Floats, Logits

Method = Literal["auto", "gram", "sketch"]

BLOCK = 1 << 23  # numbers converted to fp64 at a time: 64 MiB
GRAM_SIDE = 4096  # "auto" sketches above it: there a Gram matrix has 128 MiB and takes 15 s
PASSES = 4  # of subspace iteration over the data, after the sketch's first


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix [H, F * K] that stand above rounding.

    singular_values: [k], falling; all of them by "gram", the largest by "sketch".
    left: [H, k], the left singular vectors, over histories.
    shape: (H, F, K).
    floor: the size below which rounding hides singular values; such are left out.
    frobenius: the matrix's Frobenius norm, exact by either method.
    complete: True if no singular value above the floor is missing.
    """

    singular_values: Floats
    left: Floats
    shape: tuple[int, int, int]
    method: str
    floor: float
    frobenius: float
    complete: bool

    def rank(self, tolerance: float) -> int | None:
        """Count singular values above tolerance times the first; None if a sketch ends before."""
        smallest = self.floor / self.singular_values[0]
        if not smallest <= tolerance < 1:
            raise ValueError(
                f"tolerance must be at least {smallest:.1e}, below which rounding hides singular "
                f"values, and less than 1, got {tolerance}"
            )
        rank = int((self.singular_values > tolerance * self.singular_values[0]).sum())
        return None if not self.complete and rank == len(self.singular_values) else rank

    @property
    def effective_rank(self) -> float | None:
        """exp(entropy of s / sum s), after Roy and Vetterli (2007): d for d equal singular values.

        None if the spectrum is a sketch that lacks the tail.
        """
        if not self.complete:
            return None
        share = self.singular_values / self.singular_values.sum()
        return float(np.exp(-share @ np.log(share)))

    def to_right(self, rank: int) -> Floats:
        """Return the [H, rank] matrix whose product with the transposed logits gives V [F K, rank].

        V holds the leading right singular vectors.
        """
        return self.left[:, :rank] / self.singular_values[:rank]

    def to_dict(self) -> dict[str, Any]:
        """Return all but the vectors as JSON holds it."""
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
    values: Logits, *, method: Method = "auto", count: int = 256, seed: int = 0
) -> Spectrum:
    """Return the singular values and left singular vectors of logits [H, F, K] as [H, F * K].

    method: "auto" is "gram" while the smaller side is at most 4096, else "sketch".
    count: the number of singular values that a sketch computes.
    seed: the seed of the sketch.
    """
    check_logits(values)
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
    singular_values = np.sqrt(squares[squares > floor**2])
    above = len(singular_values)
    return Spectrum(
        singular_values=singular_values,
        left=left[:, :above],
        shape=values.shape,
        method=method,
        floor=floor,
        frobenius=math.sqrt(total),
        complete=method == "gram" or above < len(squares) or len(squares) == smaller,
    )


def column_blocks(*matrices: Logits) -> Iterator[tuple[Floats, ...]]:
    """Yield the columns of each matrix in fp64 [its H, columns], some at a time, in order."""
    _, futures, tokens = matrices[0].shape
    columns = max(1, BLOCK // sum(map(len, matrices)))
    step = max(1, columns // tokens)
    for first in range(0, futures, step):
        for start in range(0, tokens, columns):
            where = (slice(None), slice(first, first + step), slice(start, start + columns))
            yield tuple(_flat(matrix[where]) for matrix in matrices)


def row_blocks(values: Logits, futures: slice = slice(None)) -> Iterator[tuple[slice, Floats]]:
    """Yield a slice of rows and those rows in fp64 [rows, columns], some at a time, in order."""
    step = max(1, BLOCK // max(1, values[0, futures].size))
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        yield rows, _flat(values[rows, futures])


def check_logits(values: Logits) -> None:
    """Raise unless these are floating-point logits [H, F, K], none of the sizes 0."""
    if values.ndim != 3 or values.size == 0 or values.dtype.kind != "f":
        raise ValueError(
            "values must be floating-point logits [histories, futures, tokens], some of each, "
            f"got {values.dtype} {list(values.shape)}"
        )


def _gram_of_rows(values: Logits) -> tuple[Floats, Floats, float]:
    gram = np.zeros((len(values), len(values)))
    for (block,) in column_blocks(values):
        gram += block @ block.T
    return *_eigen(gram), float(gram.trace())


def _gram_of_columns(values: Logits) -> tuple[Floats, Floats, float]:
    gram = np.zeros((values[0].size, values[0].size))
    for _, block in row_blocks(values):
        gram += block.T @ block
    squares, right = _eigen(gram)
    kept = squares > 0
    to_left = right[:, kept] / np.sqrt(squares[kept])
    left = np.concatenate([block @ to_left for _, block in row_blocks(values)])
    return squares[kept], left, float(gram.trace())


def _sketch(values: Logits, count: int, width: int, seed: int) -> tuple[Floats, Floats, float]:
    """Run subspace iteration on the rows' Gram matrix, without forming it."""
    random = np.random.default_rng(seed)
    image, total = np.zeros((len(values), width)), 0.0
    for (block,) in column_blocks(values):
        image += block @ random.standard_normal((block.shape[1], width))
        total += float(np.vdot(block, block))
    _check_finite(total)
    for _ in range(PASSES):
        basis = np.linalg.qr(image)[0]
        image = np.zeros_like(basis)
        for (block,) in column_blocks(values):
            image += block @ (block.T @ basis)
    squares, vectors = _eigen(basis.T @ image)
    return squares[:count], basis @ vectors[:, :count], total


def _eigen(gram: Floats) -> tuple[Floats, Floats]:
    """Return the eigenvalues, falling, and the eigenvectors of a symmetric matrix."""
    _check_finite(gram.trace())
    squares, vectors = np.linalg.eigh(gram)
    return squares[::-1], vectors[:, ::-1]


def _check_finite(squares: float) -> None:
    if not 0 < squares < math.inf:
        raise ValueError(
            f"values must be finite and not all 0, but their squares add up to {squares}"
        )


def _flat(values: Logits) -> Floats:
    return np.asarray(values, dtype=np.float64).reshape(len(values), -1)
