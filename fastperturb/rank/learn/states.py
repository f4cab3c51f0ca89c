"""Language models of a fixed length that carry a state from token to token.

A subclass defines how its state advances and the logits of a state; this module adds log-probs,
sampling and answers as an oracle. A state is computed once for each distinct prefix, however many
sequences share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastperturb.rank.types import Floats, Integers, Tokens


class Prefixes(NamedTuple):
    """The distinct prefixes, `step` tokens long, of some sequences."""

    step: int
    states: Floats  # [distinct, d]
    numbers: Integers  # [N]: the index of each sequence's prefix


class StateModel(ABC):
    """A distribution of sequences of `length` tokens, each predicted from a state.

    It is a `LogitOracle` for contexts of fewer than `length` tokens.
    """

    vocab_size: int
    length: int

    @abstractmethod
    def initial_state(self) -> Floats:
        """Return the state before any token [d]."""

    @abstractmethod
    def advance(self, step: int, states: Floats, tokens: Integers) -> Floats:
        """Return the states after one more token each [N], given states [N, d] after `step`."""

    @abstractmethod
    def logits(self, step: int, states: Floats) -> Floats:
        """Return logits [N, V] of the token that follows `step` others, up to a constant."""

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        """Return log Pr[z | h f] of all pairs of histories and futures [H, F, V] in fp64."""
        contexts = [history + future for history in histories for future in futures]
        log_probs = np.empty((len(contexts), self.vocab_size))
        for indices, sequences in by_length(contexts):
            *_, last = self.prefixes(self._checked(sequences, self.length - 1))
            log_probs[indices] = _log_softmax(self.logits(last.step, last.states))[last.numbers]
        return torch.from_numpy(log_probs).view(len(histories), len(futures), self.vocab_size)

    def logprob(self, sequences: ArrayLike) -> Floats:
        """Return log Pr [N] of sequences [N, at most length]; shorter ones stand for a prefix."""
        tokens = self._checked(sequences, self.length)
        total = np.zeros(len(tokens))
        if tokens.shape[1] == 0:
            return total
        for step, states, numbers in self.prefixes(tokens[:, :-1]):
            total += _log_softmax(self.logits(step, states))[numbers, tokens[:, step]]
        return total

    def sample(self, count: int, *, seed: int | np.random.Generator = 0) -> Integers:
        """Sample sequences [count, length]."""
        if count < 0:
            raise ValueError(f"count must be a number of sequences, got {count}")
        random = np.random.default_rng(seed)
        tokens = np.empty((count, self.length), dtype=np.int64)
        states, numbers = self.initial_state()[None], np.zeros(count, dtype=np.int64)
        for step in range(self.length):
            if step > 0:
                states, numbers = self._next(step - 1, states, numbers, tokens[:, step - 1])
            cumulative = np.exp(_log_softmax(self.logits(step, states))).cumsum(-1)[numbers]
            sampled = (cumulative < random.random((count, 1))).sum(-1)
            tokens[:, step] = np.minimum(sampled, self.vocab_size - 1)  # sums may end below 1
        return tokens

    def prefixes(self, tokens: Integers) -> Iterator[Prefixes]:
        """Yield the prefixes of sequences [N, n], of all n + 1 lengths in turn."""
        states, numbers = self.initial_state()[None], np.zeros(len(tokens), dtype=np.int64)
        yield Prefixes(0, states, numbers)
        for step in range(tokens.shape[1]):
            states, numbers = self._next(step, states, numbers, tokens[:, step])
            yield Prefixes(step + 1, states, numbers)

    def _next(
        self, step: int, states: Floats, numbers: Integers, tokens: Integers
    ) -> tuple[Floats, Integers]:
        """Return the states of prefixes one token longer, and each sequence's index into them."""
        longer, numbers = np.unique(numbers * self.vocab_size + tokens, return_inverse=True)
        before, last = np.divmod(longer, self.vocab_size)
        return self.advance(step, states[before], last), numbers

    def _checked(self, sequences: ArrayLike, at_most: int) -> Integers:
        tokens: NDArray[Any] = np.asarray(sequences)
        if tokens.ndim != 2:
            raise ValueError(f"sequences must be [N, tokens], got shape {list(tokens.shape)}")
        if tokens.shape[1] > at_most:
            raise ValueError(
                f"this model's sequences have {self.length} tokens, so the tokens given may be at "
                f"most {at_most}, got {tokens.shape[1]}"
            )
        if tokens.size == 0:
            return tokens.astype(np.int64)
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        invalid = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(invalid):
            raise ValueError(f"tokens must be from 0 to {self.vocab_size - 1}, got {invalid[0]}")
        return tokens.astype(np.int64)


def by_length(contexts: Sequence[Tokens]) -> Iterator[tuple[list[int], Integers]]:
    """Yield the contexts of each length: their indices, and their tokens [N, length]."""
    indices_of: dict[int, list[int]] = {}
    for index, context in enumerate(contexts):
        indices_of.setdefault(len(context), []).append(index)
    for length, indices in indices_of.items():
        tokens = np.array([contexts[index] for index in indices])
        yield indices, tokens.reshape(len(indices), length)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
