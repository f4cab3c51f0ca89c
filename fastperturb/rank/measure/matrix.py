"""The matrix of logits: rows are histories, columns futures and the tokens that may follow them.

    L[h, (f, z)] = log Pr[z | h f] - the mean of log Pr[. | h f] over the whole vocabulary

An oracle is asked for it block by block of histories, and a large one goes to a file, so that
memory does not grow with the number of histories.
"""

from __future__ import annotations

import math
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastperturb.rank.ask.models import ModelOracle, check_tokens
from fastperturb.rank.ask.oracle import LogitOracle, Tokens, centred

# A larger matrix goes to a file; larger answers to the pilot are asked for again, not kept.
IN_MEMORY_BYTES = 2 * 1024**3
# Log-probs that an oracle is asked for at a time: 256 MiB.
_BLOCK = 2**26
# After how many histories the most probable tokens are chosen.
_PILOT = 64


@dataclass(frozen=True, eq=False)
class LogitMatrix:
    """Centred log-probs of the next token after pairs of a history and a future.

    values: [H, F, K], of mean 0 over the whole vocabulary; a read-only map of the file, if any.
    tokens: which tokens the columns of each future are [F, K]; None is all of them, in order.
    queries: the number of different contexts h f.
    """

    values: NDArray[np.float32]
    tokens: NDArray[np.int64] | None
    histories: tuple[Tokens, ...]
    futures: tuple[Tokens, ...]
    queries: int

    def select(
        self,
        histories: slice | Sequence[int] = slice(None),
        futures: slice | Sequence[int] = slice(None),
    ) -> LogitMatrix:
        """The part of these histories and futures: a view of it by slices, a copy by numbers."""
        kept_histories, kept_futures = (
            tuple(given[index] for index in np.arange(len(given))[chosen])
            for given, chosen in ((self.histories, histories), (self.futures, futures))
        )
        return LogitMatrix(
            values=self.values[histories][:, futures],
            tokens=None if self.tokens is None else self.tokens[futures],
            histories=kept_histories,
            futures=kept_futures,
            queries=distinct_contexts(kept_histories, kept_futures),
        )


