"""The heads as registered ops: forward, backward, shapes for tracing, autograd.

Each op takes the fields of a `HeadCall` and a few arguments of its own; see the schemas. A
registered op returns tensors only, so an output that is not wanted is empty.

With `want_grad_hidden` the forward also makes the gradient with respect to hidden, up to each
token's upstream gradient, and the backward is a product. Otherwise the backward is an op of its
own, which makes the logits again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastperturb.ops import dispatch, head_blocks, head_gradients, reference
from fastperturb.ops.calls import HeadCall, empty_grad_hidden, schema
from fastperturb.ops.head_blocks import Head
from fastperturb.ops.head_geometry import Geometry
from fastperturb.ops.head_gradients import Wanted
from fastperturb.ops.head_labels import Labels

_CALL = schema(HeadCall)
_TENSORS = 6  # fields of a HeadCall, which come first
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"

_checkpointing = threading.local()


@contextlib.contextmanager
def without_grad_hidden() -> Iterator[None]:
    """Skip linear_logprob's grad_hidden in the first pass of a checkpointed region.

    Only the second pass is differentiated. In the first, NaN that takes no memory fills its place.
    """
    before = getattr(_checkpointing, "first_pass", False)
    _checkpointing.first_pass = True
    try:
        yield
    finally:
        _checkpointing.first_pass = before


@torch.library.custom_op(
    "fastperturb::linear_logprob",
    mutates_args=(),
    schema=f"({_CALL}, bool want_grad_hidden, bool want_entropy) -> "
    "(Tensor log_probs, Tensor lse, Tensor hit, Tensor entropy, Tensor grad_hidden)",
)
def logprob(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, want_grad_hidden, want_entropy = arguments
    call = HeadCall(*fields)
    _check_targets(call)
    first_pass = want_grad_hidden and getattr(_checkpointing, "first_pass", False)
    with dispatch.full_precision(call.hidden.device):
        result = head_blocks.linear_logprob(
            _head("linear_logprob", call),
            call.hidden,
            _labels(call),
            want_grad_hidden=want_grad_hidden and not first_pass,
            want_entropy=want_entropy,
        )
    grad_hidden = _or_empty(result.grad_hidden, call.hidden)
    if first_pass:
        nan = empty_grad_hidden(call.hidden[:0]).new_full((), torch.nan)
        grad_hidden = nan.expand(call.hidden.shape)
    entropy = _or_empty(result.entropy, call.hidden)
    return result.log_probs, result.lse, result.hit, entropy, grad_hidden


@torch.library.custom_op(
    "fastperturb::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_CALL}, Tensor lse, {_WANTED}) -> Tensor[]",
)
def logprob_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, lse, want_hidden, want_weight, want_bias = arguments
    call, wanted = HeadCall(*fields), Wanted(want_hidden, want_weight, want_bias)
    head = _head("linear_logprob", call)
    with dispatch.full_precision(grad.device):
        grads = head_gradients.linear_logprob_backward(
            head, grad, call.hidden, _labels(call), lse, wanted
        )
    return _like_inputs(grads, call)


@torch.library.custom_op(
    "fastperturb::linear_quadratic",
    mutates_args=(),
    schema=f"({_CALL}, Tensor? row_weights, SymInt strata, bool want_grad_hidden) -> "
    "(Tensor values, Tensor log_probs, Tensor lse, Tensor dot, Tensor grad_hidden)",
)
def quadratic(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, row_weights, strata, want_grad_hidden = arguments
    call = HeadCall(*fields)
    _check_targets(call)
    head = _head("linear_quadratic", call)
    with dispatch.full_precision(call.hidden.device):
        result = head_blocks.linear_quadratic(
            head,
            call.hidden,
            _labels(call),
            row_weights,
            strata=strata,
            want_grad_hidden=want_grad_hidden,
        )
    return *result[:4], _or_empty(result.grad_hidden, call.hidden)


@torch.library.custom_op(
    "fastperturb::linear_quadratic_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_CALL}, Tensor? row_weights, SymInt strata, Tensor lse, Tensor dot, "
    f"{_WANTED}) -> Tensor[]",
)
def quadratic_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, row_weights, strata, lse, dot, want_hidden, want_weight, want_bias = arguments
    call, wanted = HeadCall(*fields), Wanted(want_hidden, want_weight, want_bias)
    head = _head("linear_quadratic", call)
    with dispatch.full_precision(grad.device):
        grads = head_gradients.linear_quadratic_backward(
            head, grad, call.hidden, _labels(call), row_weights, strata, lse, dot, wanted
        )
    return _like_inputs(grads, call)


def _head(op: str, call: HeadCall) -> Head:
    weight = _gemm_weight(call)
    dtype = reference.accumulation_dtype(call.hidden, weight)
    bias = None if call.bias is None else call.bias.to(dtype).contiguous()
    row_passes = dispatch.implementation(op, call.hidden.device, dtype)
    return Head(
        row_passes,
        weight,
        bias,
        call.logit_scale,
        call.softcap,
        call.valid_vocab,
        grad_dtype=call.weight.dtype,
        geometry=Geometry.of(weight.device, weight.shape[1]),
        fused=dispatch.fused_head(weight.device) if op == "linear_logprob" else None,
    )


def _gemm_weight(call: HeadCall) -> Tensor:
    return call.weight if call.cast_weight is None else call.cast_weight


def _labels(call: HeadCall) -> Labels:
    return Labels.of(call.target, call.ignore_index, call.labelled)


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def _differentiable(call: HeadCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and bias; without a bias, something to make an empty gradient like."""
    return call.hidden, call.weight, call.weight if call.bias is None else call.bias


