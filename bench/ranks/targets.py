"""Targets of known distribution and rank, and the distance of a model from one; tests use them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastperturb.rank import ISAN, LogitOracle, Tokens
from fastperturb.rank.ask.oracle import centred
from fastperturb.rank.learn import StateModel


def all_sequences(vocab_size: int, length: int) -> NDArray[np.int64]:
    sequences = list(itertools.product(range(vocab_size), repeat=length))
    return np.array(sequences, dtype=np.int64).reshape(len(sequences), length)


def total_variation(target: StateModel, model: StateModel, *, at_most: int = 100_000) -> float:
    """Return the distance, by enumerating up to `at_most` sequences, else by 2000 samples."""
    if target.vocab_size**target.length <= at_most:
        sequences = all_sequences(target.vocab_size, target.length)
        return 0.5 * float(
            np.abs(np.exp(target.logprob(sequences)) - np.exp(model.logprob(sequences))).sum()
        )
    return sampled_distance(target, model, target.sample(2000, seed=99))


def sampled_distance(target: StateModel, model: StateModel, sequences: NDArray[np.int64]) -> float:
    """Estimate the total variation from sequences sampled from the target."""
    ratio = np.exp(model.logprob(sequences) - target.logprob(sequences))
    return 0.5 * float(np.abs(1 - ratio).mean())


def numerical_ranks(oracle: LogitOracle, length: int) -> tuple[int, ...]:
    """Return the rank of L_t, all histories by all futures, for every t."""
    ranks = []
    for t in range(length):
        histories = [tuple(row) for row in all_sequences(oracle.vocab_size, t).tolist()]
        futures = [
            tuple(row)
            for size in range(length - t)
            for row in all_sequences(oracle.vocab_size, size).tolist()
        ]
        matrix = centred(oracle.log_probs(histories, futures)).flatten(1)
        ranks.append(int(torch.linalg.matrix_rank(matrix, rtol=1e-8)))
    return tuple(ranks)


def generic_ranks(vocab_size: int, length: int, rank: int) -> tuple[int, ...]:
    """Return the ranks that ISAN.random documents."""
    return tuple(min(rank, vocab_size**t, vocab_size ** (length - t) - 1) for t in range(length))


def uneven(vocab_size: int, length: int, rank: int, *, gain: float, seed: int) -> ISAN:
    """Make a network whose transitions stretch and shrink directions, and vary with the token."""
    random = np.random.default_rng(seed)
    transitions = [
        random.standard_normal((vocab_size, rank, rank))
        * (gain / np.sqrt(rank) * np.exp(0.3 * random.standard_normal((vocab_size, 1, 1))))
        for _ in range(length - 1)
    ]
    outputs = 1.5 * random.standard_normal((length, rank, vocab_size))
    start = random.standard_normal(rank)
    return ISAN(start / np.linalg.norm(start), transitions, list(outputs))


class Noisy:
    """An oracle whose logits have Gaussian errors that are a function of the context."""

    def __init__(self, oracle: LogitOracle, noise: float) -> None:
        self.vocab_size, self._oracle, self._noise = oracle.vocab_size, oracle, noise

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        logits = self._oracle.log_probs(histories, futures).clone()
        for row, history in enumerate(histories):
            for column, future in enumerate(futures):
                key = zlib.crc32(np.array(history + future, dtype=np.int64).tobytes())
                errors = np.random.default_rng(key).standard_normal(self.vocab_size)
                logits[row, column] += self._noise * torch.from_numpy(errors)
        return logits.log_softmax(-1)


class Recording:
    """An oracle that records the contexts it is asked about, in order."""

    def __init__(self, oracle: LogitOracle) -> None:
        self.vocab_size, self._oracle = oracle.vocab_size, oracle
        self.asked: list[Tokens] = []

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        self.asked += [history + future for history in histories for future in futures]
        return self._oracle.log_probs(histories, futures)
