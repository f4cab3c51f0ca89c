"""linear_logprob and linear_quadratic: the vocabulary head whose logits are never kept.

    logits = (hidden weight^T + bias) * logit_scale, then softcap * tanh(logits / softcap)

Values come back in fp32 (fp64 for fp64 inputs). Rows whose target is `ignore_index` give 0 and
no gradient; a target out of range raises on a CPU and makes its row NaN on a GPU, where raising
would cost a synchronisation. With a frozen weight and bias the forward already makes the gradient
with respect to hidden, up to each row's upstream one (4NDV flops in all, 2NDV under no_grad);
otherwise the backward makes the logits again. `head_blocks` has the rest.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastperturb.ops import dispatch, head_blocks, reference
from fastperturb.ops.head_blocks import Head


class LogProbMetrics(NamedTuple):
    """The log-probs, and what the same pass over the vocabulary says besides, without gradient.

    Each [N], 0 (False) where the target is ignored.
    """

    log_probs: Tensor
    lse: Tensor  # log sum exp of the logits
    entropy: Tensor  # of the softmax, in nats
    hit: Tensor  # bool: no word has a higher logit than the target


@overload
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
    return_metrics: Literal[False] = False,
) -> Tensor: ...


@overload
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
    return_metrics: Literal[True],
) -> LogProbMetrics: ...


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
    return_metrics: bool = False,
) -> Tensor | LogProbMetrics:
    """log softmax(logits)[target], row by row: hidden [N, D], weight [V, D], target [N] -> [N].

    bias: [V]. valid_vocab: only the first so many rows of weight are words (padded vocabulary).
    return_metrics: return `LogProbMetrics` instead.
    """
    hidden, weight, valid_vocab = _check_head(
        hidden, weight, target, bias, softcap, valid_vocab, ignore_index, "[N, D]"
    )
    dispatch.refuse_tangents("linear_logprob", hidden, weight, bias)
    log_probs, lse, hit, entropy, _ = torch.ops.fastperturb.linear_logprob(
        hidden,
        weight,
        target,
        bias,
        float(logit_scale),
        softcap,
        valid_vocab,
        ignore_index,
        _keeps_pull(hidden, weight, bias),
        return_metrics,
    )
    if not return_metrics:
        return log_probs
    return LogProbMetrics(log_probs, lse.detach()[0], entropy.detach(), hit)


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
    row_weights: Tensor | None = None,
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
    row_weights: Tensor | None = None,
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
    row_weights: Tensor | None = None,
    return_log_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The unbiased quadratic equation over M >= 2 independent draws: hidden [M, N, D] -> [N].

        2/M sum_m r_m p_m(y) - 1/(M(M-1)) sum_{i != j} r_i r_j <p_i, p_j>

    The other arguments are those of `linear_logprob`. row_weights: r [M, N], taken as constants
    (importance weights of the draws); 1 by default. `return_log_probs` adds the log-probs [M, N]
    of the targets from the same pass; they are differentiable too, but a gradient through them
    makes the logits once more.
    """
    hidden, weight, valid_vocab = _check_head(
        hidden, weight, target, bias, softcap, valid_vocab, ignore_index, "[M, N, D]"
    )
    if hidden.shape[0] < 2:
        raise ValueError(
            f"hidden must hold M >= 2 independent samples for the quadratic equation, "
            f"got {list(hidden.shape)}"
        )
    if row_weights is not None:
        if not row_weights.is_floating_point() or row_weights.shape != hidden.shape[:2]:
            raise ValueError(
                f"row_weights must be floating point [M, N] = {list(hidden.shape[:2])}, "
                f"got {row_weights.dtype} {list(row_weights.shape)}"
            )
        row_weights = row_weights.detach()
    dispatch.refuse_tangents("linear_quadratic", hidden, weight, bias)
    value, log_probs, *_ = torch.ops.fastperturb.linear_quadratic(
        hidden,
        weight,
        target,
        bias,
        row_weights,
        float(logit_scale),
        softcap,
        valid_vocab,
        ignore_index,
        _keeps_pull(hidden, weight, bias),
    )
    return (value, log_probs) if return_log_probs else value


