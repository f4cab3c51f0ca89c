"""What the forward and backward kernels of `perturb_embed` share: tiles, products, launches.

A tile is BT tokens by BD columns. Tokens are numbered n = b T + t. Offsets into rows are int64
because M B T D passes 2^31 in ordinary use; counters are taken mod 2^32 by truncation.

Precision. Everything accumulates in fp32. For an fp32 table the products run as three tf32
products (error 2^-21 of a term, below what the noise contract grants z). For a 16-bit table

* `dot` rounds both operands to tf32: 2^-12 of a term, where bf16 rounds the result by 2^-9 and
  fp16 by 2^-12;
* `dot_exact` keeps an operand that is 16-bit already and splits the other into two 16-bit terms;
* `dot_narrow` rounds both to the table's dtype, as autocast would, where the flops are many.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastperturb.kernels import noise

# The parts of a launch that vary from batch to batch: specialising on them would recompile.
VARYING = [
    "M",
    "N",
    "T",
    "vocab",
    "samples_m",
    "samples_b",
    "rows_b",
    "rows_t",
    "positions_b",
    "positions_t",
    "segment",
    "split",
]


@triton.jit
def source_rows(ids_ptr, b_token, b_live, vocab):
    """Which table row each token reads, and whether there is one: an id out of range reads NaN."""
    if ids_ptr is None:
        return b_token.to(tl.int64), b_live
    else:
        b_id = tl.load(ids_ptr + b_token, mask=b_live, other=0)
        return b_id, b_live & (b_id >= 0) & (b_id < vocab)


@triton.jit
def embedding_tile(
    table_ptr, table_stride, b_source, b_known, b_d, D: tl.constexpr, OTHER: tl.constexpr
):
    """e [BT, BD] in the table's dtype, OTHER for tokens without a row and beyond D."""
    b_mask = b_known[:, None] & (b_d < D)[None, :]
    pointers = table_ptr + b_source[:, None] * table_stride + b_d[None, :]
    return tl.load(pointers, mask=b_mask, other=OTHER)


