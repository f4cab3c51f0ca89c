"""The heads' row passes (`head_blocks`) on GPUs; `torch_rows` says what each computes.

All are bound by memory. Each reads a block of fp32 products, [n, v] or [M, n, v], from DRAM once:

* `gather`: a program owns a row. It takes the row into its running statistics, then writes
  exp(l - peak) from the final peak. Up to 16,384 words stay in registers; a longer row goes
  through in tiles, and again for the writing, from L2. `total`'s row is touched only where the
  peak moved, which after k blocks of like words happens in one row of k + 1.
* `pull`: elementwise. Rows without an upstream gradient are not read.
* `couple`, `quadratic_pull`: a program owns one token and so many words that all M samples' p
  stay in registers. couple stores its sums over them, [tiles, M, n], for torch to add up.

No sum has an order that could vary: the same inputs give the same bits. Where the result goes over
the products themselves, no element is read after it has been overwritten.

What to expect of an H100 at 3.0 TB/s, with blocks of 2048 x 16384, for N = 8192 rows (quadratic:
8 samples of 1024 tokens), D = 4096, V = 128,256, bf16. PREDICTED: this code has been compiled for
sm_80, sm_90 and sm_100 and run in the interpreter, never yet on a GPU. Instructions are SASS per
element and thread, plain / with bias and soft cap; one costs 1.1 us a block at the issue limit.

                       bytes an element    block            call      instr.     regs      warps/SM
                       read    written     GB     ms        GB   ms
    gather             4       2           0.20   0.067     6.8  2.3   33 / 66   32 /  57   64 / 32
    gather, no pull    4       0           0.13   0.045     4.2  1.4   22 / 52   41 /  50   32 / 32
    pull               4       2           0.20   0.067     6.3  2.1   20 / 52   32 /  40   64 / 48
    couple             4       0           0.13   0.045     4.2  1.4   21 / 48   56 /  56   36 / 36
    quadratic_pull     4       2           0.20   0.067     6.3  2.1   25 / 55   80 / 138   24 / 12

The two GEMMs of a block are 0.79 ms at 700 TFLOP/s, those of a call 24.6 ms: the passes of a frozen
head should add 9% to them in `linear_logprob` and 20% in `linear_quadratic`. gather's 6.8 GB count
0.5 for `total`. With a soft cap issue takes as long as memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import perturb_embed_tiles as tiles

if TYPE_CHECKING:
    from fastperturb.ops.head_blocks import Logits, Running

_ROW_TILE = 16384  # words of a row that stays in registers, 16 a thread
_LONG_ROW_TILE = 8192  # of a longer row, 8 a thread: then two programs share a multiprocessor
_FLAT_TILE = 2048
_SAMPLES_TILE = 4096

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _tanh(x):
    """To 2 ulp, so that a soft-capped logit is as good as an fp32 one of any size.

    Near 0 the exponential form cancels; x + x^3 P(x^2) was fitted there, to 1.5e-8 relative.
    """
    b_square = x * x
    b_series = -0.0530454926 + b_square * 0.0172414873
    b_series = -0.3333314359 + b_square * (0.1332587898 + b_square * b_series)
    b_decay = tl.exp(-2.0 * tl.abs(x))
    b_far = 1.0 - 2.0 * b_decay / (1.0 + b_decay)
    b_far = tl.where(x < 0, -b_far, b_far)
    return tl.where(tl.abs(x) < 0.5, x + x * b_square * b_series, b_far)


@triton.jit
def _logits(b_products_ptr, bias_ptr, b_word, b_mask, v, scale, softcap):
    """The logits of a tile whose words b_word broadcast against it, -inf outside its mask."""
    b_l = tl.load(b_products_ptr, mask=b_mask, other=0.0)
    if bias_ptr is not None:
        b_l += tl.load(bias_ptr + b_word, mask=b_word < v, other=0.0).to(tl.float32)
    b_l *= scale
    if softcap is not None:
        b_l = softcap * _tanh(b_l * (1.0 / softcap))
    return tl.where(b_mask, b_l, -float("inf"))


@triton.jit
def _through_softcap(b_grad, b_l, softcap):
    """A gradient with respect to the logits, times their slope."""
    if softcap is None:
        return b_grad
    else:
        b_bent = b_l * (1.0 / softcap)
        return b_grad * tl.maximum(1.0 - b_bent * b_bent, 0.0)  # 0 where l = -inf


@triton.jit
def _spread(offset):
    """q (l - peak), 0 for q = 0."""
    return tl.exp(offset) * tl.maximum(offset, _LOWEST)


@triton.jit
def _raised(spread, others, at_target, peak, new_peak):
    """The sum of q (l - peak) that `peak` stood for, the target's included, seen from new_peak."""
    met = tl.where(at_target == at_target, tl.exp(at_target - peak), 0.0)
    step = tl.maximum(peak - new_peak, _LOWEST)
    return tl.exp(step) * (spread + step * (others + met))