def _keeps_pull(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether hidden alone is differentiated, whose gradient the forward can make."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not trains


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    valid_vocab: int | None,
    ignore_index: int,
    layout: str,
) -> tuple[Tensor, Tensor, int]:
    """Validate a head's arguments; hidden and weight as autocast wants them, and the words."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _refuse_shards(name, value)
    if not hidden.is_floating_point() or hidden.ndim != layout.count(",") + 1:
        raise ValueError(
            f"hidden must be floating point {layout}, got {hidden.dtype} {list(hidden.shape)}"
        )
    shard = "" if weight.ndim == 2 else " (if FSDP1 or ZeRO-3 left a shard here, gather it first)"
    if not weight.is_floating_point() or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be floating point [V, D] with D = {hidden.shape[-1]} as in hidden, "
            f"got {weight.dtype} {list(weight.shape)}{shard}"
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
        valid_vocab = vocab
    elif not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab must lie in [1, V = {vocab}], got {valid_vocab!r}")
    device = hidden.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        # As torch's own linear would. On a CPU the engine stays in fp32, which is faster there.
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight, valid_vocab


def _refuse_shards(name: str, value: Tensor) -> None:
    """A shard would be taken for the whole vocabulary."""
    if hasattr(value, "full_tensor"):  # a DTensor, a class that is slow to import
        raise ValueError(
            f"{name} is sharded over processes (a DTensor): give {name}.full_tensor(), or call the "
            "op inside the forward of the module that FSDP2 gathers it for"
        )


def _head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Head:
    dtype = reference.accumulate(hidden, weight)
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    return Head(dispatch.implementation(op, hidden.device, dtype), weight, bias, *options)


_pulls = threading.local()


@contextlib.contextmanager
def without_pull() -> Iterator[None]:
    """For a checkpointed region's first pass, whose linear_logprob is never differentiated.

    What the backward needs is made when the region runs again, so here its place stays unfilled.
    """
    before, _pulls.put_off = getattr(_pulls, "put_off", False), True
    try:
        yield
    finally:
        _pulls.put_off = before


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
    want_pull: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_targets(target, valid_vocab, ignore_index)
    options = logit_scale, softcap, valid_vocab, ignore_index
    head = _head("linear_logprob", hidden, weight, bias, *options)
    put_off = want_pull and getattr(_pulls, "put_off", False)
    with dispatch.full_precision(hidden.device):
        found = head_blocks.linear_logprob(
            head, hidden, target, want_pull=want_pull and not put_off, want_entropy=want_entropy
        )
    pull = _or_empty(found.pull, hidden)
    if put_off:  # takes no memory, and shows if it should ever be used
        pull = hidden.new_full((), torch.nan).expand(hidden.shape)
    return found.log_probs, found.lse, found.hit, _or_empty(found.entropy, hidden), pull


@torch.library.custom_op("fastperturb::linear_logprob_backward", mutates_args=())
def _logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    options = logit_scale, softcap, valid_vocab, ignore_index
    head = _head("linear_logprob", hidden, weight, bias, *options)
    wanted = want_hidden, want_weight, want_bias
    with dispatch.full_precision(hidden.device):
        grads = head_blocks.linear_logprob_backward(head, grad, hidden, target, lse, wanted)
    return _gradients(grads, hidden, weight, bias)


@torch.library.custom_op("fastperturb::linear_quadratic", mutates_args=())
def _quadratic(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_pull: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_targets(target, valid_vocab, ignore_index)
    options = logit_scale, softcap, valid_vocab, ignore_index
    head = _head("linear_quadratic", hidden, weight, bias, *options)
    with dispatch.full_precision(hidden.device):
        found = head_blocks.linear_quadratic(head, hidden, target, row_weights, want_pull=want_pull)
    return *found[:4], _or_empty(found.pull, hidden)


@torch.library.custom_op("fastperturb::linear_quadratic_backward", mutates_args=())
def _quadratic_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    lse: Tensor,
    dots: Tensor,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    options = logit_scale, softcap, valid_vocab, ignore_index
    head = _head("linear_quadratic", hidden, weight, bias, *options)
    wanted = want_hidden, want_weight, want_bias
    with dispatch.full_precision(hidden.device):
        grads = head_blocks.linear_quadratic_backward(
            head, grad, hidden, target, row_weights, lse, dots, wanted
        )
    return _gradients(grads, hidden, weight, bias)


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """A registered op returns tensors only: an unwanted one is empty."""
    return like.new_empty(0) if value is None else value


def _gradients(
    grads: list[Tensor | None], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """In the dtypes of what they belong to."""
    likes = hidden, weight, weight if bias is None else bias
    return [_or_empty(grad, like).to(like.dtype) for grad, like in zip(grads, likes, strict=True)]


def _check_targets(target: Tensor, valid_vocab: int, ignore_index: int) -> None:
    """Targets out of range raise where looking at them costs no sync."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= valid_vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target must be {ignore_index} (ignored) or lie in [0, {valid_vocab}), "
            f"got {int(target[row])} at row {row}"
        )


