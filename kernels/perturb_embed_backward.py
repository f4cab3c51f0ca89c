"""The backward kernels of `perturb_embed`; the maths and the counts are in `perturb_embed`.

A program owns BD columns of a slab of tokens. It walks the slab tile by tile and, within a tile,
sample by sample, reads each upstream gradient once, redraws z, and keeps the parameters'
gradients of its columns in registers. It stores one partial sum; torch adds the slabs in a
fixed order. No atomics, so the same seed gives the same bits in every run.

Slabs lie within segments: one segment of all N tokens for the gradient, one per row b for
per-sample gradients, where each sample is also a group of its own (grid axis 1).

What needs a sum over all D columns is linear in what one block of columns knows, so blocks store
partial sums of the gradient of `inner` = (e / rho) A, and `inner_kernel` carries their total on
to A and e. R or H beyond one block goes to grid axis 2, and each of those reads the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastperturb.kernels import perturb_embed_forward as forward
from fastperturb.kernels import perturb_embed_tiles as tiles


@triton.jit(do_not_specialize=tiles.VARYING)
def backward_kernel(
    grad_ptr,  # [M, N, D]
    grad_e_ptr,  # [PARTS, N, D], sum_m g and what else reaches e here, or None
    grad_U_ptr,  # [G, S, R, D] fp32; diagonal: [G, S, 1, D]; mlp: [G, S, ND, R, H]
    grad_V_ptr,  # affine: [G, S, R, D] fp32
    grad_C_ptr,  # gated, mlp: [G, S, PARTS, H, D] fp32
    grad_inner_ptr,  # gated, mlp: [PARTS, ND, G, N, H] fp32
    table_ptr,
    ids_ptr,
    U_ptr,
    V_ptr,
    C_ptr,
    inner_ptr,
    rho_ptr,
    seed_ptr,
    samples_ptr,
    rows_ptr,
    positions_ptr,
    mask_ptr,
    table_stride,
    M,  # samples of one group
    N,
    T,
    vocab,
    samples_m,
    samples_b,
    rows_b,
    rows_t,
    positions_b,
    positions_t,
    segment,  # tokens of a segment
    split,  # tokens of a slab
    D: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    FAMILY: tl.constexpr,
    SCOPE: tl.constexpr,
    LATENT: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    FAST: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    WANT_E: tl.constexpr = grad_e_ptr is not None
    ND: tl.constexpr = (D + BD - 1) // BD
    NR: tl.constexpr = (R + BR - 1) // BR
    PARTS: tl.constexpr = NR if FAMILY == "gated" or FAMILY == "affine" else 1
    slab = tl.program_id(0) // ND
    block_d = tl.program_id(0) % ND
    group = tl.program_id(1)
    block_r = tl.program_id(2) % NR
    block_h = tl.program_id(2) // NR
    part = block_r % PARTS
    first = slab // tl.cdiv(segment, split) * segment
    last = tl.minimum(first + segment, N)
    first += slab % tl.cdiv(segment, split) * split
    last = tl.minimum(first + split, last)
    b_d = block_d * BD + tl.arange(0, BD)
    b_r = block_r * BR + tl.arange(0, BR)
    b_h = block_h * BH + tl.arange(0, BH)
    seed = tl.load(seed_ptr)
    rho = tl.load(rho_ptr).to(tl.float32)
    sample_stride = tl.cast(N, tl.int64) * D
    grad_ptr += tl.cast(group, tl.int64) * M * sample_stride
    samples_ptr += tl.cast(group, tl.int64) * M * samples_m
    slab += tl.cast(group, tl.int64) * (tl.num_programs(0) // ND)

    if FAMILY == "diagonal":
        b_grad_s = tl.zeros([BT, BD], tl.float32)
    elif FAMILY == "mlp":
        b_grad_U = tl.zeros([BR, BH], tl.float32)
        b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        if R <= BR:
            b_U = tiles.matrix_tile(U_ptr, b_r, b_h, R, H)
    else:
        # Columns first: [BD, BR] has the 64 rows that the warpgroup's product wants.
        b_grad_U = tl.zeros([BD, BR], tl.float32)
        if FAMILY == "affine":
            b_grad_V = tl.zeros([BD, BR], tl.float32)
        if FAMILY != "lowrank":
            b_U = tiles.matrix_tile(U_ptr, b_r, b_d, R, D)
    if FAMILY == "gated" or FAMILY == "mlp":
        b_grad_C = tl.zeros([BH, BD], tl.float32)

    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_live = b_token < last
        b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
        b_mask = b_live[:, None] & (b_d < D)[None, :]
        tokens = tiles.token_numbers(
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
            SCOPE,
        )
        b_sample_ptr = samples_ptr + tokens[0] * samples_b
        if FAMILY == "affine":
            b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
            b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, 0.0)
        if FAMILY == "gated":
            b_gate = forward.gate_tile(inner_ptr, C_ptr, b_token, N, b_d, D, H, BH, DTYPE)
        if FAMILY == "mlp":
            b_still = tiles.matrix_tile(inner_ptr, b_token, b_h, N, H)
            b_rest, b_rest_slope = tiles.gelu_and_slope(b_still)
            b_grad_inner = tl.zeros([BT, BH], tl.float32)
        b_grad_e = tl.zeros([BT, BD], tl.float32)
        b_product = tl.zeros([BT, BD], tl.float32)  # sum_m g (z U)

        tile_ptr = grad_ptr
        for _ in range(M):
            b_g = tl.load(tile_ptr + b_offset, mask=b_mask, other=0.0)
            if FAMILY == "diagonal":
                b_z = tiles.latent_tile(
                    seed, b_sample_ptr, tokens, block_d * BD, BD, LATENT, ANTITHETIC, FAST
                )
                b_grad_s += b_g.to(tl.float32) * b_z
            else:
                b_z = tiles.latent_tile(
                    seed, b_sample_ptr, tokens, block_r * BR, BR, LATENT, ANTITHETIC, FAST
                )
            if FAMILY == "lowrank":
                b_grad_U = tiles.dot_exact(tl.trans(b_g), b_z, b_grad_U, DTYPE)
            if FAMILY == "affine":
                b_grad_V = tiles.dot_exact(tl.trans(b_g), b_z, b_grad_V, DTYPE)
                b_scaled = (b_g.to(tl.float32) * b_e.to(tl.float32)).to(DTYPE)
                b_grad_U = tiles.dot_exact(tl.trans(b_scaled), b_z, b_grad_U, DTYPE)
            if FAMILY == "gated":
                b_gained = (b_g.to(tl.float32) * (1.0 + b_gate)).to(DTYPE)
                b_grad_U = tiles.dot_exact(tl.trans(b_gained), b_z, b_grad_U, DTYPE)
            if FAMILY == "gated" or (FAMILY == "affine" and WANT_E):
                b_move = tiles.dot(b_z, b_U, tl.zeros([BT, BD], tl.float32), DTYPE)
                b_product += b_g.to(tl.float32) * b_move
            if FAMILY == "mlp":
                b_hidden = b_still
                if R <= BR:
                    b_hidden = tiles.dot(b_z, b_U, b_hidden, DTYPE)
                else:
                    for r in range(0, R, BR):
                        b_U = tiles.matrix_tile(U_ptr, r + tl.arange(0, BR), b_h, R, H)
                        b_zr = tiles.latent_tile(
                            seed, b_sample_ptr, tokens, r, BR, LATENT, ANTITHETIC, FAST
                        )
                        b_hidden = tiles.dot(b_zr, b_U, b_hidden, DTYPE)
                b_value, b_slope = tiles.gelu_and_slope(b_hidden)
                b_grad_gelu = tl.zeros([BT, BH], tl.float32)
                b_grad_gelu = tiles.dot_narrow(b_g, tl.trans(b_C), b_grad_gelu, DTYPE)
                b_grad_inner += b_grad_gelu * (b_slope - b_rest_slope)
                b_grad_hidden = b_grad_gelu * b_slope
                b_grad_U = tiles.dot(tl.trans(b_z), b_grad_hidden, b_grad_U, DTYPE)
                b_change = tl.trans(b_value - b_rest)
                b_grad_C = tiles.dot_narrow(b_change, b_g, b_grad_C, DTYPE)
            if WANT_E:
                b_grad_e += b_g.to(tl.float32)
            tile_ptr += sample_stride
            b_sample_ptr += samples_m

        if WANT_E:
            # Only affine has more than one part of it: the others' first block tells it all.
            part_e = part if FAMILY == "affine" else 0
            if FAMILY == "affine":
                b_grad_e = tl.where(part == 0, b_grad_e, 0.0) + b_product
            e_ptr = grad_e_ptr + part_e * sample_stride + b_offset
            stored = b_mask & (tl.program_id(2) == part_e)
            tl.store(e_ptr, b_grad_e.to(grad_e_ptr.dtype.element_ty), mask=stored)
        if FAMILY == "gated":
            b_grad_gate = b_product * (1.0 - b_gate * b_gate) * rho
            b_inner = tiles.matrix_tile(inner_ptr, b_token, b_h, last, H)
            b_grad_C = tiles.dot_narrow(tl.trans(b_inner), b_grad_gate, b_grad_C, DTYPE)
            b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
            b_grad_inner = tl.zeros([BT, BH], tl.float32)
            b_grad_inner = tiles.dot_narrow(b_grad_gate, tl.trans(b_C), b_grad_inner, DTYPE)
        if FAMILY == "mlp":
            b_grad_inner *= rho
        if FAMILY == "gated" or FAMILY == "mlp":
            plane = (part * ND + block_d) * tl.num_programs(1) + group
            base = grad_inner_ptr + tl.cast(plane, tl.int64) * N * H
            stored = tl.where(block_r == part, last, 0)
            tiles.store_matrix(base, b_token, b_h, b_grad_inner, stored, H)

    if FAMILY == "diagonal":
        b_sum = tl.sum(b_grad_s, axis=0) * rho
        tl.store(grad_U_ptr + slab * D + b_d, b_sum, mask=b_d < D)
    elif FAMILY == "mlp":
        base = grad_U_ptr + (slab * ND + block_d) * (R * H)
        tiles.store_matrix(base, b_r, b_h, b_grad_U * rho, R, H)
    else:
        rows = tl.where(block_h == 0, R, 0)
        scale = 1.0 if FAMILY == "affine" else rho
        tiles.store_matrix(grad_U_ptr + slab * R * D, b_r, b_d, tl.trans(b_grad_U) * scale, rows, D)
        if FAMILY == "affine":
            tiles.store_matrix(grad_V_ptr + slab * R * D, b_r, b_d, tl.trans(b_grad_V) * rho, R, D)
    if FAMILY == "gated" or FAMILY == "mlp":
        scale = rho if FAMILY == "mlp" else 1.0
        base = grad_C_ptr + (slab * PARTS + part) * (H * D)
        rows = tl.where(block_r == part, H, 0)
        tiles.store_matrix(base, b_h, b_d, b_grad_C * scale, rows, D)


@triton.jit(do_not_specialize=tiles.VARYING)
def inner_kernel(
    grad_A_ptr,  # [G, S, D, H] fp32
    grad_e_ptr,  # [N, D] in the table's dtype, or None
    sum_ptr,  # [N, D] fp32, sum_m g, or None
    grad_inner_ptr,  # [G, N, H] fp32
    table_ptr,
    ids_ptr,
    A_ptr,  # [D, H]
    rho_ptr,
    table_stride,
    N,
    vocab,
    segment,
    split,
    D: tl.constexpr,
    H: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
):
    """From the gradient of inner = (e / rho) A to those of A and e."""
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    ND: tl.constexpr = (D + BD - 1) // BD
    slab = tl.program_id(0) // ND
    group = tl.cast(tl.program_id(1), tl.int64)
    first = slab // tl.cdiv(segment, split) * segment
    last = tl.minimum(first + segment, N)
    first += slab % tl.cdiv(segment, split) * split
    last = tl.minimum(first + split, last)
    b_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    b_h = tl.program_id(2) * BH + tl.arange(0, BH)
    grad_inner_ptr += group * N * H
    rho = tl.load(rho_ptr).to(tl.float32)
    b_grad_A = tl.zeros([BH, BD], tl.float32)
    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_live = b_token < last
        b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
        b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, 0.0)
        b_grad_inner = tiles.matrix_tile(grad_inner_ptr, b_token, b_h, last, H)
        b_grad_A = tiles.dot_exact(tl.trans(b_grad_inner), b_e, b_grad_A, DTYPE)
        if grad_e_ptr is not None:
            b_through = tl.zeros([BT, BD], tl.float32)
            for h in range(0, H, BH):
                b_hh = h + tl.arange(0, BH)
                b_part = tiles.matrix_tile(grad_inner_ptr, b_token, b_hh, last, H)
                b_A = tiles.matrix_tile(A_ptr, b_d, b_hh, D, H)
                b_through = tiles.dot(b_part, tl.trans(b_A), b_through, DTYPE)
            b_sum = tiles.matrix_tile(sum_ptr, b_token, b_d, last, D) + b_through / rho
            rows = tl.where(tl.program_id(2) == 0, last, 0)
            tiles.store_matrix(grad_e_ptr, b_token, b_d, b_sum.to(DTYPE), rows, D)
    base = grad_A_ptr + (group * (tl.num_programs(0) // ND) + slab) * (D * H)
    tiles.store_matrix(base, b_d, b_h, tl.trans(b_grad_A) / rho, D, H)
