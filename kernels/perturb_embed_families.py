"""The five families of transforms on tiles: their shifts, and the gradients of one sample.

A shift is T(e, z) - e [BT, BD]. The functions `add_*` add the part of one sample, whose upstream
gradient is b_g [BT, BD], to the sums over samples and tokens, without the factor rho that all of
them share. The maths is in `perturb_embed`.

Arguments such as b_U hold the first block of a parameter, which is all of it where R and H fit one
block; else a function loads block after block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastperturb.kernels import maths
from fastperturb.kernels import perturb_embed_tiles as tiles


@triton.jit
def diagonal_shift(
    tokens,
    b_sample_ptr,
    rho,
    b_s,  # [BD]
    first_d,
    NOISE: tl.constexpr,
):
    """rho s z."""
    BD: tl.constexpr = b_s.shape[0]
    b_z = tiles.latent_tile(tokens, b_sample_ptr, first_d, BD, NOISE)
    return b_s[None, :] * b_z * rho


@triton.jit
def add_diagonal(b_grad_s, b_g, b_z):
    """ds += g z, token by token."""
    return b_grad_s + b_g.to(tl.float32) * b_z


@triton.jit
def latent_product(
    tokens,
    b_sample_ptr,
    U_ptr,
    b_U,  # [BR, BD], all of U's columns b_d where R <= BR
    b_d,
    D: tl.constexpr,
    R: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """z U, the shift of lowrank and the shift before the gate of gated, without rho."""
    BR: tl.constexpr = b_U.shape[0]
    b_sum = tl.zeros([tokens.b_perturbed.shape[0], b_d.shape[0]], tl.float32)
    for r in range(0, R, BR):
        if R <= BR:
            b_rows = b_U
        else:
            b_rows = tiles.matrix_tile(U_ptr, r + tl.arange(0, BR), b_d, R, D)
        b_z = tiles.latent_tile(tokens, b_sample_ptr, r, BR, NOISE)
        b_sum = maths.dot(b_z, b_rows, b_sum, DTYPE)
    return b_sum


@triton.jit
def add_lowrank(b_grad_U, b_g, b_z, DTYPE: tl.constexpr):
    """dU += z' g."""
    return maths.dot_exact(tl.trans(b_g), b_z, b_grad_U, DTYPE)


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
def add_gated(b_grad_U, b_product, b_g, b_z, b_U, b_gate, DTYPE: tl.constexpr):
    """dU += z' (g (1 + G)) and the gate's part g (z U)."""
    b_gained = (b_g.to(tl.float32) * (1.0 + b_gate)).to(DTYPE)
    b_grad_U = maths.dot_exact(tl.trans(b_gained), b_z, b_grad_U, DTYPE)
    b_shift = maths.dot(b_z, b_U, tl.zeros(b_g.shape, tl.float32), DTYPE)
    return b_grad_U, b_product + b_g.to(tl.float32) * b_shift