def _like_inputs(grads: Sequence[Tensor | None], call: HeadCall) -> list[Tensor]:
    """Return each gradient in its input's dtype."""
    likes = _differentiable(call)
    return [_or_empty(grad, like).to(like.dtype) for grad, like in zip(grads, likes, strict=True)]


def _check_targets(call: HeadCall) -> None:
    """Raise for targets out of range and wrong `labelled`, where looking at them costs no wait."""
    target, valid_vocab, ignore_index = call.target, call.valid_vocab, call.ignore_index
    if target.device.type != "cpu":
        return
    has_label = target != ignore_index
    wrong = has_label & ((target < 0) | (target >= valid_vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target must be {ignore_index} (ignored) or lie in [0, {valid_vocab}), "
            f"got {int(target[row])} at row {row}"
        )
    if call.labelled is not None and not torch.equal(call.labelled, has_label.nonzero()[:, 0]):
        raise ValueError(
            f"labelled must be the numbers of the tokens whose target is not {ignore_index}, "
            "in rising order"
        )


# The shapes of the results, for tracing.


@logprob.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, want_grad_hidden, want_entropy = arguments
    call = HeadCall(*fields)
    hidden, log_probs = call.hidden, _empty_values(call)
    lse = log_probs.new_empty((2, *log_probs.shape))
    hit = torch.empty_like(log_probs, dtype=torch.bool)
    entropy = torch.empty_like(log_probs) if want_entropy else hidden.new_empty(0)
    grad_hidden = empty_grad_hidden(hidden) if want_grad_hidden else hidden.new_empty(0)
    return log_probs, lse, hit, entropy, grad_hidden


@quadratic.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, _, _, want_grad_hidden = arguments
    call = HeadCall(*fields)
    hidden, values = call.hidden, _empty_values(call)
    log_probs, dot = (values.new_empty(hidden.shape[:2]) for _ in range(2))
    lse = values.new_empty((2, *hidden.shape[:2]))
    grad_hidden = empty_grad_hidden(hidden) if want_grad_hidden else hidden.new_empty(0)
    return values, log_probs, lse, dot, grad_hidden


def _empty_values(call: HeadCall) -> Tensor:
    dtype = reference.accumulation_dtype(call.hidden, _gemm_weight(call))
    return call.hidden.new_empty(call.target.shape, dtype=dtype)


def _fake_gradients(grad: Tensor, *arguments: Any) -> list[Tensor]:
    likes = _differentiable(HeadCall(*arguments[: len(HeadCall._fields)]))
    return [
        like.new_empty(like.shape if wanted else 0)
        for like, wanted in zip(likes, arguments[-len(likes) :], strict=True)
    ]


logprob_backward.register_fake(_fake_gradients)
quadratic_backward.register_fake(_fake_gradients)


# Autograd. A gradient is returned for each argument of the op, `None` for those without one.


def _setup_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, want_grad_hidden, _ = inputs
    tensors, ctx.options = fields[:_TENSORS], fields[_TENSORS:]
    _, lse, _, _, grad_hidden = output
    ctx.set_materialize_grads(False)
    ctx.want_grad_hidden, ctx.ignore_index = want_grad_hidden, fields[-1]
    ctx.dtype = tensors[0].dtype
    ctx.save_for_backward(
        *([grad_hidden, HeadCall(*fields).target] if want_grad_hidden else [*tensors, lse])
    )


def _logprob_gradients(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Any, ...]:
    _reject_second_derivative("linear_logprob")
    if grad is None:
        return _gradients(ctx, None, None, None)
    if ctx.want_grad_hidden:
        grad_hidden, target = ctx.saved_tensors
        labelled = target != ctx.ignore_index
        return _gradients(ctx, _scaled(grad_hidden, grad, labelled, ctx.dtype), None, None)
    *tensors, lse = ctx.saved_tensors
    wanted = _wanted(ctx)
    grads = torch.ops.fastperturb.linear_logprob_backward(
        grad, *tensors, *ctx.options, lse, *wanted
    )
    return _gradients(ctx, *(g if want else None for g, want in zip(grads, wanted, strict=True)))


def _setup_quadratic(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, row_weights, ctx.strata, want_grad_hidden = inputs
    tensors, ctx.options = fields[:_TENSORS], fields[_TENSORS:]
    _, _, lse, dot, grad_hidden = output
    ctx.set_materialize_grads(False)
    kept = grad_hidden if want_grad_hidden else None
    ctx.save_for_backward(*tensors, row_weights, lse, dot, kept)


def _quadratic_gradients(
    ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None, *others: None
) -> tuple[Any, ...]:
    _reject_second_derivative("linear_quadratic")
    *tensors, row_weights, lse, dot, grad_hidden = ctx.saved_tensors
    call, wanted = HeadCall(*tensors, *ctx.options), _wanted(ctx)
    terms = []
    if grad is not None and grad_hidden is not None:
        labelled = call.target != call.ignore_index
        terms.append([_scaled(grad_hidden, grad, labelled, call.hidden.dtype), None, None])
    elif grad is not None:
        terms.append(
            torch.ops.fastperturb.linear_quadratic_backward(
                grad, *call, row_weights, ctx.strata, lse, dot, *wanted
            )
        )
    if grad_log_probs is not None:
        rows = _as_rows(call)
        grads = torch.ops.fastperturb.linear_logprob_backward(
            grad_log_probs.flatten(), *rows, lse.flatten(1), *wanted
        )
        terms.append([grads[0].view(call.hidden.shape), *grads[1:]])
    grads = [
        sum(parts) if want and parts else None
        for want, parts in zip(wanted, zip(*terms, strict=True), strict=False)
    ]
    return _gradients(ctx, *(grads or [None] * 3))


def _gradients(
    ctx: Any, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return a gradient, or None, for each argument of the op."""
    return hidden, weight, None, bias, *[None] * (len(ctx.needs_input_grad) - 4)


def _as_rows(call: HeadCall) -> HeadCall:
    """Return linear_logprob's call on all samples [M, N] of linear_quadratic's as rows [M N]."""
    M, N, _ = call.hidden.shape
    labelled = call.labelled
    if labelled is not None:
        labelled = (labelled + N * torch.arange(M, device=labelled.device)[:, None]).flatten()
    hidden, target = call.hidden.flatten(0, 1), call.target.repeat(M)
    return call._replace(hidden=hidden, target=target, labelled=labelled)


def _wanted(ctx: Any) -> Wanted:
    """Tell which of hidden, weight and bias require a gradient."""
    return Wanted(*(ctx.needs_input_grad[HeadCall._fields.index(name)] for name in Wanted._fields))


def _scaled(grad_hidden: Tensor, grad: Tensor, labelled: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad_hidden [.., N, D] times upstream gradients [N], rounded once; 0 if ignored."""
    upstream = grad.where(labelled, 0.0)[:, None]
    return torch.mul(grad_hidden, upstream, out=torch.empty_like(grad_hidden, dtype=dtype))


def _reject_second_derivative(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: leave create_graph=False")


logprob.register_autograd(_logprob_gradients, setup_context=_setup_logprob)
quadratic.register_autograd(_quadratic_gradients, setup_context=_setup_quadratic)
