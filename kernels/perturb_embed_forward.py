"""The perturbed embeddings: T(e, z) for every sample.

A program owns BT tokens by BD columns: it reads e once and, for each sample, draws z in registers
and writes a tile. The maths of the families and the counts are in `perturb_embed`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch, maths, perturb_embed_projection
from fastperturb.kernels import perturb_embed_families as families
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout


@triton.jit(do_not_specialize=launch.VARYING)
def forward_kernel(
    out_ptr,  # [M, N, D]
    table_ptr,  # [vocab, D], or the embeddings [N, D] when there are no ids
    ids_ptr,  # [N] or None
    U_ptr,  # diagonal: s [D]; lowrank, gated: U [R, D]; affine: Ua [R, D]; mlp: B [R, H]
    V_ptr,  # affine: Ub [R, D]
    C_ptr,  # gated, mlp: C [H, D]
    projected_ptr,  # [N, H] fp32; gated: (e / rho) A; mlp: (e / rho) A + b
    rho_ptr,
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    table_stride,
    M,
    N,
    T,
    vocab,
    samples_stride_m,
    samples_stride_b,
    row_ids_stride_b,
    row_ids_stride_t,
    positions_stride_b,
    positions_stride_t,
    D: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    FAMILY: tl.constexpr,
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,  # (latent, antithetic, fast)
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
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
    b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, float("nan"))
    tokens = tiles.load_tokens(seed, b_token, b_live, T, row_ids, positions, mask_ptr, SCOPE)
    b_sample_ptr = samples_ptr + tokens.b_batch * samples_stride_b

    # Tiles that all samples share; where R or H is large, their first blocks.
    if FAMILY == "diagonal":
        b_s = tl.load(U_ptr + b_d, mask=b_d < D, other=0.0).to(tl.float32)
    elif FAMILY == "mlp":
        b_projected = tiles.matrix_tile(projected_ptr, b_token, b_h, N, H)
        b_gelu = maths.gelu(b_projected)
        b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        b_U = tiles.matrix_tile(U_ptr, b_r, b_h, R, H)
    else:
        b_U = tiles.matrix_tile(U_ptr, b_r, b_d, R, D)
    if FAMILY == "affine":
        b_V = tiles.matrix_tile(V_ptr, b_r, b_d, R, D)
    elif FAMILY == "gated":
        b_gain = families.gate_tile(projected_ptr, C_ptr, b_token, N, b_d, D, H, BH, DTYPE)
        b_gain += 1.0

    b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
    b_mask = b_live[:, None] & (b_d < D)[None, :]
    for _ in range(M):
        if FAMILY == "diagonal":
            b_shift = families.diagonal_shift(tokens, b_sample_ptr, rho, b_s, first_d, NOISE)
        elif FAMILY == "affine":
            b_shift = families.affine_shift(
                tokens, b_sample_ptr, rho, b_e, U_ptr, V_ptr, b_U, b_V, b_d, D, R, NOISE, DTYPE
            )
        elif FAMILY == "mlp":
            b_shift = families.mlp_shift(
                tokens,
                b_sample_ptr,
                rho,
                projected_ptr,
                U_ptr,
                C_ptr,
                b_projected,
                b_gelu,
                b_C,
                b_U,
                b_token,
                N,
                b_d,
                D,
                R,
                H,
                NOISE,
                DTYPE,
            )
        else:
            tl.static_assert(FAMILY == "lowrank" or FAMILY == "gated", "unknown family")
            b_shift = families.latent_product(
                tokens, b_sample_ptr, U_ptr, b_U, b_d, D, R, NOISE, DTYPE
            )
            if FAMILY == "gated":
                b_shift = b_shift * b_gain
            b_shift = b_shift * rho
        b_out = b_e.to(tl.float32) + b_shift
        tl.store(out_ptr + b_offset, b_out.to(DTYPE), mask=b_mask)
        out_ptr += tl.cast(N, tl.int64) * D
        b_sample_ptr += samples_stride_m


# (BT, BD, warps) for a 16-bit table and for fp32, where R <= 16 and H <= 64: the fewest
# instructions an element that the compiler fits into registers.
_TILES = {
    "diagonal": ((8, 256, 4), (8, 256, 4)),
    "lowrank": ((64, 128, 8), (64, 64, 8)),
    "gated": ((32, 128, 8), (32, 64, 8)),
    "affine": ((32, 128, 4), (32, 64, 4)),
    "mlp": ((16, 256, 4), (32, 64, 4)),
}


def tile_sizes(family: str, half: bool, R: int, H: int) -> tuple[int, int, int, int, int]:
    """Return (BT, BD, BR, BH, warps) that fit the registers, checked up to R = 128 and H = 256."""
    BT, BD, warps = _TILES[family][0 if half else 1]
    if family == "mlp" and not half and H > 64:
        BT = BT // 2
    return BT, BD, launch.block(R, 32), launch.block(H, 64), warps


def forward(layout: Layout, out: Tensor) -> None:
    """Write the perturbed embeddings [M, B, T, D] of a call to `out`."""
    BT, BD, BR, BH, num_warps = tile_sizes(layout.family, layout.half, layout.R, layout.H)
    BD = launch.block(layout.D, BD)
    launch.start(
        forward_kernel,
        (triton.cdiv(layout.N, BT) * triton.cdiv(layout.D, BD),),
        {
            **layout.source,
            **layout.noise,
            **layout.parameters,
            "out_ptr": out,
            "projected_ptr": perturb_embed_projection.project(layout),
            "M": layout.M,
            "FAMILY": layout.family,
            "BT": BT,
            "BD": BD,
            "BR": BR,
            "BH": BH,
        },
        num_warps=num_warps,
    )
