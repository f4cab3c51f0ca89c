"""linear_logprob and linear_quadratic: the vocabulary head whose logits are never kept.

    logits = (hidden weight^T + bias) * logit_scale, then softcap * tanh(logits / softcap)

Values come back in fp32 (fp64 for fp64 inputs). Rows whose target is `ignore_index` give 0 and
no gradient; a target out of range raises on a CPU and makes its row NaN on a GPU, where raising
would cost a synchronisation. Weight and bias get gradients only where they require them.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastperturb.ops import dispatch, reference


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """log softmax(logits)[target], row by row: hidden [N, D], weight [V, D], target [N] -> [N].

    bias: [V]. valid_vocab: only the first so many rows of weight are words (padded vocabulary).
    """
    valid_vocab = _check_head(hidden, weight, target, bias, softcap, valid_vocab, "[N, D]")
    return torch.ops.fastperturb.linear_logprob(
        hidden, weight, target, bias, float(logit_scale), softcap, valid_vocab, ignore_index
    )


@overload
def linear_quadratic(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    return_log_probs: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_quadratic(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    return_log_probs: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_quadratic(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    return_log_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The unbiased quadratic equation over M >= 2 independent draws: hidden [M, N, D] -> [N].

        2/M sum_m p_m(y) - 1/(M(M-1)) sum_{i != j} <p_i, p_j>

    The other arguments are those of `linear_logprob`. `return_log_probs` adds the log-probs
    [M, N] of the targets, differentiable too, from the same pass.
    """
    valid_vocab = _check_head(hidden, weight, target, bias, softcap, valid_vocab, "[M, N, D]")
    if hidden.shape[0] < 2:
        raise ValueError(
            f"hidden must hold M >= 2 independent samples for the quadratic equation, "
            f"got {list(hidden.shape)}"
        )
    value, log_probs = torch.ops.fastperturb.linear_quadratic(
        hidden, weight, target, bias, float(logit_scale), softcap, valid_vocab, ignore_index
    )
    return (value, log_probs) if return_log_probs else value


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    valid_vocab: int | None,
    layout: str,
) -> int:
    """Validate a head's arguments and return the number of words."""
    if not hidden.is_floating_point() or hidden.ndim != layout.count(",") + 1:
        raise ValueError(
            f"hidden must be floating point {layout}, got {hidden.dtype} {list(hidden.shape)}"
        )
    if not weight.is_floating_point() or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be floating point [V, D] with D = {hidden.shape[-1]} as in hidden, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if target.dtype != torch.int64 or target.shape != hidden.shape[-2:-1]:
        raise ValueError(
            f"target must be int64 [N] = {list(hidden.shape[-2:-1])}, "
            f"got {target.dtype} {list(target.shape)}"
        )
    vocab = weight.shape[0]
    if bias is not None and (not bias.is_floating_point() or bias.shape != (vocab,)):
        raise ValueError(
            f"bias must be floating point [V] = [{vocab}], got {bias.dtype} {list(bias.shape)}"
        )
    for name, value in (("weight", weight), ("target", target), ("bias", bias)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} lies on {value.device} and hidden on {hidden.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap!r}")
    if valid_vocab is None:
        return vocab
    if not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab must lie in [1, V = {vocab}], got {valid_vocab!r}")
    return valid_vocab


@torch.library.custom_op("fastperturb::linear_logprob", mutates_args=())
def _logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
) -> Tensor:
    implementation = dispatch.implementation("linear_logprob", hidden)
    with dispatch.full_precision(hidden.device):
        return implementation.linear_logprob(
            hidden, weight, target, bias, logit_scale, softcap, valid_vocab, ignore_index
        )


@torch.library.custom_op("fastperturb::linear_logprob_backward", mutates_args=())
def _logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    arguments = (grad, hidden, weight, target, bias, logit_scale, softcap)
    implementation = dispatch.implementation("linear_logprob", hidden)
    with dispatch.full_precision(hidden.device):
        return implementation.linear_logprob_backward(
            *arguments, valid_vocab, ignore_index, want_weight, want_bias
        )


@torch.library.custom_op("fastperturb::linear_quadratic", mutates_args=())
def _quadratic(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    implementation = dispatch.implementation("linear_quadratic", hidden)
    with dispatch.full_precision(hidden.device):
        return implementation.linear_quadratic(
            hidden, weight, target, bias, logit_scale, softcap, valid_vocab, ignore_index
        )


@torch.library.custom_op("fastperturb::linear_quadratic_backward", mutates_args=())
def _quadratic_backward(
    grad: Tensor,
    grad_log_probs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    arguments = (grad, grad_log_probs, hidden, weight, target, bias, logit_scale, softcap)
    implementation = dispatch.implementation("linear_quadratic", hidden)
    with dispatch.full_precision(hidden.device):
        return implementation.linear_quadratic_backward(
            *arguments, valid_vocab, ignore_index, want_weight, want_bias
        )


@_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, *options: Any) -> Tensor:
    return hidden.new_empty(target.shape, dtype=reference.accumulate(hidden, weight))


@_quadratic.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate(hidden, weight)
    shapes = target.shape, hidden.shape[:2]
    return hidden.new_empty(shapes[0], dtype=dtype), hidden.new_empty(shapes[1], dtype=dtype)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, want_weight: bool, want_bias: bool
) -> list[Tensor]:
    like_bias = weight if bias is None else bias
    return [
        torch.empty_like(hidden),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
        torch.empty_like(like_bias) if want_bias else like_bias.new_empty(0),
    ]


@_logprob_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    return _fake_gradients(hidden, weight, bias, *options[-2:])


@_quadratic_backward.register_fake
def _(
    grad: Tensor,
    grad_log_probs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    return _fake_gradients(hidden, weight, bias, *options[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    hidden, weight, target, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, target, bias)


def _input_gradients(ctx: Any, op: Any, *upstream: Tensor) -> tuple[Any, ...]:
    want_weight, want_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    hidden, weight, bias = op(*upstream, *ctx.saved_tensors, *ctx.options, want_weight, want_bias)
    grads = (hidden, weight if want_weight else None, None, bias if want_bias else None)
    return (*grads, *[None] * len(ctx.options))


_logprob.register_autograd(
    lambda ctx, grad: _input_gradients(ctx, torch.ops.fastperturb.linear_logprob_backward, grad),
    setup_context=_setup_context,
)
_quadratic.register_autograd(
    lambda ctx, grad, grad_log_probs: _input_gradients(
        ctx, torch.ops.fastperturb.linear_quadratic_backward, grad, grad_log_probs
    ),
    setup_context=_setup_context,
)
