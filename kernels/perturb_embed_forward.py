"""The forward kernels of `perturb_embed`; the maths and the counts are in `perturb_embed`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastperturb.kernels import perturb_embed_tiles as tiles


@triton.jit(do_not_specialize=tiles.VARYING)
def project_kernel(
    inner_ptr,  # [K, N, H] fp32: one partial sum for each part of the columns
    table_ptr,
    ids_ptr,
    A_ptr,  # [D, H]
    rho_ptr,
    table_stride,
    N,
    vocab,
    D: tl.constexpr,
    H: tl.constexpr,
    PART: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
):
    """(e / rho) A over PART columns: the product with A that all samples share."""
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    b_token = tl.program_id(0) * BT + tl.arange(0, BT)
    part = tl.program_id(1)
    b_h = tl.program_id(2) * BH + tl.arange(0, BH)
    b_live = b_token < N
    b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
    b_sum = tl.zeros([BT, BH], tl.float32)
    for start in range(0, PART, BD):
        b_d = part * PART + start + tl.arange(0, BD)
        b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, 0.0)
        b_A = tiles.matrix_tile(A_ptr, b_d, b_h, D, H).to(tl.float32)
        b_sum = tiles.dot_exact(b_e, b_A, b_sum, DTYPE)
    b_sum = b_sum / tl.load(rho_ptr).to(tl.float32)
    b_mask = b_live[:, None] & (b_h < H)[None, :]
    offset = (part.to(tl.int64) * N + b_token)[:, None] * H + b_h[None, :]
    tl.store(inner_ptr + offset, b_sum, mask=b_mask)


@triton.jit
def gate_tile(
    inner_ptr,
    C_ptr,
    b_token,
    N,
    b_d,
    D: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """tanh((e / rho) A C) [BT, BD] from the projected tokens."""
    b_sum = tl.zeros([b_token.shape[0], b_d.shape[0]], tl.float32)
    for start in range(0, H, BH):
        b_h = start + tl.arange(0, BH)
        b_inner = tiles.matrix_tile(inner_ptr, b_token, b_h, N, H)
        b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        b_sum = tiles.dot_narrow(b_inner, b_C, b_sum, DTYPE)
    return tiles.tanh(b_sum)


@triton.jit(do_not_specialize=tiles.VARYING)
def forward_kernel(
    out_ptr,  # [M, N, D]
    table_ptr,  # [vocab, D], or the embeddings [N, D] when there are no ids
    ids_ptr,  # [N] or None
    U_ptr,  # diagonal: s [D]; lowrank, gated: U [R, D]; affine: Ua [R, D]; mlp: B [R, H]
    V_ptr,  # affine: Ub [R, D]
    C_ptr,  # gated, mlp: C [H, D]
    inner_ptr,  # [N, H] fp32; gated: (e / rho) A; mlp: (e / rho) A + b
    rho_ptr,
    seed_ptr,
    samples_ptr,
    rows_ptr,
    positions_ptr,
    mask_ptr,
    table_stride,
    M,
    N,
    T,
    vocab,
    samples_m,
    samples_b,
    rows_b,
    rows_t,
    positions_b,
    positions_t,
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
    ND: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    first_d = pid % ND * BD
    b_token = pid // ND * BT + tl.arange(0, BT)
    b_d = first_d + tl.arange(0, BD)
    b_r = tl.arange(0, BR)
    b_h = tl.arange(0, BH)
    b_live = b_token < N
    seed = tl.load(seed_ptr)
    rho = tl.load(rho_ptr).to(tl.float32)
    b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
    b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, float("nan"))
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

    # What all samples share is loaded here once, where it fits one block.
    if FAMILY == "diagonal":
        b_s = tl.load(U_ptr + b_d, mask=b_d < D, other=0.0).to(tl.float32)
    elif FAMILY == "mlp":
        if H <= BH:
            b_still = tiles.matrix_tile(inner_ptr, b_token, b_h, N, H)
            b_rest = tiles.gelu(b_still)
            b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
            if R <= BR:
                b_U = tiles.matrix_tile(U_ptr, b_r, b_h, R, H)
    elif R <= BR:
        b_U = tiles.matrix_tile(U_ptr, b_r, b_d, R, D)
        if FAMILY == "affine":
            b_V = tiles.matrix_tile(V_ptr, b_r, b_d, R, D)
    if FAMILY == "gated":
        b_gain = gate_tile(inner_ptr, C_ptr, b_token, N, b_d, D, H, BH, DTYPE)
        b_gain += 1.0

    b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
    b_mask = b_live[:, None] & (b_d < D)[None, :]
    for _ in range(M):
        b_shift = tl.zeros([BT, BD], tl.float32)
        if FAMILY == "diagonal":
            b_z = tiles.latent_tile(
                seed, b_sample_ptr, tokens, first_d, BD, LATENT, ANTITHETIC, FAST
            )
            b_shift = b_s[None, :] * b_z
        elif FAMILY == "mlp":
            for h in range(0, H, BH):
                if H > BH:
                    b_still = tiles.matrix_tile(inner_ptr, b_token, h + b_h, N, H)
                    b_rest = tiles.gelu(b_still)
                    b_C = tiles.matrix_tile(C_ptr, h + b_h, b_d, H, D)
                b_hidden = b_still
                for r in range(0, R, BR):
                    if R > BR or H > BH:
                        b_U = tiles.matrix_tile(U_ptr, r + b_r, h + b_h, R, H)
                    b_z = tiles.latent_tile(
                        seed, b_sample_ptr, tokens, r, BR, LATENT, ANTITHETIC, FAST
                    )
                    b_hidden = tiles.dot(b_z, b_U, b_hidden, DTYPE)
                b_change = tiles.gelu(b_hidden) - b_rest
                b_shift = tiles.dot_narrow(b_change, b_C, b_shift, DTYPE)
        else:
            b_slope = tl.zeros([BT, BD], tl.float32)
            for r in range(0, R, BR):
                if R > BR:
                    b_U = tiles.matrix_tile(U_ptr, r + b_r, b_d, R, D)
                    if FAMILY == "affine":
                        b_V = tiles.matrix_tile(V_ptr, r + b_r, b_d, R, D)
                b_z = tiles.latent_tile(seed, b_sample_ptr, tokens, r, BR, LATENT, ANTITHETIC, FAST)
                if FAMILY == "affine":
                    b_shift = tiles.dot(b_z, b_V, b_shift, DTYPE)
                b_slope = tiles.dot(b_z, b_U, b_slope, DTYPE)
            if FAMILY == "lowrank":
                b_shift = b_slope
            elif FAMILY == "gated":
                b_shift = b_slope * b_gain
            else:
                b_shift = b_shift * rho + b_slope * b_e.to(tl.float32)
        scale = 1.0 if FAMILY == "affine" else rho
        b_out = b_e.to(tl.float32) + b_shift * scale
        tl.store(out_ptr + b_offset, b_out.to(DTYPE), mask=b_mask)
        out_ptr += tl.cast(N, tl.int64) * D
        b_sample_ptr += samples_m
