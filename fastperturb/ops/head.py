"""linear_logprob and linear_quadratic: the vocabulary head whose logits are never kept.

    logits = (hidden weight^T + bias) * logit_scale, then softcap * tanh(logits / softcap)

Values come back in fp32 (fp64 for fp64 inputs). Rows whose target is `ignore_index` give 0 and
no gradient; a target out of range raises on a CPU and makes its row NaN on a GPU, where raising
would cost a synchronisation. With a frozen weight and bias the forward already makes the gradient
with respect to hidden, up to each row's upstream one (4NDV flops in all, 2NDV under no_grad);
otherwise the backward makes the logits again.

This file has the public functions and their checks, `head_op` the registered ops, `head_blocks` the
computation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.ops import dispatch, head_op
from fastperturb.ops.calls import HeadCall


class LogProbMetrics(NamedTuple):
    """The log-probs, and statistics of the same pass over the vocabulary, without gradient.

    Each [N], 0 (False) where the target is ignored.
    """

    log_probs: Tensor
    lse: Tensor  # log sum exp of the logits
    entropy: Tensor  # of the softmax, in nats
    hit: Tensor  # bool: no vocabulary entry has a higher logit than the target


class HeadOptions(TypedDict, total=False):
    """The options that both heads take."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    valid_vocab: int | None
    ignore_index: int
    cast_weight: Tensor | None
    labelled: Tensor | None


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[HeadOptions],
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
    cast_weight: Tensor | None = None,
    labelled: Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | LogProbMetrics:
    """Return log softmax(logits)[target] row by row, [N].

    hidden: [N, D]. weight: [V, D]. target: int64 [N]. bias: [V].
    valid_vocab: the number of vocabulary entries; rows of weight from there on are padding.
    cast_weight: weight as `cast_weight(weight)` returns it, for callers that use it more than once.
        The matrix products take it; the gradient still goes to weight, in weight's own dtype.
    labelled: int64 [n], the numbers of the tokens with labels, in rising order. Then a GPU leaves
        out the others, which it cannot find without waiting for target. A CPU needs no help.
    return_metrics: return `LogProbMetrics` instead.
    """
    hidden, cast_weight = _check_tensors(
        hidden, weight, target, bias, cast_weight, labelled, "[N, D]"
    )
    valid_vocab = _check_options(softcap, valid_vocab, weight.shape[0])
    options = float(logit_scale), softcap, valid_vocab, ignore_index
    call = HeadCall(hidden, weight, target, bias, cast_weight, labelled, *options)
    dispatch.reject_forward_mode("linear_logprob", hidden, weight, bias)
    log_probs, lse, hit, entropy, _ = head_op.logprob(
        *call, _wants_grad_hidden(call), return_metrics
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
    row_weights: Tensor | None = None,
    strata: int = 1,
    return_log_probs: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def linear_quadratic(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    row_weights: Tensor | None = None,
    strata: int = 1,
    return_log_probs: Literal[True],
    **options: Unpack[HeadOptions],
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
    cast_weight: Tensor | None = None,
    labelled: Tensor | None = None,
    row_weights: Tensor | None = None,
    strata: int = 1,
    return_log_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the unbiased quadratic estimator over M samples in two or more groups of G, [N].

        2/M sum_m r_m p_m(y) - 1/(M(M-G)) sum r_i r_j <p_i, p_j> over i, j of different groups

    hidden: [M, N, D]. The other arguments are those of `linear_logprob`.
    row_weights: r [M, N], taken as constants (importance weights of the samples); 1 by default.
    strata: the number G of samples in a stratified group; 1 where samples are independent.
    return_log_probs: return also the log-probs [M, N] of the targets, from the same pass. They
        are differentiable too, but a gradient through them makes the logits once more.
    """
    hidden, cast_weight = _check_tensors(
        hidden, weight, target, bias, cast_weight, labelled, "[M, N, D]"
    )
    valid_vocab = _check_options(softcap, valid_vocab, weight.shape[0])
    if hidden.shape[0] < 2:
        raise ValueError(
            f"hidden must hold M >= 2 independent samples for the quadratic estimator, "
            f"got {list(hidden.shape)}"
        )
    noise.check_strata(strata)
    if hidden.shape[0] % strata or hidden.shape[0] < 2 * strata:
        raise ValueError(
            f"hidden must hold two or more groups of strata={strata} samples for the quadratic "
            f"estimator, got {list(hidden.shape)}"
        )
    if row_weights is not None:
        if not row_weights.is_floating_point() or row_weights.shape != hidden.shape[:2]:
            raise ValueError(
                f"row_weights must be floating point [M, N] = {list(hidden.shape[:2])}, "
                f"got {row_weights.dtype} {list(row_weights.shape)}"
            )
        row_weights = row_weights.detach()
    options = float(logit_scale), softcap, valid_vocab, ignore_index
    call = HeadCall(hidden, weight, target, bias, cast_weight, labelled, *options)
    dispatch.reject_forward_mode("linear_quadratic", hidden, weight, bias)
    value, log_probs, *_ = head_op.quadratic(*call, row_weights, strata, _wants_grad_hidden(call))
    return (value, log_probs) if return_log_probs else value


@torch.no_grad()
def cast_weight(weight: Tensor) -> Tensor | None:
    """Return weight [V, D] in the dtype of autocast's matrix products, to be cast once a step.

    None where they take weight as it is: without autocast, or on a CPU, where autocast does not
    reach the heads.
    """
    dtype = _autocast_dtype(weight.device)
    return None if dtype in (None, weight.dtype) else weight.to(dtype)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast gives the heads, as it would give torch's own linear.

    On a CPU they stay in fp32, which is faster there.
    """
    if device.type == "cpu" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _wants_grad_hidden(call: HeadCall) -> bool:
    """Tell whether hidden alone is differentiated, whose gradient the forward can make."""
    trained = call.weight.requires_grad or (call.bias is not None and call.bias.requires_grad)
    return torch.is_grad_enabled() and call.hidden.requires_grad and not trained


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    given_cast: Tensor | None,
    labelled: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor | None]:
    """Validate a head's tensors; return hidden and the cast of weight in autocast's dtype."""
    for name, value in (("weight", weight), ("bias", bias), ("cast_weight", given_cast)):
        if value is not None:
            _reject_shards(name, value)
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
    if labelled is not None and (labelled.dtype != torch.int64 or labelled.ndim != 1):
        raise ValueError(
            f"labelled must be int64 [n], the numbers of tokens, "
            f"got {labelled.dtype} {list(labelled.shape)}"
        )
    for name, value in (
        ("weight", weight),
        ("target", target),
        ("bias", bias),
        ("cast_weight", given_cast),
        ("labelled", labelled),
    ):
        if value is not None and value.device != hidden.device:
            raise ValueError(
                f"{name} must be on {hidden.device}, like hidden, got {value.device}; "
                "use .to(device)"
            )
    dtype = _autocast_dtype(hidden.device)
    if dtype is not None:
        hidden = hidden.to(dtype)
    if given_cast is None:
        return hidden, cast_weight(weight)
    _check_cast(given_cast, weight, hidden.dtype)
    return hidden, given_cast.detach()


def _check_cast(given: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Validate cast_weight; on a CPU, where products are in fp32 whatever it is, any float goes."""
    right = given.dtype == dtype if given.device.type != "cpu" else given.is_floating_point()
    if not right or given.shape != weight.shape:
        raise ValueError(
            f"cast_weight must be weight {list(weight.shape)} in hidden's dtype {dtype}, "
            f"got {given.dtype} {list(given.shape)}"
        )


def _check_options(softcap: float | None, valid_vocab: int | None, vocab: int) -> int:
    """Validate a head's options; return the number of vocabulary entries."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap!r}")
    if valid_vocab is None:
        return vocab
    if not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab must lie in [1, V = {vocab}], got {valid_vocab!r}")
    return valid_vocab


def _reject_shards(name: str, value: Tensor) -> None:
    """Raise for a shard, which would pass for the whole vocabulary."""
    if hasattr(value, "full_tensor"):  # a DTensor, a class that is slow to import
        raise ValueError(
            f"{name} is sharded over processes (a DTensor): give {name}.full_tensor(), or call the "
            "op inside the forward of the module that FSDP2 gathers it for"
        )
