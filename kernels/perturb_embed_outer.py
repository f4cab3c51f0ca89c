"""The sum of outer products of coordinates and the upstream gradient g over tokens and samples.

    z' g, or c' g for mlp's C, whose coordinates c are the change of the inner layer; for context
    (z s)' g, and sum_m z (g U')

All parameters but A, b and mlp's B get their gradient from it. The maths of the families is in
`perturb_embed`.

A program owns BD columns of a slab of tokens. It walks the slab tile by tile and, within a tile,
sample by sample, reads each upstream gradient once and keeps the gradients of its columns in
registers. It stores one partial sum; torch adds the slabs in a fixed order. No atomics, so the same
seed gives the same bits in every run.

Slabs lie within segments: one segment of all N tokens for the gradient, one per batch row for
per-sample gradients, where each sample is also a group of its own (grid axis 1). More coordinates
than one block go to grid axis 2, and each of those programs reads the upstream gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch, maths
from fastperturb.kernels import perturb_embed_families as families
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout, Sums


@triton.jit(do_not_specialize=launch.VARYING)
def outer_kernel(
    grad_ptr,  # [M, N, D], of samples that are sample_tokens apart
    grad_U_ptr,  # [G, S, K, D] fp32
    grad_V_ptr,  # affine: [G, S, K, D] fp32
    grad_e_ptr,  # [N, D], or None: the sum over samples of g, for affine of g (1 + z Ua)
    grad_scale_ptr,  # context: [ND, G, N, K] fp32, each block of columns' part; else None
    scale_ptr,  # context: [N, K]; else None
    grad_gate_ptr,  # gated: k [G, N, D] in the upstream gradient's dtype
    table_ptr,
    ids_ptr,
    coordinates_ptr,  # [M, N, K], of samples that are coordinate_tokens apart
    U_ptr,  # [K, D], where the family needs z U
    C_ptr,  # gated: [H, D]
    projected_ptr,  # gated: [N, H] fp32
    rho_ptr,  # None: 1
    table_stride,
    M,  # samples of one group
    N,
    vocab,
    sample_tokens,
    coordinate_tokens,
    segment_tokens,
    slab_tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    FAMILY: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty  # not always the table's
    TABLE: tl.constexpr = table_ptr.dtype.element_ty
    WANT_E: tl.constexpr = grad_e_ptr is not None
    WANT_PRODUCT: tl.constexpr = FAMILY == "gated" or (FAMILY == "affine" and WANT_E)
    SCALED: tl.constexpr = scale_ptr is not None
    ND: tl.constexpr = (D + BD - 1) // BD
    slab, first, last = tiles.slab_of_tokens(segment_tokens, slab_tokens, N, ND)
    group = tl.cast(tl.program_id(1), tl.int64)
    b_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    b_k = tl.program_id(2) * BK + tl.arange(0, BK)
    rho = 1.0 if rho_ptr is None else tl.load(rho_ptr).to(tl.float32)
    sample_stride = tl.cast(sample_tokens, tl.int64) * D
    coordinate_stride = tl.cast(coordinate_tokens, tl.int64) * K
    grad_ptr += group * M * sample_stride
    coordinates_ptr += group * M * coordinate_stride
    b_grad_U = tl.zeros([BD, BK], tl.float32)
    b_grad_V = tl.zeros([BD, BK], tl.float32)
    if WANT_PRODUCT:
        b_U = tiles.matrix_tile(U_ptr, tl.arange(0, BK), b_d, K, D)
    elif SCALED:
        b_U = tiles.matrix_tile(U_ptr, b_k, b_d, K, D).to(DTYPE)

    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
        b_mask = (b_token < last)[:, None] & (b_d < D)[None, :]
        # Sums over samples are stored by the first block of coordinates.
        b_stored = b_mask & (tl.program_id(2) == 0)
        if FAMILY == "affine":
            b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_token < last, vocab)
            b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, 0.0)
        elif FAMILY == "gated":
            b_gate = families.gate_tile(projected_ptr, C_ptr, b_token, N, b_d, D, H, BH, TABLE)
        b_grad_e = tl.zeros([BT, BD], tl.float32)
        b_product = tl.zeros([BT, BD], tl.float32)  # sum_m g (z U)
        b_grad_scale = tl.zeros([BT, BK], tl.float32)  # sum_m z (g U')
        if SCALED:
            b_scale = tiles.matrix_tile(scale_ptr, b_token, b_k, last, K)
        tile_ptr, x_ptr = grad_ptr, coordinates_ptr
        for _ in range(M):
            b_g = tl.load(tile_ptr + b_offset, mask=b_mask, other=0.0)
            b_x = tiles.matrix_tile(x_ptr, b_token, b_k, last, K)
            if SCALED:
                b_zero = tl.zeros([BT, BK], tl.float32)
                b_grad_scale += b_x * maths.dot_narrow(b_g, tl.trans(b_U), b_zero, DTYPE)
                b_x *= b_scale
            if FAMILY == "affine":
                b_scaled = (b_g.to(tl.float32) * b_e.to(tl.float32)).to(DTYPE)
                b_grad_U = families.add_outer(b_grad_U, b_scaled, b_x)
                b_grad_V = families.add_outer(b_grad_V, b_g, b_x)
            elif FAMILY == "gated":
                b_gained = (b_g.to(tl.float32) * (1.0 + b_gate)).to(DTYPE)
                b_grad_U = families.add_outer(b_grad_U, b_gained, b_x)
            else:
                b_grad_U = families.add_outer(b_grad_U, b_g, b_x)
            if WANT_PRODUCT:
                b_shift = families.product(x_ptr, U_ptr, b_U, b_token, last, b_d, D, K, DTYPE)
                b_product += b_g.to(tl.float32) * b_shift
            if WANT_E:
                b_grad_e += b_g.to(tl.float32)
            tile_ptr += sample_stride
            x_ptr += coordinate_stride
        if SCALED:
            block = tl.program_id(0) % ND
            part = (block.to(tl.int64) * tl.num_programs(1) + group) * N * K
            tiles.store_matrix(grad_scale_ptr + part, b_token, b_k, b_grad_scale * rho, last, K)
        if WANT_E:
            if FAMILY == "affine":
                b_grad_e += b_product
            b_value = b_grad_e.to(grad_e_ptr.dtype.element_ty)
            tl.store(grad_e_ptr + b_offset, b_value, mask=b_stored)
        if FAMILY == "gated":
            b_value = (b_product * (1.0 - b_gate * b_gate) * rho).to(DTYPE)
            tl.store(grad_gate_ptr + group * N * D + b_offset, b_value, mask=b_stored)

    base = (slab + group * (tl.num_programs(0) // ND)) * K * D
    scale = 1.0 if FAMILY == "affine" else rho
    tiles.store_matrix(grad_U_ptr + base, b_k, b_d, tl.trans(b_grad_U) * scale, K, D)
    if FAMILY == "affine":
        tiles.store_matrix(grad_V_ptr + base, b_k, b_d, tl.trans(b_grad_V) * rho, K, D)


# (BT, BD, warps, stages) for a 16-bit upstream gradient and for fp32, by the family and whether the
# embeddings' gradient is wanted, which keeps another tile. In fp32 the tensor cores want g
# transposed, which async copies do element by element: there one stage.
_TILES = {
    ("lowrank", False): ((32, 128, 4, 3), (16, 64, 4, 1)),
    ("lowrank", True): ((32, 128, 4, 3), (16, 64, 4, 1)),
    ("gated", False): ((16, 128, 4, 3), (16, 64, 4, 1)),
    ("gated", True): ((16, 128, 8, 2), (16, 32, 4, 1)),
    ("affine", False): ((32, 128, 4, 3), (16, 64, 4, 1)),
    ("affine", True): ((16, 128, 4, 3), (16, 64, 4, 1)),
    ("context", False): ((32, 128, 4, 3), (16, 64, 4, 1)),
    ("context", True): ((32, 128, 8, 2), (16, 64, 4, 1)),
    ("mlp", False): ((64, 128, 8, 3), (16, 64, 4, 1)),
    ("mlp", True): ((32, 128, 8, 3), (16, 64, 4, 1)),
}


def tile_sizes(
    family: str, want_e: bool, half: bool, K: int, H: int
) -> tuple[int, int, int, int, int]:
    """Return (BT, BD, BK, warps, stages) that fit the registers, checked up to K and H of 256.

    The sums [BD, BK] stay in registers: more coordinates take a smaller tile.
    """
    BT, BD, num_warps, stages = _TILES[family, want_e][0 if half else 1]
    BK = launch.block(K, 64 if half and family != "context" else 32)
    if family in ("gated", "affine") and (K > 16 or H > 128):
        BK = min(BK, 32)
        BD, num_warps = (BD // 2, num_warps) if half or family == "affine" else (64, 8)
    return BT, BD, BK, num_warps, stages


def outer(
    layout: Layout,
    family: str,
    grad: Tensor,  # [M, ..., D]
    coordinates: Tensor,  # [M, N, K], or [N, K] for all samples
    sums: Sums,
    *,
    rho: Tensor | None = None,
    projected: Tensor | None = None,
    grad_e: Tensor | None = None,
    grad_gate: Tensor | None = None,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the sums of coordinates' grad as U [groups, segments, K, D], for affine also V.

    grad_e, grad_gate: where to write the sums over samples, if wanted.
    scale: [N, K] of context, which multiplies the coordinates; its gradient [groups, N, K] is
        returned as scale.
    """
    half, N, D, K = grad.dtype != torch.float32, layout.N, layout.D, coordinates.shape[-1]
    tiled = family if scale is None else "context"
    sizes = tile_sizes(tiled, grad_e is not None, half, K, layout.H)
    BT, BD, BK, num_warps, stages = sizes
    BD = launch.block(D, BD)
    ND, NK = triton.cdiv(D, BD), triton.cdiv(K, BK)
    slab_tokens, slabs = sums.slabs(BT, ND * NK, launch.programs(layout.device, num_warps))
    shape = sums.groups, sums.segments, slabs, K, D
    partial = {role: layout.fp32(*shape) for role in ("UV" if family == "affine" else "U")}
    if scale is not None:
        partial["scale"] = layout.fp32(ND, sums.groups, N, K)
    launch.start(
        outer_kernel,
        (sums.segments * slabs * ND, sums.groups, NK),
        {
            **layout.source,
            "grad_ptr": grad,
            "grad_U_ptr": partial["U"],
            "grad_V_ptr": partial.get("V"),
            "grad_e_ptr": grad_e,
            "grad_gate_ptr": grad_gate,
            "grad_scale_ptr": partial.get("scale"),
            "scale_ptr": scale,
            "coordinates_ptr": coordinates,
            "U_ptr": layout.U,
            "C_ptr": layout.C,
            "projected_ptr": projected,
            "rho_ptr": rho,
            "M": grad.shape[0] // max(1, sums.groups),
            "N": N,
            "sample_tokens": grad.stride(0) // D,
            "coordinate_tokens": N if coordinates.ndim == 3 else 0,
            "segment_tokens": sums.segment_tokens,
            "slab_tokens": slab_tokens,
            "D": D,
            "K": K,
            "H": layout.H,
            "FAMILY": family,
            "BT": BT,
            "BD": BD,
            "BK": BK,
            "BH": launch.block(layout.H, 64),
        },
        num_warps=num_warps,
        num_stages=stages,
        # In fp32 the assembler would rather spill than use more than 128 or 168 registers.
        **({} if half else {"maxnreg": 255}),
    )
    return {role: value.sum(0 if role == "scale" else 2) for role, value in partial.items()}
