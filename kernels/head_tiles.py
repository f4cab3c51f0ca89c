"""Tiles of logits for the heads' row passes, and the steps of an online softmax.

b_v are columns of a vocabulary block, v its width, of which the last PADDING are no entries. With
q = exp(l - peak), a row's running statistics are `other_sum`, the sum of q over all entries but the
target, and `entropy_sum`, the sum of q (l - peak) over all. The target's logit is NaN until its
block has been read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastperturb.kernels import maths

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def logits(b_products_ptr, bias_ptr, b_v, b_mask, v, scale, softcap, PADDING: tl.constexpr):
    """The logits of a tile, to whose shape its columns b_v broadcast.

    -inf outside the mask and in padding. The mask of the load ignores padding, so that it falls on
    multiples of 64 columns and the load stays wide.
    """
    b_products = tl.load(b_products_ptr, mask=b_mask, other=0.0)
    b_l = logits_of(b_products, bias_ptr, b_v, v - PADDING, scale, softcap)
    if PADDING == 0:
        return tl.where(b_mask, b_l, -float("inf"))
    else:
        return tl.where(b_mask & (b_v < v - PADDING), b_l, -float("inf"))


@triton.jit
def logits_of(b_products, bias_ptr, b_v, entries, scale, softcap):
    """The logits of products; scale None is 1."""
    b_l = b_products
    if bias_ptr is not None:
        b_l += tl.load(bias_ptr + b_v, mask=b_v < entries, other=0.0).to(tl.float32)
    if scale is not None:
        b_l *= scale
    if softcap is not None:
        b_l = softcap * maths.tanh(b_l * (1.0 / softcap))
    return b_l


@triton.jit
def other_logits(row_ptr, bias_ptr, b_v, target, v, scale, softcap, PADDING: tl.constexpr):
    """A row's logits at the columns b_v, -inf at the target."""
    b_l = logits(row_ptr + b_v, bias_ptr, b_v, b_v < v, v, scale, softcap, PADDING)
    return tl.where(b_v == target, -float("inf"), b_l)


@triton.jit
def through_softcap(b_grad, b_l, softcap):
    """A gradient with respect to the logits, times the slope of the soft cap."""
    if softcap is None:
        return b_grad
    else:
        b_tanh = b_l * (1.0 / softcap)
        return b_grad * tl.maximum(1.0 - b_tanh * b_tanh, 0.0)  # 0 where l = -inf


@triton.jit
def target_column(target_ptr, token, start, v):
    """The target's column in the block that starts at entry `start`, -1 if it lies elsewhere."""
    return column_from(tl.load(target_ptr + token), start, v)


@triton.jit
def column_from(target, start, v):
    """The number of a target among the v entries from `start` on, -1 if it is none of them."""
    column = target - start
    return tl.where((column >= 0) & (column < v), column, -1).to(tl.int32)


@triton.jit
def entropy_term(offset):
    """q (l - peak) of offset = l - peak, 0 for q = 0."""
    return tl.exp(offset) * tl.maximum(offset, LOWEST)


@triton.jit
def entropy_sum_at(entropy_sum, other_sum, target_logit, peak, new_peak):
    """The sum of q (l - peak) after the peak has risen to new_peak and each l - peak fallen."""
    is_read = target_logit == target_logit  # False for NaN
    target_q = tl.where(is_read, tl.exp(target_logit - peak), 0.0)
    step = tl.maximum(peak - new_peak, LOWEST)
    return tl.exp(step) * (entropy_sum + step * (other_sum + target_q))


@triton.jit
def rescale_row(total_ptr, old_peak, peak, D, BD: tl.constexpr):
    """Multiply a row [D] by exp(old_peak - peak); before the first block it is 0 and stays so."""
    if (peak != old_peak) & (old_peak > LOWEST):
        for column in range(0, D, BD):
            b_d = column + tl.arange(0, BD)
            b_total = tl.load(total_ptr + b_d, mask=b_d < D, other=0.0)
            tl.store(total_ptr + b_d, b_total * tl.exp(old_peak - peak), mask=b_d < D)


@triton.jit
def samples_tile(
    products_ptr,  # [M, n, v]
    bias_ptr,
    lse_ptr,  # [2, M, n]
    row_weights_ptr,  # [M, n]
    token,
    n,
    b_v,  # [1, BV]
    b_live,  # [1, BV]
    v,
    scale,
    softcap,
    M,
    BM: tl.constexpr,
    STRATA: tl.constexpr,
    PADDING: tl.constexpr,
):
    """One token's rows (m, token) and offsets, logits, p and r, and S - S_k: [BM, 1] or [BM, BV].

    p is 0 for samples beyond M, columns that are not live and padding.
    """
    b_m = tl.arange(0, BM)[:, None]
    b_row = b_m.to(tl.int64) * n + token
    b_offset = b_row * v + b_v
    b_mask = (b_m < M) & b_live
    b_l = logits(products_ptr + b_offset, bias_ptr, b_v, b_mask, v, scale, softcap, PADDING)
    b_lse = tl.load(lse_ptr + b_row, mask=b_m < M, other=0.0)
    b_rounding = tl.load(lse_ptr + M * n + b_row, mask=b_m < M, other=0.0)
    b_p = tl.exp(b_l - b_lse - b_rounding)
    b_r = tl.load(row_weights_ptr + b_row, mask=b_m < M, other=0.0)
    b_own = b_r * b_p
    b_all = tl.sum(b_own, 0, keep_dims=True)
    if STRATA > 1:
        BV: tl.constexpr = b_v.shape[1]
        b_groups = tl.reshape(b_own, [BM // STRATA, STRATA, BV])
        b_sums = tl.broadcast_to(tl.sum(b_groups, 1, keep_dims=True), b_groups.shape)
        b_own = tl.reshape(b_sums, [BM, BV])
    return b_row, b_offset, b_l, b_p, b_r, b_all - b_own
