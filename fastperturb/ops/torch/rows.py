"""The row passes of the heads (`head_blocks`) in torch, which define the other implementations.

All but `finish_logprob` take a block of products hidden W^T, [n, v] or [M, n, v], contiguous and
in at least fp32, and make the logits l = softcap * tanh((products + bias) * scale / softcap) of it.
The last `padding` columns are no entries: their products do not count. The input of the next
product, `weights` or `out`, is 0 there. It may be the products' own memory; nothing else changes
them.
`slope` is dl / d(products * scale), 1 without a softcap. Targets [n] are numbers of vocabulary
entries; many do not lie in the block. Row statistics are [n] or [M, n] and contiguous. `lse` holds
the log-sum-exp and its own rounding error, [2, n] or [2, M, n]: at logits in the hundreds the
rounding alone would keep p from summing to 1, and differences against p are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.ops import gemm
from fastperturb.ops.calls import LogitOptions, LogProbs, RunningSoftmax


def online_softmax(
    products: Tensor,  # [n, v]
    options: LogitOptions,
    target: Tensor,  # [n]
    running: RunningSoftmax,
    weights: Tensor | None,  # [n, v]
    total: Tensor | None,  # [n, D]
) -> None:
    """Add a block to the softmax statistics of its rows, in place.

    weights becomes slope * exp(l - peak), with the new peak, times `gemm.lift` of its dtype, and 0
    at the target. total is rescaled to the new peak.
    """
    logits, slope = _logits(products, options)
    peak, other_sum, target_logit, entropy_sum = running
    lowest = torch.finfo(logits.dtype).min
    new_peak = torch.maximum(peak, logits.amax(1))
    rescale = torch.exp(peak - new_peak)
    q = torch.exp(logits - new_peak[:, None])
    if entropy_sum is not None:
        # Each earlier term q (l - peak) grows by q times the step to the new peak. The sum of all
        # earlier q includes the target's.
        target_q = torch.exp(target_logit - peak).nan_to_num(0.0)
        step = (peak - new_peak).clamp_min(lowest)
        earlier = rescale * (entropy_sum + step * (other_sum + target_q))
        entropy_sum.copy_(earlier + (q * (logits - new_peak[:, None]).clamp_min(lowest)).sum(1))
    here, index = _in_block(target, options.start, logits.shape[1])
    target_logit.copy_(logits.gather(1, index)[:, 0].where(here, target_logit))
    q.scatter_(1, index, q.gather(1, index).where(~here[:, None], 0.0))
    other_sum.mul_(rescale).add_(q.sum(1))
    peak.copy_(new_peak)
    if weights is not None:
        lift = gemm.lift(weights.dtype)
        q = q if lift == 1.0 else q * lift
        _store(weights, q if slope is None else q * slope, options)
    if total is not None:
        total.mul_(rescale[:, None])


def finish_logprob(
    options: LogitOptions,  # of the whole vocabulary
    target: Tensor,  # [n]
    running: RunningSoftmax,
    weight: Tensor,  # [V, D]
    total: Tensor | None,  # [n, D], overwritten
    lift: float,
    results: LogProbs,
) -> None:
    """Write the results of rows whose blocks are all in, with total = lift * sum_v q_v W_v.

    grad_hidden = scale * ((1 - p_y) slope_y W_y - sum_v q_v W_v / sum q), rounded once.
    """
    log_probs, log_sums, sums = running.finish()
    if results.grad_hidden is not None and total is not None:
        share = running.other_sum / sums  # 1 - p_y
        if options.softcap is not None:
            share = share * (1 - (running.target_logit / options.softcap).square())
        at_target = weight[target.clamp(0, weight.shape[0] - options.padding - 1)].to(total.dtype)
        grad_hidden = (at_target * share[:, None]).sub_(total.div_((lift * sums)[:, None]))
        results.grad_hidden.copy_(grad_hidden.mul_(options.scale))
    if results.entropy is not None and running.entropy_sum is not None:
        results.entropy.copy_(log_sums - running.entropy_sum / sums)
    results.log_probs.copy_(log_probs)
    results.lse.copy_(RunningSoftmax.lse(running.peak, log_sums))
    results.hit.copy_(running.target_logit >= running.peak)


def grad_logits(
    products: Tensor,  # [n, v]
    options: LogitOptions,
    target: Tensor,  # [n]
    lse: Tensor,  # [2, n]
    upstream: Tensor,  # [n]
    out: Tensor,  # [n, v]
) -> None:
    """out = upstream * scale * slope * (e_y - p)."""
    logits, slope = _logits(products, options)
    grad = _softmax(logits, lse).neg_()
    _add_at_target(grad, target, options.start, 1.0)
    grad *= (options.scale * upstream)[:, None]
    _store(out, grad if slope is None else grad * slope, options)


def quadratic_dot(
    products: Tensor,  # [M, n, v]
    options: LogitOptions,
    lse: Tensor,  # [2, M, n]
    row_weights: Tensor,  # [M, n]
    dot_others: Tensor,  # [M, n]
    strata: int = 1,
) -> None:
    """dot_others += the block's part of <p_k, S - S_k>: S = sum_k r_k p_k, S_k its group's part."""
    p = _softmax(_logits(products, options)[0], lse)
    dot_others += (p * _others(p, row_weights, strata)).sum(-1)


def quadratic_grad_logits(
    products: Tensor,  # [M, n, v]
    options: LogitOptions,
    target: Tensor,  # [n]
    lse: Tensor,  # [2, M, n]
    row_weights: Tensor,  # [M, n]
    dot: Tensor,  # [M, n]
    upstream: Tensor,  # [n]
    out: Tensor,  # [M, n, v]
    strata: int = 1,
) -> None:
    """out = upstream * scale * slope * p_k * (g_k - dot_k)."""
    M = len(products)
    logits, slope = _logits(products, options)
    p = _softmax(logits, lse)
    g = _others(p, row_weights, strata).mul_(row_weights[..., None])
    g.mul_(-2 / (M * (M - strata)))
    _add_at_target(g, target, options.start, 2 / M * row_weights)
    grad = p * (g - dot[..., None]) * (options.scale * upstream)[:, None]
    _store(out, grad if slope is None else grad * slope, options)


def _logits(products: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor | None]:
    """Return the logits of a block's entries, and their slope unless it is 1."""
    products = products[..., : products.shape[-1] - options.padding]
    logits = products if options.bias is None else products + options.bias
    if options.scale != 1.0:
        logits = logits * options.scale
    if options.softcap is None:
        return logits, None
    tanh = torch.tanh(logits / options.softcap)
    return options.softcap * tanh, 1 - tanh.square()


