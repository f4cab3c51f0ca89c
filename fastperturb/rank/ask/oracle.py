"""What every question about logits is asked of: the law of the next token after history + future.

A history and a future are tuples of token ids, and an oracle answers for all pairs of several of
both, so that one that encodes histories can do each once. `rank.models.ModelOracle` is a language
model; `FunctionOracle` any function of a context, an API say; `rank.isan.ISAN` a target of known
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Tokens = tuple[int, ...]


class LogitOracle(Protocol):
    """Tells log Pr[z | h f] of every next token z."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        """log Pr[z | h f], normalised, of all pairs of histories and futures [H, F, V]."""
        ...


class FunctionOracle:
    """An oracle that is a plain function of the context h f, called once for each that is new.

    function: logits or log-probs of every next token [V], up to a constant. An API that tells the
        likeliest ones only is no such function: all of V must have some finite log-prob.
    """

    def __init__(self, function: Callable[[Tokens], Any], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._function = function

    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        contexts = [history + future for history in histories for future in futures]
        told = {context: self._logits(context) for context in dict.fromkeys(contexts)}
        found = [told[context] for context in contexts]
        shape = (len(histories), len(futures), self.vocab_size)
        return torch.stack(found).log_softmax(-1).view(shape)

    def _logits(self, context: Tokens) -> Tensor:
        logits = torch.as_tensor(self._function(context), dtype=torch.float64)
        if logits.shape != (self.vocab_size,):
            raise ValueError(
                f"function must return [V] = [{self.vocab_size}] logits, got "
                f"{list(logits.shape)} after {context}"
            )
        return logits


class QueryBudgetSpent(RuntimeError):
    """A question that the budget does not cover; nothing of it was asked.

    learned: what `rank.learn` had by then, None elsewhere.
    """

    learned: Any = None


class Metered:
    """An oracle that counts what it is asked: a query is one context, answered for all of V.

    budget: how many queries it answers; None is no limit.
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

    def charge(self, asked: int) -> None:
        """Count queries that are about to be asked, or refuse them."""
        if self.budget is not None and self.queries + asked > self.budget:
            raise QueryBudgetSpent(
                f"the query budget is spent: {self.queries} of {self.budget} were asked, and the "
                f"next step needs {asked}; raise budget, or take fewer histories and futures"
            )
        self.queries += asked


def centred(log_probs: Tensor) -> Tensor:
    """Log-probs less their mean over the vocabulary: logits whatever their constant was."""
    return log_probs - log_probs.mean(-1, keepdim=True)
