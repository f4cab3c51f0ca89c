"""The heads' row passes (`head_blocks`) on GPUs; `ops.torch.rows` defines them.

All are bound by memory. Those of a block read fp32 products, [n, v] or [M, n, v], from DRAM once:

* `online_softmax`: a program owns a row. It adds the row to its running statistics, then writes
  exp(l - peak) from the final peak. Up to 16,384 entries stay in registers; a longer row goes
  through in tiles, and again for the writing, from L2. `total`'s row is touched only where the
  peak rose, which after k similar blocks happens in one row of k + 1.
* `grad_logits`: elementwise. Rows without an upstream gradient are not read.
* `quadratic_dot`, `quadratic_grad_logits`: a program owns one token and so many entries that all
  M samples' p stay in registers. quadratic_dot stores its sums over them, [tiles, M, n], for
  torch to add up.
* `finish_logprob`: once for the rows of a part, after all blocks. A program owns a row.

No sum has an order that could vary: the same inputs give the same bits. Where the result goes over
the products themselves, no element is read after it has been overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import head_tiles as tiles
from fastperturb.kernels import launch
from fastperturb.ops import gemm

if TYPE_CHECKING:
    from fastperturb.ops.calls import LogitOptions, LogProbs, RunningSoftmax

_VARYING = ["n", "start"]  # vary from batch to batch or block to block (see launch.VARYING)
_ROW_TILE = 16384  # columns of a row that stays in registers, 16 a thread
_LONG_ROW_TILE = 8192  # of a longer row, 8 a thread: then two programs share a multiprocessor
_FLAT_TILE = 2048
_SAMPLES_TILE = 4096


@triton.jit(do_not_specialize=_VARYING)
def online_softmax_kernel(
    products_ptr,  # [n, v]
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    peak_ptr,  # [n]; so are the next three
    other_sum_ptr,
    target_logit_ptr,
    entropy_sum_ptr,  # or None
    weights_ptr,  # [n, v] or None
    total_ptr,  # [n, D] or None
    start,
    scale,
    softcap,
    v,
    num_tiles,  # 1 is a constant to Triton: the two loops become straight code and share loads
    D,
    BV: tl.constexpr,
    BD: tl.constexpr,
    PADDING: tl.constexpr,
    LIFT: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * v
    target = tiles.target_column(target_ptr, row, start, v - PADDING)
    old_peak = tl.load(peak_ptr + row)
    other_sum = tl.load(other_sum_ptr + row)
    target_logit = tl.load(target_logit_ptr + row)

    # The target first, alone, and then all other entries: entropy_sum is of both.
    column = tl.maximum(target, 0)
    column_ptr = products_ptr + first + column
    block_logit = tiles.logits(
        column_ptr, bias_ptr, column, target >= 0, v, scale, softcap, PADDING
    )
    peak = tl.maximum(old_peak, block_logit)
    if entropy_sum_ptr is not None:
        entropy_sum = tl.load(entropy_sum_ptr + row)
        entropy_sum = tiles.entropy_sum_at(entropy_sum, other_sum, target_logit, old_peak, peak)
        entropy_sum += tiles.entropy_term(block_logit - peak)
    other_sum *= tl.exp(old_peak - peak)
    target_logit = tl.where(target >= 0, block_logit, target_logit)
    # disable_licm: values hoisted out of these loops would fill the registers.
    for tile in tl.range(0, num_tiles, disable_licm=True):
        b_v = tile * BV + tl.arange(0, BV)
        b_l = tiles.other_logits(
            products_ptr + first, bias_ptr, b_v, target, v, scale, softcap, PADDING
        )
        new_peak = tl.maximum(peak, tl.max(b_l, 0))
        if entropy_sum_ptr is not None:
            entropy_sum = tiles.entropy_sum_at(entropy_sum, other_sum, target_logit, peak, new_peak)
            entropy_sum += tl.sum(tiles.entropy_term(b_l - new_peak), 0)
        other_sum = other_sum * tl.exp(peak - new_peak) + tl.sum(tl.exp(b_l - new_peak), 0)
        peak = new_peak

    if weights_ptr is not None:
        for tile in tl.range(0, num_tiles, disable_licm=True):
            b_v = tile * BV + tl.arange(0, BV)
            b_l = tiles.other_logits(
                products_ptr + first, bias_ptr, b_v, target, v, scale, softcap, PADDING
            )
            b_q = tiles.through_softcap(tl.exp(b_l - peak), b_l, softcap)
            if LIFT != 1.0:
                b_q *= LIFT
            tl.store(weights_ptr + first + b_v, b_q, mask=b_v < v)
    if total_ptr is not None:
        tiles.rescale_row(total_ptr + row.to(tl.int64) * D, old_peak, peak, D, BD)
    # A maximum skips NaN, a sum does not.
    tl.store(peak_ptr + row, tl.where(other_sum == other_sum, peak, float("nan")))
    tl.store(other_sum_ptr + row, other_sum)
    tl.store(target_logit_ptr + row, target_logit)
    if entropy_sum_ptr is not None:
        tl.store(entropy_sum_ptr + row, entropy_sum)


@triton.jit(do_not_specialize=[*_VARYING, "lse_stride", "last_entry"])
def finish_logprob_kernel(
    target_ptr,  # [n]
    peak_ptr,  # [n]; so are the next three
    other_sum_ptr,
    target_logit_ptr,
    entropy_sum_ptr,  # or None
    weight_ptr,  # [V, D]
    total_ptr,  # [n, D] or None
    log_probs_ptr,  # [n]
    lse_ptr,  # [n], and the rounding errors lse_stride further
    hit_ptr,  # [n]
    entropy_ptr,  # [n] or None
    grad_hidden_ptr,  # [n, D] or None
    lse_stride,
    weight_stride_v,
    weight_stride_d,
    last_entry,
    scale,
    softcap,
    lift,
    D,
    BD: tl.constexpr,
):
    row = tl.program_id(0)
    peak = tl.load(peak_ptr + row)
    other_sum = tl.load(other_sum_ptr + row)
    target_logit = tl.load(target_logit_ptr + row)
    sums = other_sum + tl.exp(target_logit - peak)
    log_sums = tl.log(sums)
    log_prob = target_logit - peak - log_sums
    lse = peak + log_sums
    tl.store(log_probs_ptr + row, tl.where(log_prob > 0, 0.0, log_prob))  # NaN stays
    tl.store(lse_ptr + row, lse)
    tl.store(lse_ptr + lse_stride + row, peak - lse + log_sums)
    tl.store(hit_ptr + row, (target_logit >= peak).to(tl.uint8))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_sums - tl.load(entropy_sum_ptr + row) / sums)
    if grad_hidden_ptr is not None:
        share = other_sum / sums  # 1 - p_y
        share = tiles.through_softcap(share, target_logit, softcap)
        target = tl.minimum(tl.maximum(tl.load(target_ptr + row), 0), last_entry)
        first = row.to(tl.int64) * D
        for column in range(0, D, BD):
            b_d = column + tl.arange(0, BD)
            b_column = b_d.to(tl.int64) * weight_stride_d
            b_weight_ptr = weight_ptr + target * weight_stride_v + b_column
            b_weight = tl.load(b_weight_ptr, mask=b_d < D, other=0.0).to(tl.float32)
            b_total = tl.load(total_ptr + first + b_d, mask=b_d < D, other=0.0)
            b_grad = (b_weight * share - b_total / (lift * sums)) * scale
            tl.store(grad_hidden_ptr + first + b_d, b_grad, mask=b_d < D)


@triton.jit(do_not_specialize=_VARYING)
def grad_logits_kernel(
    products_ptr,  # [n, v]
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    lse_ptr,  # [2, n], the log-sum-exp and its rounding error
    upstream_ptr,  # [n]
    out_ptr,  # [n, v]
    start,
    scale,
    softcap,
    v,
    BV: tl.constexpr,
    PADDING: tl.constexpr,
):
    num_tiles = tl.cdiv(v, BV)
    row = tl.program_id(0) // num_tiles
    b_v = tl.program_id(0) % num_tiles * BV + tl.arange(0, BV)
    b_offset = row.to(tl.int64) * v + b_v
    lse = tl.load(lse_ptr + row)
    rounding = tl.load(lse_ptr + tl.num_programs(0) // num_tiles + row)
    upstream = tl.load(upstream_ptr + row)
    b_live = b_v < tl.where(upstream != 0, v, 0)
    b_l = tiles.logits(products_ptr + b_offset, bias_ptr, b_v, b_live, v, scale, softcap, PADDING)
    b_grad = -tl.exp(b_l - lse - rounding)
    target = tiles.target_column(target_ptr, row, start, v - PADDING)
    b_grad = tl.where(b_v == target, b_grad + 1.0, b_grad)
    b_grad = tiles.through_softcap(b_grad * (scale * upstream), b_l, softcap)
    tl.store(out_ptr + b_offset, b_grad, mask=b_v < v)


@triton.jit(do_not_specialize=_VARYING)
def quadratic_dot_kernel(
    products_ptr,  # [M, n, v]
    bias_ptr,  # [v] or None
    lse_ptr,  # [2, M, n]
    row_weights_ptr,  # [M, n]
    partial_ptr,  # [tiles, M, n]
    n,
    scale,
    softcap,
    v,
    M: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    STRATA: tl.constexpr,
    PADDING: tl.constexpr,
):
    num_tiles = tl.cdiv(v, BV)
    token = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    b_v = (tile * BV + tl.arange(0, BV))[None, :]
    b_row, _, _, b_p, _, b_others = tiles.samples_tile(
        products_ptr,
        bias_ptr,
        lse_ptr,
        row_weights_ptr,
        token,
        n,
        b_v,
        b_v < v,
        v,
        scale,
        softcap,
        M,
        BM,
        STRATA,
        PADDING,
    )
    b_sum = tl.sum(b_p * b_others, 1, keep_dims=True)
    b_ptr = partial_ptr + tile.to(tl.int64) * M * n + b_row
    tl.store(b_ptr, b_sum, mask=tl.arange(0, BM)[:, None] < M)


@triton.jit(do_not_specialize=_VARYING)
def quadratic_grad_logits_kernel(
    products_ptr,  # [M, n, v]
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    lse_ptr,  # [2, M, n]
    row_weights_ptr,  # [M, n]
    dot_ptr,  # [M, n]
    upstream_ptr,  # [n]
    out_ptr,  # [M, n, v]
    n,
    start,
    scale,
    softcap,
    v,
    M: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    STRATA: tl.constexpr,
    PADDING: tl.constexpr,
):
    num_tiles = tl.cdiv(v, BV)
    token = tl.program_id(0) // num_tiles
    b_v = (tl.program_id(0) % num_tiles * BV + tl.arange(0, BV))[None, :]
    upstream = tl.load(upstream_ptr + token)
    b_live = b_v < tl.where(upstream != 0, v, 0)
    b_row, b_offset, b_l, b_p, b_r, b_others = tiles.samples_tile(
        products_ptr,
        bias_ptr,
        lse_ptr,
        row_weights_ptr,
        token,
        n,
        b_v,
        b_live,
        v,
        scale,
        softcap,
        M,
        BM,
        STRATA,
        PADDING,
    )
    b_is_sample = tl.arange(0, BM)[:, None] < M
    b_g = b_others * (b_r * (-2.0 / (M * (M - STRATA))))
    target = tiles.target_column(target_ptr, token, start, v - PADDING)
    b_g = tl.where(b_v == target, b_g + b_r * (2.0 / M), b_g)
    b_grad = b_p * (b_g - tl.load(dot_ptr + b_row, mask=b_is_sample, other=0.0))
    b_grad = tiles.through_softcap(b_grad * (scale * upstream), b_l, softcap)
    tl.store(out_ptr + b_offset, b_grad, mask=b_is_sample & (b_v < v))


def online_softmax(
    products: Tensor,  # [n, v]
    options: LogitOptions,
    target: Tensor,  # [n]
    running: RunningSoftmax,
    weights: Tensor | None,  # [n, v]
    total: Tensor | None,  # [n, D]
) -> None:
    n, v = products.shape
    if v <= _ROW_TILE:
        BV = launch.block(v, _ROW_TILE)
        num_warps = launch.warps(BV, per_thread=16)
    else:
        BV, num_warps = _LONG_ROW_TILE, 32
    D = 1 if total is None else total.shape[1]
    launch.start(
        online_softmax_kernel,
        (n,),
        {
            **_logits_arguments(products, options),
            "target_ptr": target,
            "peak_ptr": running.peak,
            "other_sum_ptr": running.other_sum,
            "target_logit_ptr": running.target_logit,
            "entropy_sum_ptr": running.entropy_sum,
            "weights_ptr": weights,
            "total_ptr": total,
            "start": options.start,
            "num_tiles": triton.cdiv(v, BV),
            "D": D,
            "BV": BV,
            "BD": launch.block(D, 128 * num_warps),
            "LIFT": 1.0 if weights is None else gemm.lift(weights.dtype),
        },
        num_warps=num_warps,
    )


def finish_logprob(
    options: LogitOptions,  # of the whole vocabulary
    target: Tensor,  # [n]
    running: RunningSoftmax,
    weight: Tensor,  # [V, D]
    total: Tensor | None,  # [n, D]
    lift: float,
    results: LogProbs,
) -> None:
    D = weight.shape[1]
    BD = launch.block(D, 2048)
    launch.start(
        finish_logprob_kernel,
        (len(target),),
        {
            "target_ptr": target,
            "peak_ptr": running.peak,
            "other_sum_ptr": running.other_sum,
            "target_logit_ptr": running.target_logit,
            "entropy_sum_ptr": running.entropy_sum,
            "weight_ptr": weight,
            "total_ptr": total,
            "log_probs_ptr": results.log_probs,
            "lse_ptr": results.lse,
            "hit_ptr": results.hit.view(torch.uint8),
            "entropy_ptr": results.entropy,
            "grad_hidden_ptr": results.grad_hidden,
            "lse_stride": results.lse.stride(0),
            "weight_stride_v": weight.stride(0),
            "weight_stride_d": weight.stride(1),
            "last_entry": len(weight) - options.padding - 1,
            "scale": options.scale,
            "softcap": options.softcap,
            "lift": lift,
            "D": D,
            "BD": BD,
        },
        num_warps=launch.warps(BD, per_thread=8),
    )


def grad_logits(
    products: Tensor,  # [n, v]
    options: LogitOptions,
    target: Tensor,  # [n]
    lse: Tensor,  # [2, n]
    upstream: Tensor,  # [n]
    out: Tensor,  # [n, v]
) -> None:
    n, v = products.shape
    BV = launch.block(v, _FLAT_TILE)
    launch.start(
        grad_logits_kernel,
        (n * triton.cdiv(v, BV),),
        {
            **_logits_arguments(products, options),
            "target_ptr": target,
            "lse_ptr": lse,
            "upstream_ptr": upstream,
            "out_ptr": out,
            "start": options.start,
            "BV": BV,
        },
        num_warps=4,
    )


def quadratic_dot(
    products: Tensor,  # [M, n, v]
    options: LogitOptions,
    lse: Tensor,  # [2, M, n]
    row_weights: Tensor,  # [M, n]
    dot_others: Tensor,  # [M, n]
    strata: int = 1,
) -> None:
    M, n, v = products.shape
    BM, BV = _samples_block(M, v)
    num_tiles = triton.cdiv(v, BV)
    partial = dot_others.new_empty((num_tiles, M, n))
    launch.start(
        quadratic_dot_kernel,
        (n * num_tiles,),
        {
            **_logits_arguments(products, options),
            "lse_ptr": lse,
            "row_weights_ptr": row_weights,
            "partial_ptr": partial,
            "n": n,
            "M": M,
            "BM": BM,
            "BV": BV,
            "STRATA": strata,
        },
        num_warps=launch.warps(BM * BV, per_thread=32, limit=16),
    )
    dot_others += partial.sum(0)


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
    M, n, v = products.shape
    BM, BV = _samples_block(M, v)
    launch.start(
        quadratic_grad_logits_kernel,
        (n * triton.cdiv(v, BV),),
        {
            **_logits_arguments(products, options),
            "target_ptr": target,
            "lse_ptr": lse,
            "row_weights_ptr": row_weights,
            "dot_ptr": dot,
            "upstream_ptr": upstream,
            "out_ptr": out,
            "n": n,
            "start": options.start,
            "M": M,
            "BM": BM,
            "BV": BV,
            "STRATA": strata,
        },
        num_warps=launch.warps(BM * BV, per_thread=32, limit=16),
    )


def _logits_arguments(products: Tensor, options: LogitOptions) -> dict[str, Any]:
    return {
        "products_ptr": products,
        "bias_ptr": options.bias,
        "scale": options.scale,
        "softcap": options.softcap,
        "v": products.shape[-1],
        "PADDING": options.padding,
    }


def _samples_block(M: int, v: int) -> tuple[int, int]:
    """Return BM >= M samples by BV columns, at least the 128 bytes of one memory access."""
    BM = triton.next_power_of_2(M)
    return BM, launch.block(v, max(32, _SAMPLES_TILE // BM))
