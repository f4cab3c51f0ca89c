"""Packing: documents laid end to end and cut into blocks of T tokens.

A block under packing="documents" (T = 8, the n-th block, EOS written $, documents abc and defgh):

    tokens       a     b     c     $     d     e     f     g
    labels       -     b     c     $     -     e     f     g     none for a piece's first token
    positions    0     1     2     3     0     1     2     3     attention stays within a piece
    rows        8n    8n    8n    8n    8n+4  8n+4  8n+4  8n+4   row ids: the key of its noise

A piece is the part of one document that lies in one block. Under packing="stream" a block is one
piece whatever documents it holds: only its first token has no label, there are no positions, and
the row id is the number of the block. A row id is the place of a piece in the laid-out documents,
so its noise depends neither on the order of the blocks nor on the number of processes.
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
    """One batch row of T tokens, int64."""

    tokens: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T], IGNORED where there is no label
    positions: NDArray[np.int64] | None  # [T]; None under packing="stream"
    rows: NDArray[np.int64]  # [T] row ids


class Span(NamedTuple):
    """The tokens of one block; only the last span of an epoch may have fewer than T."""

    number: int  # of the block
    tokens: Tokens
    starts: NDArray[np.bool_]  # where a document begins


@dataclass(frozen=True)
class Layout:
    """The rules by which spans become blocks."""

    block_size: int
    packing: Packing
    eos: int

    def block(self, span: Span) -> Block:
        real = len(span.tokens)
        missing = (0, self.block_size - real)
        tokens = np.pad(span.tokens.astype(np.int64), missing, constant_values=self.eos)
        if self.packing == "stream":
            labels = tokens.copy()
            labels[0] = labels[real:] = IGNORED
            return Block(tokens, labels, None, np.full_like(tokens, span.number))
        starts = np.pad(span.starts, missing)
        starts[0] = starts[real : real + 1] = True  # the padding is a piece of its own
        labels = np.where(starts, IGNORED, tokens)
        labels[real:] = IGNORED
        offsets = np.arange(self.block_size)
        piece_starts = np.maximum.accumulate(np.where(starts, offsets, 0))
        rows = span.number * self.block_size + piece_starts
        return Block(tokens, labels, offsets - piece_starts, rows)


def collate(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Return the arguments of `PerturbedLM.forward` for a batch of blocks."""

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
    max_tokens: the tokens after this many are left out.
    """

    def __init__(
        self, datasets: Sequence[Dataset], layout: Layout, *, max_tokens: int | None = None
    ) -> None:
        columns = [dataset.data.column("tokens") for dataset in datasets]
        chunks = [chunk for column in columns for chunk in column.chunks]
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
        return self._layout.block(Span(number, self._tokens(begin, end), starts))

    def documents(self, number: int) -> NDArray[np.int64]:
        """Return the number of the document of each token of a block [T]; -1 for padding."""
        begin = number * self._layout.block_size
        offsets = np.arange(begin, begin + self._layout.block_size)
        numbers = np.searchsorted(self._document_starts, offsets, side="right") - 1
        return np.where(offsets < self.token_count, numbers, -1)

    def _tokens(self, begin: int, end: int) -> Tokens:
        parts = []
        chunk = bisect.bisect_right(self._chunk_ends, begin)
        while begin < end:
            stop = min(end, self._chunk_ends[chunk])
            offset = self._chunk_ends[chunk] - len(self._chunks[chunk])
            parts.append(self._chunks[chunk][begin - offset : stop - offset])
            begin, chunk = stop, chunk + 1
        return np.concatenate(parts)
