"""Documents laid end to end and cut into blocks of one length, with what a model needs to know.

A block under packing="documents" (T = 8, the n-th block, EOS written $, documents abc and defgh):

    tokens       a     b     c     $     d     e     f     g
    labels       -     b     c     $     -     e     f     g     none for a piece's first token
    positions    0     1     2     3     0     1     2     3     attention stays within a piece
    rows        8n    8n    8n    8n    8n+4  8n+4  8n+4  8n+4   a piece's own noise

Under packing="stream" documents run on inside a block: one label less than tokens, no positions,
and the block's number as its row. Rows say where a piece stands in the laid-out documents, so its
noise is the same in whatever order, and by however many processes, blocks are visited.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastperturb.engine.batch import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

Packing = Literal["documents", "stream"]
Tokens = NDArray[np.int32]


class Block(NamedTuple):
    """One example of a batch, int64."""

    tokens: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T], IGNORED where nothing is predicted
    positions: NDArray[np.int64] | None  # [T]; None under packing="stream"
    rows: NDArray[np.int64]  # [T]


class Cut(NamedTuple):
    """A block's share of the laid-out documents; only an epoch's last may be short of T tokens."""

    number: int
    tokens: Tokens
    starts: NDArray[np.bool_]  # where a document begins


@dataclass(frozen=True)
class Layout:
    """How a cut becomes a block."""

    block_size: int
    packing: Packing
    eos: int

    def block(self, cut: Cut) -> Block:
        real = len(cut.tokens)
        missing = (0, self.block_size - real)
        tokens = np.pad(cut.tokens.astype(np.int64), missing, constant_values=self.eos)
        if self.packing == "stream":
            labels = tokens.copy()
            labels[0] = labels[real:] = IGNORED
            return Block(tokens, labels, None, np.full_like(tokens, cut.number))
        starts = np.pad(cut.starts, missing)
        starts[0] = starts[real : real + 1] = True  # the padding is a piece of its own
        labels = np.where(starts, IGNORED, tokens)
        labels[real:] = IGNORED
        offsets = np.arange(self.block_size)
        piece = np.maximum.accumulate(np.where(starts, offsets, 0))  # the offset where it begins
        return Block(tokens, labels, offsets - piece, cut.number * self.block_size + piece)


def collate(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The arguments of `PerturbedLM.forward` for a batch of blocks."""

    def stack(arrays: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.stack(arrays))

    tokens, labels, positions, rows = zip(*blocks)
    batch = {"input_ids": stack(tokens), "labels": stack(labels), "rows": stack(rows)}  # [B, T]
    if positions[0] is None:
        return batch | {"rows": batch["rows"][:, 0]}  # [B]
    return batch | {"position_ids": stack(positions)}


class PackedDocuments(Sequence[Block]):
    """The blocks of tokenised documents, laid out on demand from memory-mapped tables.

    datasets: their column `tokens` holds a list of int32 for each document.
    max_tokens: leave out what comes after so many.
    """

    def __init__(
        self, datasets: Sequence[Dataset], layout: Layout, *, max_tokens: int | None = None
    ) -> None:
        chunks = [chunk for each in datasets for chunk in each.data.column("tokens").chunks]
        self._layout = layout
        self._chunks: list[Tokens] = [chunk.flatten().to_numpy() for chunk in chunks]
        self._chunk_ends = np.cumsum([len(chunk) for chunk in self._chunks]).tolist()
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
        ends = np.cumsum(lengths, dtype=np.int64)
        self._document_starts = ends - lengths
        self.token_count = int(ends[-1]) if max_tokens is None else min(int(ends[-1]), max_tokens)
        self.fingerprint = hashlib.sha256(lengths.astype(np.int64).tobytes()).hexdigest()

    def __len__(self) -> int:
        return -(-self.token_count // self._layout.block_size)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self._block(number) for number in numbers]
        return self._block(numbers)

    def _block(self, number: int) -> Block:
        begin = number * self._layout.block_size
        end = min(begin + self._layout.block_size, self.token_count)
        first, last = np.searchsorted(self._document_starts, (begin, end))
        starts = np.zeros(end - begin, dtype=np.bool_)
        starts[self._document_starts[first:last] - begin] = True
        return self._layout.block(Cut(number, self._tokens(begin, end), starts))

    def documents(self, number: int) -> NDArray[np.int64]:
        """The document that each token of a block is of [T]; -1 for padding."""
        begin = number * self._layout.block_size
        offsets = np.arange(begin, begin + self._layout.block_size)
        found = np.searchsorted(self._document_starts, offsets, side="right") - 1
        return np.where(offsets < self.token_count, found, -1)

    def _tokens(self, begin: int, end: int) -> Tokens:
        parts = []
        chunk = bisect.bisect_right(self._chunk_ends, begin)
        while begin < end:
            stop = min(end, self._chunk_ends[chunk])
            offset = self._chunk_ends[chunk] - len(self._chunks[chunk])
            parts.append(self._chunks[chunk][begin - offset : stop - offset])
            begin, chunk = stop, chunk + 1
        return np.concatenate(parts)
