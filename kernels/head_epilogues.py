"""The epilogues of the heads' GEMM (`head_gemm`): they turn a tile of fp32 products into results.

Each works on a quarter of the tile, [BM, W], so that no more results than that take registers and
shared memory. Few quarters hold a target or reach past the last vocabulary entry. Those are
`uneven`: only they pay for comparing columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastperturb.kernels import head_tiles as tiles
from fastperturb.kernels import maths

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def quarters(b_tile):
    """A tile [BM, BN] as four parts of its columns, [BM, BN / 4], in the registers they are in."""
    b_left, b_right = _halves(b_tile)
    b_first, b_second = _halves(b_left)
    b_third, b_fourth = _halves(b_right)
    return b_first, b_second, b_third, b_fourth


@triton.jit
def _halves(b_tile):
    BM: tl.constexpr = b_tile.shape[0]
    BN: tl.constexpr = b_tile.shape[1]
    return b_tile.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def uneven_quarters(b_target, width, W: tl.constexpr):
    """A bit for each quarter of W columns that holds a target, or columns from `width` on."""
    b_bit = tl.where(b_target >= 0, 1 << (tl.maximum(b_target, 0) // W), 0)
    return tl.reduce(b_bit, 0, _either) | (15 << (width // W)) & 15


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def softmax_quarter(
    b_products,  # [BM, W]
    logit_options,  # bias_ptr, v, scale, softcap
    b_ref,  # [BM]; so are the next two
    b_target,  # a column of this quarter, or outside
    b_target_logit_ptr,
    weights,  # descriptor of [n, v], or None
    row,
    column,
    uneven,
    FAST: tl.constexpr,
):
    """Store weights = slope * exp(l - ref); return each row's sum of exp(l - ref), and its peak.

    The target is left out of all three, and its logit stored. Columns beyond the entries are 0.
    """
    W: tl.constexpr = b_products.shape[1]
    b_column = tl.arange(0, W)[None, :]
    bias_ptr, v, scale, softcap = logit_options
    b_l = tiles.logits_of(b_products, bias_ptr, column + b_column, v, scale, softcap)
    if uneven:
        b_at_target = b_column == b_target[:, None]
        b_target_logit = tl.sum(tl.where(b_at_target, b_l, 0.0), 1)
        tl.store(b_target_logit_ptr, b_target_logit, mask=(b_target >= 0) & (b_target < W))
        b_is_other = (column + b_column < v) & (b_at_target == 0)
        b_l = tl.where(b_is_other, b_l, -float("inf"))
    b_q = _exp(b_l - b_ref[:, None], FAST)
    if weights is not None:
        b_weights = tiles.through_softcap(b_q, b_l, softcap)
        weights.store([row, column], b_weights.to(weights.dtype))
    return tl.sum(b_q, 1), tl.max(b_l, 1)


@triton.jit
def grad_quarter(
    b_products,  # [BM, W]
    logit_options,  # bias_ptr, v, scale, softcap
    b_lse,  # [BM]; so are the next three
    b_rounding,
    b_factor,  # scale * upstream
    b_target,  # a column of this quarter, or outside
    out,  # descriptor of [n, v]
    row,
    column,
    uneven,
    FAST: tl.constexpr,
):
    """Store out = factor * slope * (e_y - p); 0 beyond the entries, and in rows of factor 0."""
    b_column = tl.arange(0, b_products.shape[1])[None, :]
    bias_ptr, v, scale, softcap = logit_options
    b_l = tiles.logits_of(b_products, bias_ptr, column + b_column, v, scale, softcap)
    b_grad = -_exp(b_l - b_lse[:, None] - b_rounding[:, None], FAST)
    if uneven:
        b_grad = tl.where(b_column == b_target[:, None], b_grad + 1.0, b_grad)
        b_grad = tl.where(column + b_column < v, b_grad, 0.0)
    b_grad = tiles.through_softcap(b_grad * b_factor[:, None], b_l, softcap)
    b_grad = tl.where(b_factor[:, None] != 0, b_grad, 0.0)
    out.store([row, column], b_grad.to(out.dtype))


@triton.jit
def _exp(x, FAST: tl.constexpr):
    """exp(x); FAST saves the four instructions that Triton adds for results below 2^-126."""
    if FAST:
        return maths.approx("ex2", x * LOG2_E)
    else:
        return tl.exp(x)