@_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_pull: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.accumulate(hidden, weight)
    log_probs = hidden.new_empty(target.shape, dtype=dtype)
    lse = log_probs.new_empty((2, *target.shape))
    hit = hidden.new_empty(target.shape, dtype=torch.bool)
    entropy = torch.empty_like(log_probs) if want_entropy else hidden.new_empty(0)
    return log_probs, lse, hit, entropy, hidden.new_empty(hidden.shape if want_pull else 0)


@_quadratic.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_pull: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = hidden.new_empty(target.shape, dtype=reference.accumulate(hidden, weight))
    log_probs, dots = (values.new_empty(hidden.shape[:2]) for _ in range(2))
    lse = values.new_empty((2, *hidden.shape[:2]))
    return values, log_probs, lse, dots, hidden.new_empty(hidden.shape if want_pull else 0)


def _fake_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    likes = hidden, weight, weight if bias is None else bias
    return [
        like.new_empty(like.shape if wanted else 0)
        for like, wanted in zip(likes, rest[-3:], strict=True)
    ]


_logprob_backward.register_fake(_fake_gradients)
_quadratic_backward.register_fake(_fake_gradients)


def _setup_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, *options, want_pull, _ = inputs
    _, lse, _, _, pull = output
    ctx.set_materialize_grads(False)
    ctx.want_pull, ctx.options = want_pull, options
    ctx.save_for_backward(*([pull, target] if want_pull else [hidden, weight, target, bias, lse]))


def _logprob_gradients(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Any, ...]:
    _refuse_second_derivatives("linear_logprob")
    rest = [None] * (len(ctx.options) + 2)
    if grad is None:
        return None, None, None, None, *rest
    if ctx.want_pull:
        pull, target = ctx.saved_tensors
        return _scaled(pull, grad, target != ctx.options[3]), None, None, None, *rest
    hidden, weight, target, bias, lse = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = torch.ops.fastperturb.linear_logprob_backward(
        grad, hidden, weight, target, bias, lse, *ctx.options, *wanted
    )
    hidden, weight, bias = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return hidden, weight, None, bias, *rest


def _setup_quadratic(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, row_weights, *options, want_pull = inputs
    _, _, lse, dots, pull = output
    ctx.set_materialize_grads(False)
    ctx.options = options
    kept = pull if want_pull else None
    ctx.save_for_backward(hidden, weight, target, bias, row_weights, lse, dots, kept)


def _quadratic_gradients(
    ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None, *others: None
) -> tuple[Any, ...]:
    _refuse_second_derivatives("linear_quadratic")
    hidden, weight, target, bias, row_weights, lse, dots, pull = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    found = []
    if grad is not None and pull is not None:
        found.append([_scaled(pull, grad, target != ctx.options[3]), None, None])
    elif grad is not None:
        saved = hidden, weight, target, bias, row_weights, lse, dots
        found.append(
            torch.ops.fastperturb.linear_quadratic_backward(grad, *saved, *ctx.options, *wanted)
        )
    if grad_log_probs is not None:
        flat = hidden.flatten(0, 1), weight, target.repeat(len(hidden)), bias, lse.flatten(1)
        grads = torch.ops.fastperturb.linear_logprob_backward(
            grad_log_probs.flatten(), *flat, *ctx.options, *wanted
        )
        found.append([grads[0].view(hidden.shape), *grads[1:]])
    grads = [
        sum(each) if want and each else None
        for want, each in zip(wanted, zip(*found, strict=True), strict=False)
    ]
    hidden, weight, bias = grads or [None] * 3
    return hidden, weight, None, bias, None, *[None] * (len(ctx.options) + 1)


def _scaled(pull: Tensor, grad: Tensor, labelled: Tensor) -> Tensor:
    """Each token's pull [.., N, D] times its upstream gradient [N], rounded once; 0 if ignored."""
    upstream = grad.where(labelled, 0.0)[:, None]
    return torch.mul(pull, upstream, out=pull.new_empty(pull.shape))


def _refuse_second_derivatives(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: leave create_graph=False")


_logprob.register_autograd(_logprob_gradients, setup_context=_setup_logprob)
_quadratic.register_autograd(_quadratic_gradients, setup_context=_setup_quadratic)
