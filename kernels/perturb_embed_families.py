"""The families whose shift is a product, on tiles: their shifts, and the sums of one sample.

The functions `add_*` add the part of one sample, whose upstream gradient is b_g [BT, BD], to the
sums over samples and tokens, without the factor rho. The maths is in `perturb_embed`.

Arguments such as b_U hold the first block of a parameter, which is all of it where K fits one
block; else a function loads block after block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastperturb.kernels import maths
from fastperturb.kernels import perturb_embed_tiles as tiles


@triton.jit
def _times(b_x, b_U, b_sum, DTYPE: tl.constexpr):
    """b_sum + x U: latents are fp32, the inner layer's change has the table's dtype."""
    if b_x.dtype == tl.float32:
        return maths.dot(b_x, b_U, b_sum, DTYPE)
    else:
        return maths.dot_narrow(b_x, b_U, b_sum, b_x.dtype)


@triton.jit
def product(
    coordinates_ptr,  # [N, K]
    U_ptr,
    b_U,  # [BK, BD]
    b_token,
    N,
    b_d,
    D: tl.constexpr,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The coordinates times the directions U [BT, BD]: z U, for mlp (gelu(h + z B) - gelu(h)) C."""
    BK: tl.constexpr = b_U.shape[0]
    b_sum = tl.zeros([b_token.shape[0], b_d.shape[0]], tl.float32)
    for k in range(0, K, BK):
        b_k = k + tl.arange(0, BK)
        b_rows = b_U if K <= BK else tiles.matrix_tile(U_ptr, b_k, b_d, K, D)
        b_x = tiles.matrix_tile(coordinates_ptr, b_token, b_k, N, K)
        b_sum = _times(b_x, b_rows, b_sum, DTYPE)
    return b_sum


@triton.jit
def two_products(
    coordinates_ptr,  # [N, K]
    U_ptr,
    V_ptr,
    b_U,  # [BK, BD]; so is b_V
    b_V,
    b_token,
    N,
    b_d,
    D: tl.constexpr,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """z V and z U of affine, from one load of z."""
    BK: tl.constexpr = b_U.shape[0]
    b_bias = tl.zeros([b_token.shape[0], b_d.shape[0]], tl.float32)
    b_slope = tl.zeros([b_token.shape[0], b_d.shape[0]], tl.float32)
    for k in range(0, K, BK):
        b_k = k + tl.arange(0, BK)
        b_U_rows = b_U if K <= BK else tiles.matrix_tile(U_ptr, b_k, b_d, K, D)
        b_V_rows = b_V if K <= BK else tiles.matrix_tile(V_ptr, b_k, b_d, K, D)
        b_z = tiles.matrix_tile(coordinates_ptr, b_token, b_k, N, K)
        b_bias = maths.dot(b_z, b_V_rows, b_bias, DTYPE)
        b_slope = maths.dot(b_z, b_U_rows, b_slope, DTYPE)
    return b_bias, b_slope


@triton.jit
def gate_tile(
    projected_ptr,
    C_ptr,
    b_token,
    N,
    b_d,
    D: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """G = tanh((e / rho) A C) [BT, BD] from the projected tokens."""
    b_sum = tl.zeros([b_token.shape[0], b_d.shape[0]], tl.float32)
    for start in range(0, H, BH):
        b_h = start + tl.arange(0, BH)
        b_projected = tiles.matrix_tile(projected_ptr, b_token, b_h, N, H)
        b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        b_sum = maths.dot_narrow(b_projected, b_C, b_sum, DTYPE)
    return maths.tanh_for_a_gate(b_sum)


@triton.jit
def add_outer(b_sum, b_g, b_x):
    """dU' += g' x, [BD, BK], in the precision of the upstream gradient's dtype."""
    DTYPE: tl.constexpr = b_g.dtype
    if b_x.dtype == tl.float32:
        return maths.dot_exact(tl.trans(b_g), b_x, b_sum, DTYPE)
    else:
        return maths.dot_narrow(tl.trans(b_g), b_x, b_sum, DTYPE)