@triton.jit
def through_gate(
    b_grad_C,
    b_product,  # sum_m g (z U)
    b_gate,
    rho,
    projected_ptr,
    C_ptr,
    b_token,
    last,
    b_d,
    b_h,
    D: tl.constexpr,
    H: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """With k = rho (1 - G^2) sum_m g (z U): dC + projected' k, and q = k C'."""
    b_grad_gate = b_product * (1.0 - b_gate * b_gate) * rho
    b_projected = tiles.matrix_tile(projected_ptr, b_token, b_h, last, H)
    b_grad_C = maths.dot_narrow(tl.trans(b_projected), b_grad_gate, b_grad_C, DTYPE)
    b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
    b_grad_projected = tl.zeros(b_projected.shape, tl.float32)
    return b_grad_C, maths.dot_narrow(b_grad_gate, tl.trans(b_C), b_grad_projected, DTYPE)


@triton.jit
def affine_shift(
    tokens,
    b_sample_ptr,
    rho,
    b_e,
    U_ptr,
    V_ptr,
    b_U,  # [BR, BD], as in latent_product; so is b_V
    b_V,
    b_d,
    D: tl.constexpr,
    R: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """rho z V + (z U) e; z is drawn once for both products."""
    BR: tl.constexpr = b_U.shape[0]
    b_bias = tl.zeros(b_e.shape, tl.float32)
    b_slope = tl.zeros(b_e.shape, tl.float32)
    for r in range(0, R, BR):
        if R <= BR:
            b_U_rows, b_V_rows = b_U, b_V
        else:
            b_U_rows = tiles.matrix_tile(U_ptr, r + tl.arange(0, BR), b_d, R, D)
            b_V_rows = tiles.matrix_tile(V_ptr, r + tl.arange(0, BR), b_d, R, D)
        b_z = tiles.latent_tile(tokens, b_sample_ptr, r, BR, NOISE)
        b_bias = maths.dot(b_z, b_V_rows, b_bias, DTYPE)
        b_slope = maths.dot(b_z, b_U_rows, b_slope, DTYPE)
    return b_bias * rho + b_slope * b_e.to(tl.float32)


@triton.jit
def add_affine(
    b_grad_U, b_grad_V, b_product, b_g, b_z, b_U, b_e, WANT_E: tl.constexpr, DTYPE: tl.constexpr
):
    """dUb += z' g, dUa += z' (g e) and, for e, g (z Ua)."""
    b_grad_V = maths.dot_exact(tl.trans(b_g), b_z, b_grad_V, DTYPE)
    b_scaled = (b_g.to(tl.float32) * b_e.to(tl.float32)).to(DTYPE)
    b_grad_U = maths.dot_exact(tl.trans(b_scaled), b_z, b_grad_U, DTYPE)
    if WANT_E:
        b_slope = maths.dot(b_z, b_U, tl.zeros(b_g.shape, tl.float32), DTYPE)
        b_product += b_g.to(tl.float32) * b_slope
    return b_grad_U, b_grad_V, b_product


@triton.jit
def mlp_shift(
    tokens,
    b_sample_ptr,
    rho,
    projected_ptr,
    U_ptr,  # B [R, H]
    C_ptr,
    b_projected,  # [BT, BH], h: all of it where H <= BH; so are the next two
    b_gelu,
    b_C,
    b_U,  # [BR, BH], all of B where R <= BR and H <= BH
    b_token,
    N,
    b_d,
    D: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """rho (gelu(h + z B) - gelu(h)) C, block after block of hidden units."""
    BR: tl.constexpr = b_U.shape[0]
    BH: tl.constexpr = b_U.shape[1]
    b_sum = tl.zeros([b_token.shape[0], b_d.shape[0]], tl.float32)
    for h in range(0, H, BH):
        b_h = h + tl.arange(0, BH)
        if H <= BH:
            b_hidden, b_gelu_h, b_C_rows = b_projected, b_gelu, b_C
        else:
            b_hidden = tiles.matrix_tile(projected_ptr, b_token, b_h, N, H)
            b_gelu_h = maths.gelu(b_hidden)
            b_C_rows = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        for r in range(0, R, BR):
            if R <= BR and H <= BH:
                b_rows = b_U
            else:
                b_rows = tiles.matrix_tile(U_ptr, r + tl.arange(0, BR), b_h, R, H)
            b_z = tiles.latent_tile(tokens, b_sample_ptr, r, BR, NOISE)
            b_hidden = maths.dot(b_z, b_rows, b_hidden, DTYPE)
        b_change = maths.gelu(b_hidden) - b_gelu_h
        b_sum = maths.dot_narrow(b_change, b_C_rows, b_sum, DTYPE)
    return b_sum * rho


@triton.jit
def hidden_tile(
    tokens,
    b_sample_ptr,
    b_projected,
    b_z,
    U_ptr,
    b_U,  # [BR, BH], all of B where R <= BR
    b_h,
    R: tl.constexpr,
    H: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """h + z B [BT, BH]; b_z is all of z where R <= BR, else it is drawn again block by block."""
    BR: tl.constexpr = b_U.shape[0]
    b_hidden = b_projected
    if R <= BR:
        b_hidden = maths.dot(b_z, b_U, b_hidden, DTYPE)
    else:
        for r in range(0, R, BR):
            b_rows = tiles.matrix_tile(U_ptr, r + tl.arange(0, BR), b_h, R, H)
            b_zr = tiles.latent_tile(tokens, b_sample_ptr, r, BR, NOISE)
            b_hidden = maths.dot(b_zr, b_rows, b_hidden, DTYPE)
    return b_hidden


@triton.jit
def add_mlp(
    b_grad_U,
    b_grad_C,
    b_grad_projected,
    b_g,
    b_z,
    b_hidden,  # h + z B
    b_gelu,  # of h; so is the slope
    b_slope,
    b_C,
    DTYPE: tl.constexpr,
):
    """With p = g C': dB += z' (p gelu'(h + z B)), q += p (gelu'(h + z B) - gelu'(h)), and dC."""
    b_value, b_slope_perturbed = maths.gelu_and_slope(b_hidden)
    b_grad_gelu = tl.zeros(b_hidden.shape, tl.float32)
    b_grad_gelu = maths.dot_narrow(b_g, tl.trans(b_C), b_grad_gelu, DTYPE)
    b_grad_projected += b_grad_gelu * (b_slope_perturbed - b_slope)
    b_grad_hidden = b_grad_gelu * b_slope_perturbed
    b_grad_U = maths.dot(tl.trans(b_z), b_grad_hidden, b_grad_U, DTYPE)
    b_change = tl.trans(b_value - b_gelu)
    b_grad_C = maths.dot_narrow(b_change, b_g, b_grad_C, DTYPE)
    return b_grad_U, b_grad_C, b_grad_projected
