"""`context_scan` by the C++ kernel of `csrc/context_scan.cpp`, for CPUs: many entries in SIMD."""

from __future__ import annotations

import torch
from torch import Tensor


def context_scan(
    inputs: Tensor,  # [B, T, H] fp32, contiguous; so are all others
    retain: Tensor,  # [H]
    starts: Tensor | None,  # [B, T]
    real: Tensor | None,  # [B, T]
    initial: Tensor | None,  # [B, H]
) -> Tensor:
    states = torch.empty_like(inputs)
    torch.ops.fastperturb_cpp.context_scan(states, inputs, retain, starts, real, initial)
    return states


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
    grad_inputs = torch.empty_like(inputs)
    grad_retain = inputs.new_empty((len(inputs), inputs.shape[-1]))
    torch.ops.fastperturb_cpp.context_scan_backward(
        grad_inputs, grad_retain, grad, states, inputs, retain, starts, real, initial
    )
    return grad_inputs, grad_retain.sum(0)