@triton.jit
def _other_logits(row_ptr, bias_ptr, b_word, target, v, scale, softcap):
    """A row's logits at the words b_word, -inf at the target."""
    b_l = _logits(row_ptr + b_word, bias_ptr, b_word, b_word < v, v, scale, softcap)
    return tl.where(b_word == target, -float("inf"), b_l)


@triton.jit
def _rescale(total_ptr, old_peak, peak, D, BD: tl.constexpr):
    """A row of total, seen from the new peak; before the first block it is 0 and stays so."""
    if (peak != old_peak) & (old_peak > _LOWEST):
        for column in range(0, D, BD):
            b_d = column + tl.arange(0, BD)
            b_total = tl.load(total_ptr + b_d, mask=b_d < D, other=0.0)
            tl.store(total_ptr + b_d, b_total * tl.exp(old_peak - peak), mask=b_d < D)


@triton.jit
def _word_of(target_ptr, token, start, v):
    """The target's column in the block, -1 if it lies elsewhere."""
    word = tl.load(target_ptr + token) - start
    return tl.where((word >= 0) & (word < v), word, -1).to(tl.int32)


@triton.jit(do_not_specialize=["start"])
def gather_kernel(
    products_ptr,  # [n, v]
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    peak_ptr,  # [n], as the next three
    others_ptr,
    at_target_ptr,
    spread_ptr,  # or None
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
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * v
    target = _word_of(target_ptr, row, start, v)
    old_peak = tl.load(peak_ptr + row)
    others = tl.load(others_ptr + row)
    at_target = tl.load(at_target_ptr + row)

    # The target first, alone, and then all others: spread is of both.
    word = tl.maximum(target, 0)
    met = _logits(products_ptr + first + word, bias_ptr, word, target >= 0, v, scale, softcap)
    peak = tl.maximum(old_peak, met)
    if spread_ptr is not None:
        spread = tl.load(spread_ptr + row)
        spread = _raised(spread, others, at_target, old_peak, peak) + _spread(met - peak)
    others *= tl.exp(old_peak - peak)
    at_target = tl.where(target >= 0, met, at_target)
    # disable_licm: what could be hoisted out of these loops would fill the registers.
    for tile in tl.range(0, num_tiles, disable_licm=True):
        b_word = tile * BV + tl.arange(0, BV)
        b_l = _other_logits(products_ptr + first, bias_ptr, b_word, target, v, scale, softcap)
        new_peak = tl.maximum(peak, tl.max(b_l, 0))
        if spread_ptr is not None:
            spread = _raised(spread, others, at_target, peak, new_peak)
            spread += tl.sum(_spread(b_l - new_peak), 0)
        others = others * tl.exp(peak - new_peak) + tl.sum(tl.exp(b_l - new_peak), 0)
        peak = new_peak

    if weights_ptr is not None:
        for tile in tl.range(0, num_tiles, disable_licm=True):
            b_word = tile * BV + tl.arange(0, BV)
            b_l = _other_logits(products_ptr + first, bias_ptr, b_word, target, v, scale, softcap)
            b_q = _through_softcap(tl.exp(b_l - peak), b_l, softcap)
            tl.store(weights_ptr + first + b_word, b_q, mask=b_word < v)
    if total_ptr is not None:
        _rescale(total_ptr + row.to(tl.int64) * D, old_peak, peak, D, BD)
    # A maximum skips NaN, a sum does not. (Triton would take a global NaN for one that changes.)
    tl.store(peak_ptr + row, tl.where(others == others, peak, float("nan")))
    tl.store(others_ptr + row, others)
    tl.store(at_target_ptr + row, at_target)
    if spread_ptr is not None:
        tl.store(spread_ptr + row, spread)


@triton.jit(do_not_specialize=["start"])
def pull_kernel(
    products_ptr,  # [n, v]
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    lse_ptr,  # [2, n], what rounding took off it last
    upstream_ptr,  # [n]
    out_ptr,  # [n, v]
    start,
    scale,
    softcap,
    v,
    BV: tl.constexpr,
):
    num_tiles = tl.cdiv(v, BV)
    row = tl.program_id(0) // num_tiles
    b_word = tl.program_id(0) % num_tiles * BV + tl.arange(0, BV)
    b_offset = row.to(tl.int64) * v + b_word
    lse = tl.load(lse_ptr + row)
    rest = tl.load(lse_ptr + tl.num_programs(0) // num_tiles + row)
    upstream = tl.load(upstream_ptr + row)
    b_live = b_word < tl.where(upstream != 0, v, 0)
    b_l = _logits(products_ptr + b_offset, bias_ptr, b_word, b_live, v, scale, softcap)
    b_grad = -tl.exp(b_l - lse - rest)
    b_grad = tl.where(b_word == _word_of(target_ptr, row, start, v), b_grad + 1.0, b_grad)
    b_grad = _through_softcap(b_grad * (scale * upstream), b_l, softcap)
    tl.store(out_ptr + b_offset, b_grad, mask=b_word < v)


@triton.jit
def _samples_tile(
    products_ptr,  # [M, n, v]
    bias_ptr,
    lse_ptr,  # [2, M, n]
    row_weights_ptr,  # [M, n]
    token,
    n,
    b_word,  # [1, BV]
    b_live,  # [1, BV]
    v,
    scale,
    softcap,
    M,
    BM: tl.constexpr,
):
    """One token's rows (m, token) and offsets, logits, p and r, and S - r p: [BM, 1] or [BM, BV].

    p is 0 outside M and where words are not live.
    """
    b_m = tl.arange(0, BM)[:, None]
    b_row = b_m.to(tl.int64) * n + token
    b_offset = b_row * v + b_word
    b_mask = (b_m < M) & b_live
    b_l = _logits(products_ptr + b_offset, bias_ptr, b_word, b_mask, v, scale, softcap)
    b_lse = tl.load(lse_ptr + b_row, mask=b_m < M, other=0.0)
    b_rest = tl.load(lse_ptr + M * n + b_row, mask=b_m < M, other=0.0)
    b_p = tl.exp(b_l - b_lse - b_rest)
    b_r = tl.load(row_weights_ptr + b_row, mask=b_m < M, other=0.0)
    b_rp = b_r * b_p
    return b_row, b_offset, b_l, b_p, b_r, tl.sum(b_rp, 0, keep_dims=True) - b_rp


@triton.jit(do_not_specialize=["n"])
def couple_kernel(
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
):
    num_tiles = tl.cdiv(v, BV)
    token = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    b_word = (tile * BV + tl.arange(0, BV))[None, :]
    b_row, _, _, b_p, _, b_others = _samples_tile(
        products_ptr,
        bias_ptr,
        lse_ptr,
        row_weights_ptr,
        token,
        n,
        b_word,
        b_word < v,
        v,
        scale,
        softcap,
        M,
        BM,
    )
    b_sum = tl.sum(b_p * b_others, 1, keep_dims=True)
    b_ptr = partial_ptr + tile.to(tl.int64) * M * n + b_row
    tl.store(b_ptr, b_sum, mask=tl.arange(0, BM)[:, None] < M)


@triton.jit(do_not_specialize=["n", "start"])
def quadratic_pull_kernel(
    products_ptr,  # [M, n, v]
    bias_ptr,  # [v] or None
    target_ptr,  # [n]
    lse_ptr,  # [2, M, n]
    row_weights_ptr,  # [M, n]
    dots_ptr,  # [M, n]
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
):
    num_tiles = tl.cdiv(v, BV)
    token = tl.program_id(0) // num_tiles
    b_word = (tl.program_id(0) % num_tiles * BV + tl.arange(0, BV))[None, :]
    upstream = tl.load(upstream_ptr + token)
    b_live = b_word < tl.where(upstream != 0, v, 0)
    b_row, b_offset, b_l, b_p, b_r, b_others = _samples_tile(
        products_ptr,
        bias_ptr,
        lse_ptr,
        row_weights_ptr,
        token,
        n,
        b_word,
        b_live,
        v,
        scale,
        softcap,
        M,
        BM,
    )
    b_within = tl.arange(0, BM)[:, None] < M
    b_g = b_others * (b_r * (-2.0 / (M * (M - 1))))
    b_is_target = b_word == _word_of(target_ptr, token, start, v)
    b_g = tl.where(b_is_target, b_g + b_r * (2.0 / M), b_g)
    b_grad = b_p * (b_g - tl.load(dots_ptr + b_row, mask=b_within, other=0.0))
    b_grad = _through_softcap(b_grad * (scale * upstream), b_l, softcap)
    tl.store(out_ptr + b_offset, b_grad, mask=b_within & (b_word < v))


def gather(
    products: Tensor,  # [n, v]
    options: Logits,
    target: Tensor,  # [n]
    running: Running,
    weights: Tensor | None,  # [n, v]
    total: Tensor | None,  # [n, D]
) -> None:
    n, v = products.shape
    whole = v <= _ROW_TILE
    BV = tiles.block(v, _ROW_TILE) if whole else _LONG_ROW_TILE
    num_warps = max(1, BV // 512) if whole else 32
    D = 1 if total is None else total.shape[1]
    tiles.launch(
        gather_kernel,
        (n,),
        {
            **_logits_arguments(products, options),
            "target_ptr": target,
            "peak_ptr": running.peak,
            "others_ptr": running.others,
            "at_target_ptr": running.at_target,
            "spread_ptr": running.spread,
            "weights_ptr": weights,
            "total_ptr": total,
            "start": options.start,
            "num_tiles": triton.cdiv(v, BV),
            "D": D,
            "BV": BV,
            "BD": tiles.block(D, 128 * num_warps),
        },
        num_warps=num_warps,
    )


def pull(
    products: Tensor,  # [n, v]
    options: Logits,
    target: Tensor,  # [n]
    lse: Tensor,  # [2, n]
    upstream: Tensor,  # [n]
    out: Tensor,  # [n, v]
) -> None:
    n, v = products.shape
    BV = tiles.block(v, _FLAT_TILE)
    tiles.launch(
        pull_kernel,
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


def couple(
    products: Tensor,  # [M, n, v]
    options: Logits,
    lse: Tensor,  # [2, M, n]
    row_weights: Tensor,  # [M, n]
    crossed: Tensor,  # [M, n]
) -> None:
    M, n, v = products.shape
    BM, BV = _samples_block(M, v)
    num_tiles = triton.cdiv(v, BV)
    partial = crossed.new_empty((num_tiles, M, n))
    tiles.launch(
        couple_kernel,
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
        },
        num_warps=_warps(BM * BV),
    )
    crossed += partial.sum(0)


def quadratic_pull(
    products: Tensor,  # [M, n, v]
    options: Logits,
    target: Tensor,  # [n]
    lse: Tensor,  # [2, M, n]
    row_weights: Tensor,  # [M, n]
    dots: Tensor,  # [M, n]
    upstream: Tensor,  # [n]
    out: Tensor,  # [M, n, v]
) -> None:
    M, n, v = products.shape
    BM, BV = _samples_block(M, v)
    tiles.launch(
        quadratic_pull_kernel,
        (n * triton.cdiv(v, BV),),
        {
            **_logits_arguments(products, options),
            "target_ptr": target,
            "lse_ptr": lse,
            "row_weights_ptr": row_weights,
            "dots_ptr": dots,
            "upstream_ptr": upstream,
            "out_ptr": out,
            "n": n,
            "start": options.start,
            "M": M,
            "BM": BM,
            "BV": BV,
        },
        num_warps=_warps(BM * BV),
    )


def _logits_arguments(products: Tensor, options: Logits) -> dict[str, Any]:
    return {
        "products_ptr": products,
        "bias_ptr": options.bias,
        "scale": options.scale,
        "softcap": options.softcap,
        "v": products.shape[-1],
    }


def _samples_block(M: int, v: int) -> tuple[int, int]:
    """BM >= M samples by BV words: of at least 128 bytes, which is what a memory access moves."""
    BM = triton.next_power_of_2(M)
    return BM, tiles.block(v, max(32, _SAMPLES_TILE // BM))


def _warps(elements: int) -> int:
    """32 elements a thread."""
    return max(1, min(16, elements // 1024))
