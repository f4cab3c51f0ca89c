"""The matrix of logits: rows are histories, columns futures and the tokens that may follow them.

    L[h, (f, z)] = log Pr[z | h f] - the mean of log Pr[. | h f] over the whole vocabulary

An oracle is asked for one block of histories at a time, and a large matrix goes to a file, so that
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

from fastperturb.rank.ask.model_oracle import ModelOracle
from fastperturb.rank.ask.oracle import LogitOracle, centred, check_tokens
from fastperturb.rank.types import Integers, Tokens

# A larger matrix goes to a file; larger answers to the pilot are asked for again, not kept.
IN_MEMORY_BYTES = 2 * 1024**3
# Log-probs that an oracle is asked for at a time: 256 MiB.
_BLOCK = 2**26
# The number of histories from which the most probable tokens are chosen.
_PILOT = 64


@dataclass(frozen=True, eq=False)
class LogitMatrix:
    """Centred log-probs of the next token after pairs of a history and a future.

    values: [H, F, K], of mean 0 over the whole vocabulary; a read-only map of the file, if any.
    tokens: the tokens of each future's columns [F, K]; None is all of them, in order.
    queries: the number of different contexts h f.
    """

    values: NDArray[np.float32]
    tokens: Integers | None
    histories: tuple[Tokens, ...]
    futures: tuple[Tokens, ...]
    queries: int

    def select(
        self,
        histories: slice | Sequence[int] = slice(None),
        futures: slice | Sequence[int] = slice(None),
    ) -> LogitMatrix:
        """Return the part of some histories and futures: a view for slices, a copy for indices."""
        kept_histories, kept_futures = (
            tuple(sequences[index] for index in np.arange(len(sequences))[kept])
            for sequences, kept in ((self.histories, histories), (self.futures, futures))
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
    top_k: int | Integers | None = None,
    path: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> LogitMatrix:
    """Ask a model about all pairs of these histories and futures.

    model: a `LogitOracle`, or a model that `ModelOracle` takes.
    top_k: the number of tokens to keep for each future, those of highest mean probability after at
        most 64 evenly spaced histories, the most probable first; or the tokens themselves [F, K],
        such as another matrix's `tokens`.
    path: the .npy file to write, whole or not at all; `overwrite` one that exists. Without a path,
        a matrix of more than 2 GiB goes to a file without a name, which is gone once the matrix is.
    """
    oracle = model if hasattr(model, "log_probs") else ModelOracle(model)
    rows, columns = _sequences("histories", histories), _sequences("futures", futures)
    vocab = oracle.vocab_size
    check_tokens("histories", rows, vocab)
    check_tokens("futures", columns, vocab)
    _check_top_k(top_k, len(columns), vocab)
    if path is not None and Path(path).exists() and not overwrite:
        raise FileExistsError(f"path {path} exists: name another, or set overwrite=True")
    questions = _Questions(oracle, rows, columns)
    if top_k is None or isinstance(top_k, np.ndarray):
        tokens = top_k
    else:
        tokens = questions.likely_tokens(top_k)
    shape = (len(rows), len(columns), vocab if tokens is None else tokens.shape[1])
    blocks = questions.centred_logits(tokens)
    if path is not None:
        values = _in_file(Path(path), shape, blocks)
    elif 4 * math.prod(shape) > IN_MEMORY_BYTES:
        values = _in_unnamed_file(shape, blocks)
    else:
        values = _in_memory(shape, blocks)
    queries = distinct_contexts(rows, columns)
    return LogitMatrix(values, tokens, rows, columns, queries)


def distinct_contexts(histories: Sequence[Tokens], futures: Sequence[Tokens]) -> int:
    """Count the different contexts h f."""
    rows, columns = set(histories), set(futures)
    # For each beginning, the futures that it starts and whose rest is a future too.
    starts: dict[Tokens, set[Tokens]] = {}
    for future in columns:
        for split in range(1, len(future) + 1):
            if future[split:] in columns:
                starts.setdefault(future[:split], set()).add(future)
    # A context is counted at the longest history that it has: at others it is a repetition.
    repeated: dict[Tokens, set[Tokens]] = {}
    longest = max(map(len, columns))
    for history in rows:
        for split in range(max(0, len(history) - longest), len(history)):
            if history[:split] in rows and history[split:] in starts:
                repeated.setdefault(history[:split], set()).update(starts[history[split:]])
    return len(rows) * len(columns) - sum(map(len, repeated.values()))


@dataclass
class _Questions:
    """Questions about all pairs, asked one block of histories and futures at a time."""

    oracle: LogitOracle
    histories: tuple[Tokens, ...]
    futures: tuple[Tokens, ...]
    # Answers of the pilot, by history and first future.
    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def likely_tokens(self, count: int) -> Integers:
        """Choose the most probable tokens of each future [F, count], by their mean over a pilot."""
        total = min(_PILOT, len(self.histories))
        pilot = [index * len(self.histories) // total for index in range(total)]
        keep = 4 * total * len(self.futures) * self.oracle.vocab_size <= IN_MEMORY_BYTES
        tokens = []
        for columns in self._columns():
            sums = torch.zeros(())
            for first in range(0, total, self._height()):
                rows = pilot[first : first + self._height()]
                answers = self._answers(rows, columns)
                sums = answers.exp().sum(0) + sums.to(answers.device)
                if keep:
                    self._known |= zip(((row, columns.start) for row in rows), answers)
            tokens.append(sums.topk(count).indices.cpu())
        return torch.cat(tokens).numpy()

    def centred_logits(self, tokens: Integers | None) -> Iterator[NDArray[np.float32]]:
        """Yield values in the matrix's order: all columns of some histories, or some of one."""
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
                        f"log-probs must be finite to have a mean, but after "
                        f"histories[{rows[row]}] and futures[{columns.start + column}] the oracle "
                        "gives some token a probability of 0, or NaN"
                    )
                yield values.float().cpu().numpy()

    def _answers(self, rows: Sequence[int], columns: slice) -> Tensor:
        """Return log-probs of these histories and futures, asking for those that are not known."""
        known = [self._known.pop((row, columns.start), None) for row in rows]
        unknown = [self.histories[row] for row, answer in zip(rows, known) if answer is None]
        new: Iterator[Tensor] = iter(())
        if unknown:
            answers = self.oracle.log_probs(unknown, self.futures[columns])
            if len(unknown) == len(rows):
                return answers
            new = iter(answers)
        return torch.stack([next(new) if answer is None else answer for answer in known])

    def _height(self) -> int:
        """Return the number of histories in a block."""
        return max(1, _BLOCK // (len(self.futures) * self.oracle.vocab_size))

    def _columns(self) -> list[slice]:
        """Return the futures of each block of one history."""
        width = max(1, _BLOCK // self.oracle.vocab_size)
        starts = range(0, len(self.futures), width)
        return [slice(start, min(start + width, len(self.futures))) for start in starts]


def _sequences(name: str, sequences: Sequence[Sequence[int]]) -> tuple[Tokens, ...]:
    try:
        return tuple(tuple(operator.index(token) for token in tokens) for tokens in sequences)
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence of sequences of token ids: {error}") from error


def _check_top_k(top_k: int | Integers | None, futures: int, vocab: int) -> None:
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


def _in_memory(
    shape: tuple[int, ...], blocks: Iterable[NDArray[np.float32]]
) -> NDArray[np.float32]:
    values = np.empty(math.prod(shape), dtype=np.float32)
    start = 0
    for block in blocks:
        values[start : start + block.size] = block.ravel()
        start += block.size
    return values.reshape(shape)


def _in_unnamed_file(
    shape: tuple[int, ...], blocks: Iterable[NDArray[np.float32]]
) -> NDArray[np.float32]:
    # Written, not stored into a map, whose pages would count as this process's memory.
    with tempfile.TemporaryFile() as file:
        for block in blocks:
            block.tofile(file)
        return np.memmap(file, np.float32, "r", shape=shape)


def _in_file(
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