@triton.jit
def token_numbers(
    b_token,
    b_live,
    T,
    rows_ptr,
    rows_b,
    rows_t,
    positions_ptr,
    positions_b,
    positions_t,
    mask_ptr,
    SCOPE: tl.constexpr,
):
    """For each token its index b, the numbers (b, t) that key its noise, and whether it moves."""
    b_batch = (b_token // T).to(tl.int64)
    b_time = (b_token % T).to(tl.int64)
    b_row = tl.load(rows_ptr + b_batch * rows_b + b_time * rows_t, mask=b_live, other=0)
    b_row = b_row.to(tl.int32)
    if SCOPE == "token":
        offset = b_batch * positions_b + b_time * positions_t
        b_position = tl.load(positions_ptr + offset, mask=b_live, other=0).to(tl.int32)
    else:
        b_position = tl.zeros_like(b_row)
    b_moves = b_live
    if mask_ptr is not None:
        b_moves = b_live & (tl.load(mask_ptr + b_token, mask=b_live, other=0) != 0)
    return b_batch, b_row, b_position, b_moves


@triton.jit
def latent_tile(
    seed,
    b_sample_ptr,  # [BT], where each token's sample numbers are
    tokens,  # what `token_numbers` returned
    first,
    BR: tl.constexpr,
    LATENT: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    FAST: tl.constexpr,
):
    """z [BT, BR] from latent `first` on, 0 where the token does not move.

    Beyond R it meets only the zeros beyond a parameter's rows, or sums that nobody stores.
    """
    b_moves = tokens[3]
    b_sample = tl.load(b_sample_ptr, mask=b_moves, other=0).to(tl.int32)
    b_pair, b_sign = noise.pair_and_sign(b_sample, ANTITHETIC)
    quad = first // 4 + tl.arange(0, BR // 4)
    b_factor = tl.where(b_moves, b_sign, 0.0)
    return noise.tile(seed, quad, tokens[2], b_pair, tokens[1], b_factor, LATENT, FAST)


@triton.jit
def matrix_tile(ptr, b_i, b_j, I, J: tl.constexpr):  # noqa: E741
    """The entries (b_i, b_j) of a contiguous [I, J] matrix, 0 outside."""
    b_mask = (b_i < I)[:, None] & (b_j < J)[None, :]
    pointers = ptr + b_i.to(tl.int64)[:, None] * J + b_j[None, :]
    return tl.load(pointers, mask=b_mask, other=0.0)


@triton.jit
def store_matrix(ptr, b_i, b_j, b_value, I, J: tl.constexpr):  # noqa: E741
    b_mask = (b_i < I)[:, None] & (b_j < J)[None, :]
    tl.store(ptr + b_i.to(tl.int64)[:, None] * J + b_j[None, :], b_value, mask=b_mask)


@triton.jit
def _tf32(x):
    """Rounded to tf32, which the tensor cores would otherwise truncate to."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot(b_a, b_b, b_sum, DTYPE: tl.constexpr):
    """b_sum + b_a b_b to the precision of tf32, for an fp32 table of fp32."""
    b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    if DTYPE.is_fp32():
        return tl.dot(b_a, b_b, b_sum, input_precision="tf32x3")
    else:
        return tl.dot(_tf32(b_a), _tf32(b_b), b_sum, input_precision="tf32")


@triton.jit
def dot_exact(b_a, b_b, b_sum, DTYPE: tl.constexpr):
    """b_sum + b_a b_b where one operand is fp32 and the other of the table's dtype."""
    if DTYPE.is_fp32():
        return dot(b_a, b_b, b_sum, DTYPE)
    elif b_a.dtype == tl.float32:
        b_high = b_a.to(DTYPE)
        b_low = (b_a - b_high.to(tl.float32)).to(DTYPE)
        return tl.dot(b_high, b_b, tl.dot(b_low, b_b, b_sum))
    else:
        b_high = b_b.to(DTYPE)
        b_low = (b_b - b_high.to(tl.float32)).to(DTYPE)
        return tl.dot(b_a, b_high, tl.dot(b_a, b_low, b_sum))


@triton.jit
def dot_narrow(b_a, b_b, b_sum, DTYPE: tl.constexpr):
    """b_sum + b_a b_b with both operands rounded to the table's dtype."""
    if DTYPE.is_fp32():
        return dot(b_a, b_b, b_sum, DTYPE)
    else:
        return tl.dot(b_a.to(DTYPE), b_b.to(DTYPE), b_sum)


@triton.jit
def tanh(x):
    """Odd, saturating at 1: exp overflows to inf, which the quotient turns into 0."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def gelu_and_slope(x):
    """x Phi(x) and its derivative Phi(x) + x phi(x), sharing one exponential.

    Phi by the rational form 7.1.26 of Abramowitz and Stegun, within 1e-7: a quarter of libm's
    erf in instructions.
    """
    b_density = tl.exp2(x * x * -0.7213475204444817)
    b_t = 1.0 / (1.0 + tl.abs(x) * 0.23164189)
    b_tail = 0.7107068705 + b_t * (-0.7265760135 + b_t * 0.5307027145)
    b_tail = b_t * (0.127414796 + b_t * (-0.142248368 + b_t * b_tail))
    b_tail = b_tail * b_density
    b_cdf = tl.where(x < 0, b_tail, 1.0 - b_tail)
    return x * b_cdf, b_cdf + x * b_density * 0.3989422804014327


@triton.jit
def gelu(x):
    b_value, _ = gelu_and_slope(x)
    return b_value


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: int) -> None:
    """Every launch goes through here, so that a test can compile what would be launched."""
    if all(grid):
        like = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(like):  # Triton launches on the current device
            kernel[grid](**arguments, **options)


def fast_maths() -> bool:
    """The interpreter has no special function unit."""
    return not triton.knobs.runtime.interpret


def capability(device: torch.device) -> int:
    """The major compute capability; the interpreter runs what Hopper would."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def block(size: int, limit: int) -> int:
    """The block for a dimension of a product: a power of two of at least 16, at most `limit`."""
    return max(16, min(limit, triton.next_power_of_2(size)))
