"""The heads' logits and what is made of them in one kernel: fp32 products never reach memory.

A persistent GEMM hidden W^T of 16-bit inputs (TMA, wgmma, fp32 accumulators). Its epilogue
(`head_epilogues`) turns a tile of products into one of

* `online_softmax`: 16-bit weights exp(l - ref) for the next GEMM, and their fp32 sums and peaks for
  each row and column tile. ref is the row's peak in earlier blocks, since the peak of this one is
  not known yet. Without weights, only the statistics.
* `grad_logits`: upstream * scale * slope * (e_y - p) in 16 bits, from a known log-sum-exp.

`ops.torch.rows` defines both, up to ref. A block of a softmax takes three steps, in this order:

    block = online_softmax(hidden, weight, options, target, running, weights)
    total += weights @ weight       both relative to the old peak
    merge(block, running, total, overflow)

`merge` adds the tiles' sums in a fixed order and moves running and total to the new peak. The first
block of a row has no earlier peak, so it goes by `head_rows`; a narrow one will do. Where a later
logit lies so far above ref that its weight or a sum might overflow, `merge` sets a flag, and the
rows must be done again by `head_rows`: beyond 60 in bf16 and without weights, 11 in fp16. A
reference that is too low costs nothing else: the weights are floating point. It never is too high.

Results may have up to 63 columns more than the block has entries, which become 0: so their rows, a
multiple of 16 bytes apart, suit the next GEMM as well.

A logit costs 4 bytes, written here and read by the next GEMM, instead of 12. The epilogue of a tile
comes after its products and is not hidden: on an sm_90 about 2300 cycles after 16 D, counted in the
machine code. Only the loads for the next tile are under way meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastperturb.kernels import head_epilogues as epilogues
from fastperturb.kernels import head_tiles as tiles
from fastperturb.kernels import launch

if TYPE_CHECKING:
    from fastperturb.ops.calls import LogitOptions, RunningSoftmax

_VARYING = ["n", "v", "start"]  # vary from batch to batch or block to block (see launch.VARYING)
# Rows of a batch may start anywhere. Their addresses are read one by one, whatever the alignment.
_ROWS = ["target_ptr", "ref_ptr", "target_logit_ptr", "partial_ptr", "lse_ptr", "upstream_ptr"]
_GROUP = 16
# exp(l - ref) and a sum of many times an entry's weights stay finite in fp32 up to this l - ref,
# and exp(l - ref) in fp16 up to the other.
_LIMIT, _FP16_LIMIT = 60.0, 11.0


class Tile(NamedTuple):
    """The output tile of a program and the pipeline that makes it."""

    rows: int
    entries: int
    inner: int  # dimensions of D a step
    stages: int
    warps: int
    flatten: bool  # load for the next tile during the epilogue of this one


# By compute capability. On Blackwell the products lie in tensor memory, and the epilogue of 256
# entries would spill.
TILES = {
    9: Tile(128, 256, 64, stages=4, warps=8, flatten=True),
    10: Tile(128, 128, 64, stages=4, warps=8, flatten=False),
}


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ROWS)
def head_gemm_kernel(
    hidden,  # descriptor of [n, D]
    weight,  # descriptor of [v, D]
    out,  # descriptor of [n, v + padding], or None
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    ref_ptr,  # [n]; with the next two for softmax, otherwise None
    target_logit_ptr,  # [n]
    partial_ptr,  # [2, column tiles, n], sums and peaks
    lse_ptr,  # [2, n]; with the next for grad_logits, otherwise None
    upstream_ptr,  # [n]
    n,
    v,
    start,
    D,
    scale,  # None for 1
    softcap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    FAST: tl.constexpr,
):
    row_tiles = tl.cdiv(n, BM)
    column_tiles = tl.cdiv(v, BN)
    first_tile = tl.program_id(0)
    for tile in tl.range(first_tile, row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        # GROUP row tiles go through all column tiles together: hidden's stay in L2.
        group = tile // (GROUP * column_tiles) * GROUP
        group_rows = tl.minimum(row_tiles - group, GROUP)
        place = tile % (GROUP * column_tiles)
        row = (group + place % group_rows) * BM
        column_tile = place // group_rows
        column = column_tile * BN
        b_products = tl.zeros((BM, BN), dtype=tl.float32)
        for k in tl.range(0, D, BK):
            b_weight = weight.load([column, k])
            b_products = tl.dot(hidden.load([row, k]), b_weight.T, b_products)

        b_row = row + tl.arange(0, BM)
        b_mask = b_row < n
        width = tl.minimum(v - column, BN)
        b_target = tl.load(target_ptr + b_row, mask=b_mask, other=-1)
        b_target = tiles.column_from(b_target, start + column, width)
        uneven = epilogues.uneven_quarters(b_target, width, BN // 4)
        logit_options = bias_ptr, v, scale, softcap
        b_quarters = epilogues.quarters(b_products)
        if lse_ptr is None:
            b_ref = tl.load(ref_ptr + b_row, mask=b_mask, other=0.0)
            b_sum = tl.zeros((BM,), dtype=tl.float32)
            b_peak = tl.full((BM,), -float("inf"), dtype=tl.float32)
            for quarter in tl.static_range(4):
                b_quarter_sum, b_quarter_peak = epilogues.softmax_quarter(
                    b_quarters[quarter],
                    logit_options,
                    b_ref,
                    b_target - quarter * (BN // 4),
                    target_logit_ptr + b_row,
                    out,
                    row,
                    column + quarter * (BN // 4),
                    uneven & (1 << quarter) != 0,
                    FAST,
                )
                b_sum += b_quarter_sum
                b_peak = tl.maximum(b_peak, b_quarter_peak)
            b_partial_ptr = partial_ptr + column_tile.to(tl.int64) * n + b_row
            tl.store(b_partial_ptr, b_sum, mask=b_mask)
            tl.store(b_partial_ptr + column_tiles.to(tl.int64) * n, b_peak, mask=b_mask)
        else:
            b_lse = tl.load(lse_ptr + b_row, mask=b_mask, other=0.0)
            b_rounding = tl.load(lse_ptr + n + b_row, mask=b_mask, other=0.0)
            b_factor = tl.load(upstream_ptr + b_row, mask=b_mask, other=0.0)
            if scale is not None:
                b_factor *= scale
            for quarter in tl.static_range(4):
                epilogues.grad_quarter(
                    b_quarters[quarter],
                    logit_options,
                    b_lse,
                    b_rounding,
                    b_factor,
                    b_target - quarter * (BN // 4),
                    out,
                    row,
                    column + quarter * (BN // 4),
                    uneven & (1 << quarter) != 0,
                    FAST,
                )


@triton.jit(
    do_not_specialize=["n", "column_tiles"], do_not_specialize_on_alignment=["overflow_ptr"]
)
def merge_kernel(
    partial_ptr,  # [2, column tiles, n]
    peak_ptr,  # [n]; so are the next two
    other_sum_ptr,
    target_logit_ptr,
    total_ptr,  # [n, D] or None
    overflow_ptr,  # [1]
    n,
    column_tiles,
    limit,
    D,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0)
    b_tile = tl.arange(0, BT)
    b_sum_ptr = partial_ptr + b_tile.to(tl.int64) * n + row
    b_peak_ptr = b_sum_ptr + column_tiles.to(tl.int64) * n
    block_sum = tl.sum(tl.load(b_sum_ptr, mask=b_tile < column_tiles, other=0.0), 0)
    block_peak = tl.max(tl.load(b_peak_ptr, mask=b_tile < column_tiles, other=-float("inf")), 0)
    ref = tl.load(peak_ptr + row)
    if block_peak - ref > limit:
        tl.store(overflow_ptr, 1)
    target_logit = tl.load(target_logit_ptr + row)
    is_read = target_logit == target_logit  # NaN before its block
    peak = tl.maximum(block_peak, tl.where(is_read, target_logit, -float("inf")))
    peak = tl.maximum(ref, peak)
    other_sum = (tl.load(other_sum_ptr + row) + block_sum) * tl.exp(ref - peak)
    if total_ptr is not None:
        tiles.rescale_row(total_ptr + row.to(tl.int64) * D, ref, peak, D, BD)
    # A maximum skips NaN, a sum does not.
    tl.store(peak_ptr + row, tl.where(other_sum == other_sum, peak, float("nan")))
    tl.store(other_sum_ptr + row, other_sum)


class BlockStatistics(NamedTuple):
    """A block's part of its rows' softmax, tile by tile, until `merge` adds it up."""

    partial: Tensor  # [2, column tiles, n], sums of exp(l - ref) and peaks, without the target
    limit: float  # exp(l - ref) is finite in the weights' dtype for l up to ref + limit


def can_run(hidden: Tensor, weight: Tensor, *, want_weights: bool = False) -> bool:
    """Tell if these 16-bit matrices can be multiplied here: on Hopper or later, by its TMA.

    Weights of a softmax in fp16 have too small a range.
    """
    return (
        not (want_weights and hidden.dtype == torch.float16)
        and launch.capability(hidden.device) >= 9
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and all(_is_aligned(matrix) for matrix in (hidden, weight))
    )


def online_softmax(
    hidden: Tensor,  # [n, D]
    weight: Tensor,  # [v, D]
    options: LogitOptions,
    target: Tensor,  # [n]
    running: RunningSoftmax,
    weights: Tensor | None,  # [n, v + padding]
) -> BlockStatistics:
    """Make a block's statistics for `merge`, and weights = slope * exp(l - running.peak).

    The peak is that of earlier blocks. A weight is 0 at the target, whose logit goes to `running`.
    """
    column_tiles = triton.cdiv(len(weight), _tile(hidden).entries)
    partial = running.peak.new_empty((2, column_tiles, len(hidden)))
    rows = {
        "ref_ptr": running.peak,
        "target_logit_ptr": running.target_logit,
        "partial_ptr": partial,
        "lse_ptr": None,
        "upstream_ptr": None,
    }
    _start(hidden, weight, weights, options, target, rows)
    return BlockStatistics(partial, _FP16_LIMIT if _is_fp16(weights) else _LIMIT)


def merge(
    block: BlockStatistics,
    running: RunningSoftmax,
    total: Tensor | None,  # [n, D]
    overflow: Tensor,  # [1] int32
) -> None:
    """Add a block to the statistics of its rows, and rescale total to the new peak, in place.

    total includes the block's weights by now. overflow becomes 1 where a logit was beyond the
    limit; all of the rows' results are worthless then.
    """
    _, column_tiles, n = block.partial.shape
    D = 1 if total is None else total.shape[1]
    launch.start(
        merge_kernel,
        (n,),
        {
            "partial_ptr": block.partial,
            "peak_ptr": running.peak,
            "other_sum_ptr": running.other_sum,
            "target_logit_ptr": running.target_logit,
            "total_ptr": total,
            "overflow_ptr": overflow,
            "n": n,
            "column_tiles": column_tiles,
            "limit": block.limit,
            "D": D,
            "BT": launch.block(column_tiles, 2**20),
            "BD": launch.block(D, 1024),
        },
        num_warps=4,
    )


def grad_logits(
    hidden: Tensor,  # [n, D]
    weight: Tensor,  # [v, D]
    options: LogitOptions,
    target: Tensor,  # [n]
    lse: Tensor,  # [2, n]
    upstream: Tensor,  # [n]
    out: Tensor,  # [n, v + padding]
) -> None:
    """out = upstream * scale * slope * (e_y - p)."""
    rows = {
        "ref_ptr": None,
        "target_logit_ptr": None,
        "partial_ptr": None,
        "lse_ptr": lse,
        "upstream_ptr": upstream,
    }
    _start(hidden, weight, out, options, target, rows)


def _start(
    hidden: Tensor,
    weight: Tensor,
    out: Tensor | None,
    options: LogitOptions,
    target: Tensor,
    rows: dict[str, Any],
) -> None:
    (n, D), v, tile = hidden.shape, len(weight), _tile(hidden)
    if not n:  # a descriptor of nothing is an error
        return
    tiles_of_block = triton.cdiv(n, tile.rows) * triton.cdiv(v, tile.entries)
    out_block = [tile.rows, tile.entries // 4]
    launch.start(
        head_gemm_kernel,
        (min(launch.multiprocessors(hidden.device), tiles_of_block),),
        {
            "hidden": TensorDescriptor.from_tensor(hidden, [tile.rows, tile.inner]),
            "weight": TensorDescriptor.from_tensor(weight, [tile.entries, tile.inner]),
            "out": None if out is None else TensorDescriptor.from_tensor(out, out_block),
            "bias_ptr": options.bias,
            "target_ptr": target,
            **rows,
            "n": n,
            "v": v,
            "start": options.start,
            "D": D,
            "scale": None if options.scale == 1.0 else options.scale,
            "softcap": options.softcap,
            "BM": tile.rows,
            "BN": tile.entries,
            "BK": tile.inner,
            "GROUP": _GROUP,
            "FLATTEN": tile.flatten,
            "FAST": launch.has_fast_maths(),
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _tile(hidden: Tensor) -> Tile:
    return TILES[min(launch.capability(hidden.device), max(TILES))]


def _is_aligned(matrix: Tensor) -> bool:
    """Tell if TMA can read a matrix: contiguous rows, each at a multiple of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0


def _is_fp16(weights: Tensor | None) -> bool:
    return weights is not None and weights.dtype == torch.float16
