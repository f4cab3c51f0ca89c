"""The head of one call, with all that its samples, chunks and passes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb import ops
from fastperturb.engine.architectures import CausalLM
from fastperturb.engine.labelled import LabelledTokens
from fastperturb.ops.head import cast_weight

IGNORED = -100


class LabelHead:
    """Log-probs of a batch's labels [B, T] from hidden states.

    Which tokens have labels is found once, and so is the weight in the dtype of autocast.
    """

    def __init__(self, parts: CausalLM, labels: Tensor) -> None:
        self._parts = parts
        # What each position predicts, and the last one nothing. Shifting labels, not hidden
        # states, saves a copy.
        self._target = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # [B T]
        self._labelled: LabelledTokens | None = None
        if _is_worth_a_wait(labels.device):
            self._labelled = LabelledTokens(self._target != IGNORED)
        self._cast: Tensor | None = None

    def log_probs(self, hidden: Tensor) -> Tensor:  # [m, B, T, D] to [m, B, T-1]
        count = len(hidden)
        log_probs = ops.linear_logprob(
            hidden.flatten(0, 2),
            self._parts.head.weight,
            self._target.repeat(count),
            labelled=self._rows(count),
            **self._options(),
        )
        return _before_last(log_probs, hidden)

    def quadratic(self, hidden: Tensor, strata: int) -> tuple[Tensor, Tensor]:
        """Return the quadratic estimator's value [B T] and each sample's log-probs [M, B, T-1]."""
        value, log_probs = ops.linear_quadratic(
            hidden.flatten(1, 2),
            self._parts.head.weight,
            self._target,
            labelled=self._rows(1),
            **self._options(),
            strata=strata,
            return_log_probs=True,
        )
        return value, _before_last(log_probs.detach(), hidden)

    def _rows(self, samples: int) -> Tensor | None:
        # Their number varies, and a graph would be compiled for each.
        if self._labelled is None or torch.compiler.is_compiling():
            return None
        return self._labelled.rows(samples)

    def _options(self) -> dict[str, Any]:
        weight = self._parts.head.weight
        if torch.compiler.is_compiling():
            return {**self._parts.head_options, "cast_weight": cast_weight(weight)}
        if self._cast is None:
            self._cast = cast_weight(weight)
        return {**self._parts.head_options, "cast_weight": self._cast}


def _before_last(log_probs: Tensor, hidden: Tensor) -> Tensor:
    # A copy: FSDP2 puts hooks on the outputs of a module, which must not be views.
    return log_probs.view(hidden.shape[:-1])[:, :, :-1].contiguous()


def _is_worth_a_wait(device: torch.device) -> bool:
    """Return whether to tell the head which tokens have labels.

    On a CPU it finds them by itself, at less cost than it takes to check what it is told. Nothing
    may wait for a stream that a CUDA graph records.
    """
    if device.type == "cpu":
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
