"""Language models of a fixed length that carry a state from token to token.

A model of this kind tells how its state moves and what logits it gives; log-probs, sampling and
answers as an oracle follow here. States are computed once a distinct prefix, however many
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

from fastperturb.rank.ask.oracle import Tokens

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Prefixes(NamedTuple):
    """The distinct beginnings, `step` tokens long, of some sequences."""

    step: int
    states: Floats  # [distinct, d]
    numbers: Integers  # [N]: which of them each sequence begins with


class StateModel(ABC):
    """A law of sequences of `length` tokens: Pr[z | x_1..x_t] depends on a state after t tokens.

    It is a `LogitOracle` for contexts of fewer than `length` tokens.
    """

    vocab_size: int
    length: int

    @abstractmethod
    def initial_state(self) -> Floats:
        """The state before any token [d]."""

    @abstractmethod
    def advance(self, step: int, states: Floats, tokens: Integers) -> Floats:
        """States [N, d] after `step` tokens, and the next one [N], to states after it."""

    @abstractmethod
    def logits(self, step: int, states: Floats) -> Floats:
        """Logits [N, V] of the token that follows `step` others, up to a constant."""

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        """log Pr[z | h f] of all pairs of histories and futures [H, F, V], fp64."""
        contexts = [history + future for history in histories for future in futures]
        found = np.empty((len(contexts), self.vocab_size))
        for chosen, sequences in by_length(contexts):
            *_, last = self.prefixes(self._checked(sequences, self.length - 1))
            found[chosen] = _log_softmax(self.logits(last.step, last.states))[last.numbers]
        return torch.from_numpy(found).view(len(histories), len(futures), self.vocab_size)

    def logprob(self, sequences: ArrayLike) -> Floats:
        """log Pr of sequences [N, at most length], or of all that begin so where shorter: [N]."""
        tokens = self._checked(sequences, self.length)
        total = np.zeros(len(tokens))
        if tokens.shape[1] == 0:
            return total
        for step, states, numbers in self.prefixes(tokens[:, :-1]):
            total += _log_softmax(self.logits(step, states))[numbers, tokens[:, step]]
        return total

    def sample(self, count: int, *, seed: int | np.random.Generator = 0) -> Integers:
        """Sequences [count, length]."""
        if count < 0:
            raise ValueError(f"count must be a number of sequences, got {count}")
        random = np.random.default_rng(seed)
        tokens = np.empty((count, self.length), dtype=np.int64)
        states, numbers = self.initial_state()[None], np.zeros(count, dtype=np.int64)
        for step in range(self.length):
            if step > 0:
                states, numbers = self._next(step - 1, states, numbers, tokens[:, step - 1])
            below = np.exp(_log_softmax(self.logits(step, states))).cumsum(-1)[numbers]
            drawn = (below < random.random((count, 1))).sum(-1)
            tokens[:, step] = np.minimum(drawn, self.vocab_size - 1)  # sums may end below 1
        return tokens

    def prefixes(self, tokens: Integers) -> Iterator[Prefixes]:
        """Of sequences [N, n], all n + 1 lengths of beginnings in turn."""
        states, numbers = self.initial_state()[None], np.zeros(len(tokens), dtype=np.int64)
        yield Prefixes(0, states, numbers)
        for step in range(tokens.shape[1]):
            states, numbers = self._next(step, states, numbers, tokens[:, step])
            yield Prefixes(step + 1, states, numbers)

    def _next(
        self, step: int, states: Floats, numbers: Integers, tokens: Integers
    ) -> tuple[Floats, Integers]:
        """The states of prefixes one token longer, each distinct one once."""
        longer, numbers = np.unique(numbers * self.vocab_size + tokens, return_inverse=True)
        before, last = np.divmod(longer, self.vocab_size)
        return self.advance(step, states[before], last), numbers

    def _checked(self, sequences: ArrayLike, at_most: int) -> Integers:
        tokens: NDArray[Any] = np.asarray(sequences)
        if tokens.ndim != 2:
            raise ValueError(f"sequences must be [N, tokens], got shape {list(tokens.shape)}")
        if tokens.shape[1] > at_most:
            raise ValueError(
                f"this model's sequences have {self.length} tokens, so what it is asked about may "
                f"have at most {at_most}, got {tokens.shape[1]}"
            )
        if tokens.size == 0:
            return tokens.astype(np.int64)
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(wrong):
            raise ValueError(f"tokens must be from 0 to {self.vocab_size - 1}, got {wrong[0]}")
        return tokens.astype(np.int64)


def by_length(contexts: Sequence[Tokens]) -> Iterator[tuple[list[int], Integers]]:
    """Contexts of one length at a time: which they are, and their tokens [N, length]."""
    chosen: dict[int, list[int]] = {}
    for place, context in enumerate(contexts):
        chosen.setdefault(len(context), []).append(place)
    for length, places in chosen.items():
        tokens = np.array([contexts[place] for place in places])
        yield places, tokens.reshape(len(places), length)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
