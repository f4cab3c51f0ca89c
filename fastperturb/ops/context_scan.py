"""context_scan: the state of a context transform at every token, as one registered op.

    h_t = a h_(t-1) + (1 - a) x_t    at a real token; h_(t-1) counts as 0 where a document starts
    h_t = h_(t-1)                    elsewhere

The gradient is a scan the other way. Both are in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperturb.ops import dispatch


def context_scan(
    inputs: Tensor,
    retain: Tensor,
    *,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """Return the states h [B, T, H] of inputs x [B, T, H].

    retain: a [H], each from 0 to 1.
    starts, real: bool [B, T], where documents start (default nowhere) and where there is a token
        (default everywhere).
    initial: h [B, H] before the first position, without gradient; default 0.
    """
    _check(inputs, retain, starts, real, initial)
    dispatch.reject_forward_mode("context_scan", inputs, retain)
    arguments = (starts, real, None if initial is None else initial.detach())
    return torch.ops.fastperturb.context_scan(inputs, retain, *arguments)


def _check(
    inputs: Tensor,
    retain: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
) -> None:
    if inputs.dtype not in (torch.float32, torch.float64) or inputs.ndim != 3:
        raise ValueError(
            f"inputs must be float32 [B, T, H], got {inputs.dtype} {list(inputs.shape)}"
        )
    B, T, H = inputs.shape
    of_inputs, of_masks = inputs.dtype, torch.bool
    for name, value, shape, dtype in (
        ("retain", retain, (H,), of_inputs),
        ("starts", starts, (B, T), of_masks),
        ("real", real, (B, T), of_masks),
        ("initial", initial, (B, H), of_inputs),
    ):
        if value is None:
            continue
        if value.shape != shape or value.dtype != dtype or value.device != inputs.device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {inputs.device}, got {value.dtype} "
                f"{list(value.shape)} on {value.device}"
            )


@torch.library.custom_op("fastperturb::context_scan", mutates_args=())
def _op(
    inputs: Tensor,
    retain: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
) -> Tensor:
    if not inputs.numel():
        return torch.empty_like(inputs)
    run = dispatch.implementation("context_scan", inputs.device, inputs.dtype)
    return run.context_scan(*map(_dense, (inputs, retain, starts, real, initial)))


@torch.library.custom_op("fastperturb::context_scan_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    states: Tensor,
    inputs: Tensor,
    retain: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not inputs.numel():
        return torch.empty_like(inputs), torch.zeros_like(retain)
    run = dispatch.implementation("context_scan", inputs.device, inputs.dtype)
    arguments = map(_dense, (grad, states, inputs, retain, starts, real, initial))
    return run.context_scan_backward(*arguments)


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


@_op.register_fake
def _(inputs: Tensor, *others: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape)


@_op_backward.register_fake
def _(
    grad: Tensor, states: Tensor, inputs: Tensor, retain: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(inputs.shape), retain.new_empty(retain.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("context_scan has no second derivative: leave create_graph=False")
    return *torch.ops.fastperturb.context_scan_backward(grad, *ctx.saved_tensors), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
