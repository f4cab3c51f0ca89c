"""combine: M log-probs to the estimator's value and weights, as one op.

With w = softmax(l), L = log mean exp l, and a the largest of the M log-probs l:

    jensen    value mean l                                  weights 1/M
    iwae      L                                             w
    jvi       L + (M-1) log((M-1)/M) - s sum_j log(1 - w_j)     s = (M-1)/M
              weights w_a (2 - 1/M - s Q), and for i other than a
              w_i (3 - 2/M - s (Q - q_i)) - s w_i / (1 - w_a)
              with q_j = w_j / (1 - w_j) and Q = sum q_j over j other than a
    jvi_clip  the same value; jvi's weights clipped at 0 and renormalised

That is `fastperturb.estimators` with the sums over "all but j" written out: linear in M, and
without cancellation, since w_j <= 1/2 for all j but a, and 1 - w_a is a sum over those.
The backward is a product with the weights, which torch does at the speed of memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperturb.config import MARGINALS, check_num_samples
from fastperturb.ops import dispatch, reference

# The estimators whose weights depend only on the M log-probs of one token, or of one sequence.
COMBINABLE = ("jensen", "iwae", "jvi", "jvi_clip")


class Combined(NamedTuple):
    """The results of `combine`; all but `value` are without gradient."""

    value: Tensor  # [B, T], or [B] for the sequence marginal; its gradient is `weights`
    log_marginal: Tensor  # the same shape: iwae's value
    effective_samples: Tensor  # the same shape: 1 / sum of squared iwae weights, from 1 to M
    weights: Tensor  # [M, B, T] or [M, B]


def combine(
    log_probs: Tensor, mask: Tensor, estimator: str, *, marginal: str = "token"
) -> Combined:
    """Return the estimator's values, and the weights and statistics of the samples.

    log_probs: [M, B, T]. mask: bool [B, T], the labelled positions.
    marginal: "token" combines each (b, t); "sequence" each b, its labelled log-probs summed first.

    Positions without a label, and batch rows without any, get 0 everywhere. Computed in fp32, or
    fp64 for fp64 log-probs; they may be strided.
    """
    _check(log_probs, mask, estimator, marginal)
    dispatch.reject_forward_mode("combine", log_probs)
    log_probs = log_probs.to(reference.accumulation_dtype(log_probs))
    return Combined(*torch.ops.fastperturb.combine(log_probs, mask, estimator, marginal))


def _check(log_probs: Tensor, mask: Tensor, estimator: str, marginal: str) -> None:
    if estimator not in COMBINABLE:
        raise ValueError(
            f"estimator must be one of {COMBINABLE}, whose weights depend on the log-probs alone, "
            f"got {estimator!r}; resample is estimators.resample, sumo and mlmc are "
            "estimators.Telescope, quadratic is ops.linear_quadratic"
        )
    if marginal not in MARGINALS:
        raise ValueError(f"marginal must be one of {MARGINALS}, got {marginal!r}")
    if not log_probs.is_floating_point() or log_probs.ndim != 3 or log_probs.shape[0] == 0:
        raise ValueError(
            f"log_probs must be floating point [M, B, T] with M >= 1, "
            f"got {log_probs.dtype} {list(log_probs.shape)}"
        )
    shape, device = log_probs.shape[1:], log_probs.device
    if mask.dtype != torch.bool or mask.shape != shape or mask.device != device:
        raise ValueError(
            f"mask must be bool [B, T] = {list(shape)} on {device}, "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )
    check_num_samples(estimator, log_probs.shape[0])


@torch.library.custom_op("fastperturb::combine", mutates_args=())
def _op(
    log_probs: Tensor, mask: Tensor, estimator: str, marginal: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    implementation = dispatch.implementation("combine", log_probs.device, log_probs.dtype)
    return implementation.combine(log_probs, mask, estimator, marginal)


@torch.library.custom_op("fastperturb::combine_backward", mutates_args=())
def _op_backward(grad: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    product = weights * grad
    if weights.ndim == 2:
        product = product.unsqueeze(-1)
    return product.where(mask.contiguous(), 0.0)


@_op.register_fake
def _(
    log_probs: Tensor, mask: Tensor, estimator: str, marginal: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = log_probs.shape if marginal == "token" else log_probs.shape[:2]
    value, log_marginal, effective = (log_probs.new_empty(shape[1:]) for _ in range(3))
    return value, log_marginal, effective, log_probs.new_empty(shape)


@_op_backward.register_fake
def _(grad: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    return weights.new_empty((weights.shape[0], *mask.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], inputs[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *others: None) -> tuple[Tensor, None, None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("combine has no second derivative: leave create_graph=False")
    return torch.ops.fastperturb.combine_backward(grad, *ctx.saved_tensors), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
