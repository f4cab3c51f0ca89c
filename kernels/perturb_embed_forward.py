"""The perturbed embeddings T(e, z) of every family whose shift is a product: all but diagonal.

A program owns BT tokens by BD columns: it reads e once and, for each sample, multiplies a row of
coordinates for each token (the latents; for mlp the inner layer's change) by the directions of its
columns. The maths of the families and the counts are in `perturb_embed`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch
from fastperturb.kernels import perturb_embed_diagonal as diagonal
from fastperturb.kernels import perturb_embed_families as families
from fastperturb.kernels import perturb_embed_hidden as hidden
from fastperturb.kernels import perturb_embed_latents as latents
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout


@triton.jit(do_not_specialize=launch.VARYING)
def forward_kernel(
    out_ptr,  # [M, N, D], of samples that are sample_tokens apart
    squared_shift_ptr,  # [ND, M, N] fp32, or None
    table_ptr,  # [vocab, D], or the embeddings [N, D] when there are no ids
    ids_ptr,  # [N] or None
    coordinates_ptr,  # [M, N, K]: z in fp32; mlp: gelu(h + z B) - gelu(h) in the table's dtype
    U_ptr,  # [K, D]; affine: Ua; mlp: C
    V_ptr,  # affine: Ub [K, D]
    C_ptr,  # gated: C [H, D]
    projected_ptr,  # gated: (e / rho) A [N, H] fp32
    rho_ptr,
    table_stride,
    M,
    N,
    vocab,
    sample_tokens,
    part_samples,  # the samples of a program
    D: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    FAMILY: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    ND: tl.constexpr = (D + BD - 1) // BD
    block_d = tl.program_id(0) % ND
    b_token = tl.program_id(0) // ND * BT + tl.arange(0, BT)
    b_d = block_d * BD + tl.arange(0, BD)
    b_live = b_token < N
    first = tl.program_id(1) * part_samples
    rho = tl.load(rho_ptr).to(tl.float32)
    b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
    b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, float("nan"))
    b_U = tiles.matrix_tile(U_ptr, tl.arange(0, BK), b_d, K, D)
    if FAMILY == "affine":
        b_V = tiles.matrix_tile(V_ptr, tl.arange(0, BK), b_d, K, D)
    elif FAMILY == "gated":
        b_gain = families.gate_tile(projected_ptr, C_ptr, b_token, N, b_d, D, H, BH, DTYPE) + 1.0

    b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
    b_mask = b_live[:, None] & (b_d < D)[None, :]
    out_ptr += tl.cast(first, tl.int64) * sample_tokens * D
    coordinates_ptr += tl.cast(first, tl.int64) * N * K
    if squared_shift_ptr is not None:
        squared_shift_ptr += (tl.cast(block_d, tl.int64) * M + first) * N
    for _ in range(first, tl.minimum(first + part_samples, M)):
        if FAMILY == "affine":
            b_bias, b_slope = families.two_products(
                coordinates_ptr, U_ptr, V_ptr, b_U, b_V, b_token, N, b_d, D, K, DTYPE
            )
            b_shift = b_bias * rho + b_slope * b_e.to(tl.float32)
        else:
            b_shift = families.product(coordinates_ptr, U_ptr, b_U, b_token, N, b_d, D, K, DTYPE)
            if FAMILY == "gated":
                b_shift *= b_gain
            b_shift *= rho
        if squared_shift_ptr is not None:
            b_squared = tl.where(b_mask, b_shift * b_shift, 0.0)
            tl.store(squared_shift_ptr + b_token, tl.sum(b_squared, axis=1), mask=b_live)
            squared_shift_ptr += tl.cast(N, tl.int64)
        tl.store(out_ptr + b_offset, (b_e.to(tl.float32) + b_shift).to(DTYPE), mask=b_mask)
        out_ptr += tl.cast(sample_tokens, tl.int64) * D
        coordinates_ptr += tl.cast(N, tl.int64) * K


# (BT, BD, warps) for a 16-bit table and for fp32: the fewest instructions an element that the
# compiler fits into registers.
_TILES = {
    "lowrank": ((64, 128, 8), (64, 64, 8)),
    "gated": ((64, 64, 4), (32, 64, 8)),
    "affine": ((64, 64, 4), (32, 64, 4)),
    "mlp": ((64, 128, 8), (64, 64, 8)),
}


def tile_sizes(family: str, half: bool, K: int) -> tuple[int, int, int, int]:
    """Return (BT, BD, BK, warps) that fit the registers, checked up to K = 256."""
    BT, BD, num_warps = _TILES[family][0 if half else 1]
    BK = launch.block(K, 64 if half and family not in ("gated", "affine") else 32)
    return BT, BD, BK, num_warps


def token_bytes(layout: Layout) -> int:
    """Return the bytes of the buffers for a sample and token."""
    if layout.family == "diagonal":
        return 0
    return layout.dtype.itemsize * layout.H if layout.family == "mlp" else 4 * layout.R


def forward(
    layout: Layout,
    out: Tensor,  # [M, B, T, D], written; samples may be further apart than N D
    projected: Tensor | None,  # [N, H]
    *,
    want_shift: bool,
) -> Tensor | None:
    """Write the perturbed embeddings; return the squared shift of each, [M, N], if wanted."""
    if layout.family == "diagonal":
        return diagonal.forward(layout, out, want_shift=want_shift)
    if layout.family == "mlp":
        assert projected is not None
        coordinates, directions = hidden.change(layout, projected), layout.C
    else:
        coordinates, directions = latents.draw(layout, layout.scale), layout.U
    M, N, K = coordinates.shape
    BT, BD, BK, num_warps = tile_sizes(layout.family, layout.half, K)
    BD = launch.block(layout.D, BD)
    ND = triton.cdiv(layout.D, BD)
    tiles_of_tokens = triton.cdiv(N, BT) * ND
    wanted = triton.cdiv(launch.programs(layout.device, num_warps), max(1, tiles_of_tokens))
    part_samples = max(1, triton.cdiv(M, wanted))
    squared_shift = layout.fp32(ND, M, N) if want_shift else None
    launch.start(
        forward_kernel,
        (tiles_of_tokens, triton.cdiv(M, part_samples)),
        {
            **layout.source,
            "out_ptr": out,
            "squared_shift_ptr": squared_shift,
            "coordinates_ptr": coordinates,
            "U_ptr": directions,
            "V_ptr": layout.V,
            "C_ptr": layout.C,
            "projected_ptr": projected,
            "rho_ptr": layout.rho,
            "M": M,
            "N": N,
            "sample_tokens": out.stride(0) // layout.D,
            "part_samples": part_samples,
            "D": layout.D,
            "K": K,
            "H": layout.H,
            "FAMILY": layout.family,
            "BT": BT,
            "BD": BD,
            "BK": BK,
            "BH": launch.block(layout.H, 64),
        },
        num_warps=num_warps,
    )
    return None if squared_shift is None else torch.sum(squared_shift, 0)
