"""A pass: some samples of a batch through perturbation, trunk and head, and its result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pass(NamedTuple):
    """The result of running some samples of a batch."""

    shift_norms: Tensor  # [B, T], the sum over these samples of |T(e) - e|
    log_probs: Tensor | None = None  # [m, B, T-1]
    hidden: Tensor | None = None  # [m, B, T, D], for the quadratic estimator
    log_weights: Tensor | None = None  # [m, B, T-1], of a proposal, to be added to log_probs
    log_sum: Tensor | None = None  # [B, T, V], log of the summed probabilities, on request

    def weighted_log_probs(self) -> Tensor:
        """Return the log-probs [m, B, T-1] with the weights of a proposal."""
        assert self.log_probs is not None
        return self.log_probs if self.log_weights is None else self.log_probs + self.log_weights


# Runs the samples with these numbers, [m] or [m, B].
Run = Callable[[Tensor], Pass]


def joined(parts: list[Pass]) -> Pass:
    """Return one pass of all samples from passes of consecutive parts."""

    def over(combine: Callable[[list[Tensor]], Tensor], name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else combine(values)

    return Pass(
        functools.reduce(torch.add, [part.shift_norms for part in parts]),
        over(torch.cat, "log_probs"),
        over(torch.cat, "hidden"),
        over(torch.cat, "log_weights"),
        over(lambda values: functools.reduce(torch.logaddexp, values), "log_sum"),
    )
