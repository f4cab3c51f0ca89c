"""`context_scan` in torch, for any device, with its gradient by hand: a scan the other way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb.transforms import context_states, linear_scan


def context_scan(
    inputs: Tensor,  # [B, T, H]
    retain: Tensor,  # [H]
    starts: Tensor | None,  # [B, T]
    real: Tensor | None,  # [B, T]
    initial: Tensor | None,  # [B, H]
) -> Tensor:
    return context_states(inputs, retain, starts, real, initial)


def context_scan_backward(
    grad: Tensor,  # [B, T, H]
    states: Tensor,  # [B, T, H]
    inputs: Tensor,
    retain: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of inputs and of retain."""
    first = torch.zeros_like(states[:, :1]) if initial is None else initial[:, None]
    before = torch.cat([first, states[:, :-1]], dim=1)
    kept = retain.expand_as(grad)
    if starts is not None:
        kept = kept.masked_fill(starts[..., None], 0.0)
        before = before.masked_fill(starts[..., None], 0.0)
    if real is not None:
        kept = kept.masked_fill(~real[..., None], 1.0)
    kept_after = F.pad(kept, (0, 0, 0, 1))[:, 1:]  # by the next token
    through = linear_scan(kept_after.flip(1), grad.flip(1)).flip(1)
    if real is not None:
        through = through.masked_fill(~real[..., None], 0.0)
    return (1 - retain) * through, (through * (before - inputs)).sum((0, 1))
