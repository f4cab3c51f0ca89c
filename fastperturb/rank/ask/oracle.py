"""Oracles: they answer with log-probs of the next token after a history and a future.

A history and a future are tuples of token ids, and the context is one followed by the other. An
oracle is asked about all pairs of several histories and futures at once, so that it can encode each
history once. `ModelOracle` is a language model, `FunctionOracle` any function of a context (an API,
say), and `learn.ISAN` a target of known rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastperturb.rank.types import Tokens


class LogitOracle(Protocol):
    """Answers with log Pr[z | h f] of every next token z after history h and future f."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens V that the oracle knows."""
        ...

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        """Return log Pr[z | h f], normalised, of all pairs of histories and futures [H, F, V]."""
        ...


class FunctionOracle:
    """An oracle that calls a plain function of the context h f, once for each distinct context.

    function: returns logits or log-probs of every next token [V], up to a constant. An API that
        returns only the likeliest tokens will not do: every token needs a finite log-prob.
    """

    def __init__(self, function: Callable[[Tokens], Any], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._function = function

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        contexts = [history + future for history in histories for future in futures]
        logits = {context: self._logits(context) for context in dict.fromkeys(contexts)}
        shape = (len(histories), len(futures), self.vocab_size)
        return torch.stack([logits[context] for context in contexts]).log_softmax(-1).view(shape)

    def _logits(self, context: Tokens) -> Tensor:
        logits = torch.as_tensor(self._function(context), dtype=torch.float64)
        if logits.shape != (self.vocab_size,):
            raise ValueError(
                f"function must return [V] = [{self.vocab_size}] logits, got "
                f"{list(logits.shape)} after {context}"
            )
        return logits


class QueryBudgetSpent(RuntimeError):
    """Raised for a question that exceeds the query budget, before any part of it is asked.

    learned: the model that `rank.learn` had by then; None elsewhere.
    """

    learned: Any = None


class Metered:
    """An oracle that counts queries; a query is one distinct context, answered for all of V.

    budget: the largest number of queries that it answers; None is no limit.
    """

    def __init__(self, oracle: LogitOracle, budget: int | None = None) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"budget must be a number of queries or None, got {budget}")
        self.oracle, self.budget, self.queries = oracle, budget, 0

    @property
    def vocab_size(self) -> int:
        return self.oracle.vocab_size

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        self.charge(len({history + future for history in histories for future in futures}))
        return self.oracle.log_probs(histories, futures)

    def charge(self, queries: int) -> None:
        """Count queries that are about to be asked; raise if they exceed the budget."""
        if self.budget is not None and self.queries + queries > self.budget:
            raise QueryBudgetSpent(
                f"the query budget is spent: {self.queries} of {self.budget} were asked, and the "
                f"next step needs {queries}; raise budget, or take fewer histories and futures"
            )
        self.queries += queries


def centred(log_probs: Tensor) -> Tensor:
    """Subtract the mean over the vocabulary, which makes logits independent of their constant."""
    return log_probs - log_probs.mean(-1, keepdim=True)


def check_tokens(name: str, sequences: Sequence[Tokens], vocab_size: int) -> None:
    """Raise unless there is a sequence and all hold token ids below `vocab_size`."""
    if not len(sequences):
        raise ValueError(f"{name} must hold at least one sequence of tokens, which may be empty")
    for number, tokens in enumerate(sequences):
        invalid = [token for token in tokens if not 0 <= token < vocab_size]
        if invalid:
            raise ValueError(
                f"{name} must hold token ids in [0, {vocab_size}), got {invalid[0]} in the "
                f"sequence numbered {number}"
            )