def _store(out: Tensor, values: Tensor, options: LogitOptions) -> None:
    """Write the values of a block's entries, and 0 in its padding."""
    entries, padding = out.split([values.shape[-1], options.padding], -1)
    entries.copy_(values)
    padding.zero_()


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(logits - lse[0, ..., None] - lse[1, ..., None])


def _others(p: Tensor, row_weights: Tensor, strata: int) -> Tensor:
    """S - S_k."""
    weighted = p * row_weights[..., None]
    total = weighted.sum(0)
    if strata == 1:
        return total - weighted
    groups = weighted.unflatten(0, (-1, strata)).sum(1)
    return (total - groups).repeat_interleave(strata, dim=0)


def _in_block(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Mark the targets that lie in the block; return also their columns [n, 1], 0 elsewhere."""
    here = (target >= start) & (target < start + width)
    return here, (target - start).where(here, 0)[:, None]


def _add_at_target(grad: Tensor, target: Tensor, start: int, value: float | Tensor) -> None:
    """grad [.., n, v] += value [.., n] at each row's target, where that is in the block."""
    here, index = _in_block(target, start, grad.shape[-1])
    added = (here * value).to(grad.dtype).expand(grad.shape[:-1])[..., None]
    grad.scatter_add_(-1, index.expand(*grad.shape[:-1], 1), added)