def logit_matrix(
    model: Any,
    histories: Sequence[Sequence[int]],
    futures: Sequence[Sequence[int]],
    *,
    top_k: int | NDArray[np.int64] | None = None,
    path: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> LogitMatrix:
    """The matrix of all pairs of these histories and futures.

    model: a `LogitOracle`, or what `ModelOracle` takes.
    top_k: keep so many tokens of each future, those of highest mean probability after at most 64
        evenly spaced histories, the most probable first; or which ones [F, K], as another
        matrix's `tokens` are.
    path: the .npy file to write, whole or not at all; `overwrite` one that exists. Without it a
        matrix of more than 2 GiB goes to a file that has no name and leaves with its map.
    """
    oracle = model if hasattr(model, "log_probs") else ModelOracle(model)
    rows, columns = _sequences("histories", histories), _sequences("futures", futures)
    vocab = oracle.vocab_size
    check_tokens("histories", rows, vocab)
    check_tokens("futures", columns, vocab)
    _check_top_k(top_k, len(columns), vocab)
    if path is not None and Path(path).exists() and not overwrite:
        raise FileExistsError(f"path {path} exists: name another, or set overwrite=True")
    asked = _Blocks(oracle, rows, columns)
    if top_k is None or isinstance(top_k, np.ndarray):
        tokens = top_k
    else:
        tokens = asked.likely_tokens(top_k)
    shape = (len(rows), len(columns), vocab if tokens is None else tokens.shape[1])
    blocks = asked.centred(tokens)
    if path is not None:
        values = _saved(Path(path), shape, blocks)
    elif 4 * math.prod(shape) > IN_MEMORY_BYTES:
        values = _mapped(shape, blocks)
    else:
        values = _gathered(shape, blocks)
    queries = distinct_contexts(rows, columns)
    return LogitMatrix(values, tokens, rows, columns, queries)


def distinct_contexts(histories: Sequence[Tokens], futures: Sequence[Tokens]) -> int:
    """How many different contexts h f there are."""
    rows, columns = set(histories), set(futures)
    # The futures that a beginning leaves another future of.
    begun: dict[Tokens, set[Tokens]] = {}
    for future in columns:
        for split in range(1, len(future) + 1):
            if future[split:] in columns:
                begun.setdefault(future[:split], set()).add(future)
    # A context is counted at the longest history that it has: at others it is a repetition.
    repeated: dict[Tokens, set[Tokens]] = {}
    longest = max(map(len, columns))
    for history in rows:
        for split in range(max(0, len(history) - longest), len(history)):
            if history[:split] in rows and history[split:] in begun:
                repeated.setdefault(history[:split], set()).update(begun[history[split:]])
    return len(rows) * len(columns) - sum(map(len, repeated.values()))


@dataclass
class _Blocks:
    """What an oracle is asked, a block at a time."""

    oracle: LogitOracle
    histories: tuple[Tokens, ...]
    futures: tuple[Tokens, ...]
    # Answers of the pilot, by history and first future.
    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def likely_tokens(self, count: int) -> NDArray[np.int64]:
        """The most probable tokens of each future [F, count], by their mean over a pilot."""
        total = min(_PILOT, len(self.histories))
        pilot = [index * len(self.histories) // total for index in range(total)]
        keeps = 4 * total * len(self.futures) * self.oracle.vocab_size <= IN_MEMORY_BYTES
        found = []
        for columns in self._columns():
            sums = torch.zeros(())
            for first in range(0, total, self._height()):
                rows = pilot[first : first + self._height()]
                answers = self._answers(rows, columns)
                sums = answers.exp().sum(0) + sums.to(answers.device)
                if keeps:
                    self._known.update(
                        {(row, columns.start): each for row, each in zip(rows, answers)}
                    )
            found.append(sums.topk(count).indices.cpu())
        return torch.cat(found).numpy()

    def centred(self, tokens: NDArray[np.int64] | None) -> Iterator[NDArray[np.float32]]:
        """The values in the order of the matrix: all columns of some histories, or some of one."""
        for first in range(0, len(self.histories), self._height()):
            rows = range(first, min(first + self._height(), len(self.histories)))
            for columns in self._columns():
                values = centred(self._answers(rows, columns))
                if tokens is not None:
                    chosen = torch.as_tensor(tokens[columns], device=values.device)
                    values = values.gather(-1, chosen.expand(len(rows), -1, -1))
                if not values.isfinite().all():
                    row, column = (~values.isfinite().all(-1)).nonzero()[0].tolist()
                    raise ValueError(
                        f"after histories[{rows[row]}] and futures[{columns.start + column}] the "
                        "oracle gives tokens a probability of 0 or none, and log-probs must be "
                        "finite to have a mean"
                    )
                yield values.float().cpu().numpy()

    def _answers(self, rows: Sequence[int], columns: slice) -> Tensor:
        known = [self._known.pop((row, columns.start), None) for row in rows]
        unknown = [self.histories[row] for row, answer in zip(rows, known) if answer is None]
        each: Iterator[Tensor] = iter(())
        if unknown:
            asked = self.oracle.log_probs(unknown, self.futures[columns])
            if len(unknown) == len(rows):
                return asked
            each = iter(asked)
        return torch.stack([next(each) if answer is None else answer for answer in known])

    def _height(self) -> int:
        """How many histories a block has."""
        return max(1, _BLOCK // (len(self.futures) * self.oracle.vocab_size))

    def _columns(self) -> list[slice]:
        """The futures of each block of one history."""
        width = max(1, _BLOCK // self.oracle.vocab_size)
        starts = range(0, len(self.futures), width)
        return [slice(start, min(start + width, len(self.futures))) for start in starts]


def _sequences(name: str, given: Sequence[Sequence[int]]) -> tuple[Tokens, ...]:
    try:
        return tuple(tuple(operator.index(token) for token in tokens) for tokens in given)
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence of sequences of token ids: {error}") from error


def _check_top_k(top_k: int | NDArray[np.int64] | None, futures: int, vocab: int) -> None:
    if isinstance(top_k, np.ndarray):
        if top_k.ndim != 2 or len(top_k) != futures or top_k.dtype != np.int64 or not top_k.size:
            raise ValueError(
                f"top_k must be tokens [F, K] of int64 for F = {futures} futures, got "
                f"{top_k.dtype} {list(top_k.shape)}"
            )
        check_tokens("top_k", top_k.tolist(), vocab)
    elif top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocab):
        raise ValueError(
            f"top_k must be None, from 1 to the vocabulary's {vocab}, or an array of tokens, got "
            f"{top_k}"
        )


def _gathered(shape: tuple[int, ...], blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    values = np.empty(math.prod(shape), dtype=np.float32)
    start = 0
    for block in blocks:
        values[start : start + block.size] = block.ravel()
        start += block.size
    return values.reshape(shape)


def _mapped(shape: tuple[int, ...], blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    # Written, not stored into a map, whose pages would count as this process's memory.
    with tempfile.TemporaryFile() as file:
        for block in blocks:
            block.tofile(file)
        return np.memmap(file, np.float32, "r", shape=shape)


def _saved(
    path: Path, shape: tuple[int, ...], blocks: Iterable[NDArray[np.float32]]
) -> NDArray[np.float32]:
    partial = path.with_name(f".{path.name}.partial")
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                block.tofile(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")
