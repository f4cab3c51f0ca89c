"""The gradients of `perturb_embed`, whose maths and counts are in `perturb_embed`.

A program owns BD columns of a slab of tokens. It walks the slab tile by tile and, within a tile,
sample by sample, reads each upstream gradient once, redraws z, and keeps the parameters'
gradients of its columns in registers. It stores one partial sum; torch adds the slabs in a
fixed order. No atomics, so the same seed gives the same bits in every run.

Slabs lie within segments: one segment of all N tokens for the gradient, one per batch row for
per-sample gradients, where each sample is also a group of its own (grid axis 1).

The gradient of (e / rho) A is a sum over all D columns. Blocks of columns store partial sums of it,
and `perturb_embed_projection` carries their total on to A and e. R or H beyond one block goes to
grid axis 2, and each of those programs reads the upstream gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch, maths, perturb_embed_projection
from fastperturb.kernels import perturb_embed_families as families
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import ROLES, Layout


@triton.jit(do_not_specialize=launch.VARYING)
def backward_kernel(
    grad_ptr,  # [M, N, D]
    grad_e_ptr,  # [PARTS, N, D], the gradient of e apart from the projection's, or None
    grad_U_ptr,  # [G, S, R, D] fp32; diagonal: [G, S, 1, D]; mlp: [G, S, ND, R, H]
    grad_V_ptr,  # affine: [G, S, R, D] fp32
    grad_C_ptr,  # gated, mlp: [G, S, PARTS, H, D] fp32
    grad_projected_ptr,  # gated, mlp: [PARTS, ND, G, N, H] fp32
    table_ptr,
    ids_ptr,
    U_ptr,
    V_ptr,
    C_ptr,
    projected_ptr,
    rho_ptr,
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    table_stride,
    M,  # samples of one group
    N,
    T,
    vocab,
    samples_stride_m,
    samples_stride_b,
    row_ids_stride_b,
    row_ids_stride_t,
    positions_stride_b,
    positions_stride_t,
    segment_tokens,
    slab_tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    FAMILY: tl.constexpr,
    PARTS: tl.constexpr,  # gated, affine: blocks of R, each with partial sums of its own; else 1
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,  # (latent, antithetic, fast)
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty  # not always the table's
    WANT_E: tl.constexpr = grad_e_ptr is not None
    PROJECTED: tl.constexpr = projected_ptr is not None  # gated and mlp
    ND: tl.constexpr = (D + BD - 1) // BD
    NR: tl.constexpr = (R + BR - 1) // BR
    slab, first, last = tiles.slab_of_tokens(segment_tokens, slab_tokens, N, ND)
    block_d = tl.program_id(0) % ND
    group = tl.program_id(1)
    block_r = tl.program_id(2) % NR
    block_h = tl.program_id(2) // NR
    part = block_r % PARTS
    b_d = block_d * BD + tl.arange(0, BD)
    b_r = block_r * BR + tl.arange(0, BR)
    b_h = block_h * BH + tl.arange(0, BH)
    seed = tl.load(seed_ptr)
    rho = tl.load(rho_ptr).to(tl.float32)
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    sample_stride = tl.cast(N, tl.int64) * D
    grad_ptr += tl.cast(group, tl.int64) * M * sample_stride
    samples_ptr += tl.cast(group, tl.int64) * M * samples_stride_m
    slab += tl.cast(group, tl.int64) * (tl.num_programs(0) // ND)

    # diagonal has a latent for each column, the others a few for all.
    BZ: tl.constexpr = BD if FAMILY == "diagonal" else BR
    first_latent = block_d * BD if FAMILY == "diagonal" else block_r * BR
    if FAMILY == "diagonal":
        b_grad_s = tl.zeros([BT, BD], tl.float32)
    elif FAMILY == "mlp":
        b_grad_U = tl.zeros([BR, BH], tl.float32)
        b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        b_U = tiles.matrix_tile(U_ptr, b_r, b_h, R, H)
    else:
        b_grad_U = tl.zeros([BD, BR], tl.float32)
        b_grad_V = tl.zeros([BD, BR], tl.float32)
        b_U = tiles.matrix_tile(U_ptr, b_r, b_d, R, D)
    b_grad_C = tl.zeros([BH, BD], tl.float32)

    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_live = b_token < last
        b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
        b_mask = b_live[:, None] & (b_d < D)[None, :]
        tokens = tiles.load_tokens(seed, b_token, b_live, T, row_ids, positions, mask_ptr, SCOPE)
        b_sample_ptr = samples_ptr + tokens.b_batch * samples_stride_b
        if FAMILY == "affine":
            b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
            b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, 0.0)
        elif FAMILY == "gated":
            GATE: tl.constexpr = table_ptr.dtype.element_ty  # as in the forward
            b_gate = families.gate_tile(projected_ptr, C_ptr, b_token, N, b_d, D, H, BH, GATE)
        elif FAMILY == "mlp":
            b_projected = tiles.matrix_tile(projected_ptr, b_token, b_h, N, H)
            b_gelu, b_slope = maths.gelu_and_slope(b_projected)
            b_grad_projected = tl.zeros([BT, BH], tl.float32)
        b_grad_e = tl.zeros([BT, BD], tl.float32)
        b_product = tl.zeros([BT, BD], tl.float32)  # sum_m g (z U)

        tile_ptr = grad_ptr
        for _ in range(M):
            b_g = tl.load(tile_ptr + b_offset, mask=b_mask, other=0.0)
            b_z = tiles.latent_tile(tokens, b_sample_ptr, first_latent, BZ, NOISE)
            if FAMILY == "diagonal":
                b_grad_s = families.add_diagonal(b_grad_s, b_g, b_z)
            elif FAMILY == "lowrank":
                b_grad_U = families.add_lowrank(b_grad_U, b_g, b_z, DTYPE)
            elif FAMILY == "gated":
                b_grad_U, b_product = families.add_gated(
                    b_grad_U, b_product, b_g, b_z, b_U, b_gate, DTYPE
                )
            elif FAMILY == "affine":
                b_grad_U, b_grad_V, b_product = families.add_affine(
                    b_grad_U, b_grad_V, b_product, b_g, b_z, b_U, b_e, WANT_E, DTYPE
                )
            else:
                tl.static_assert(FAMILY == "mlp", "unknown family")
                b_hidden = families.hidden_tile(
                    tokens, b_sample_ptr, b_projected, b_z, U_ptr, b_U, b_h, R, H, NOISE, DTYPE
                )
                b_grad_U, b_grad_C, b_grad_projected = families.add_mlp(
                    b_grad_U,
                    b_grad_C,
                    b_grad_projected,
                    b_g,
                    b_z,
                    b_hidden,
                    b_gelu,
                    b_slope,
                    b_C,
                    DTYPE,
                )
            if WANT_E:
                b_grad_e += b_g.to(tl.float32)
            tile_ptr += sample_stride
            b_sample_ptr += samples_stride_m

        if WANT_E:
            # Only affine has more than one part of it: sum_m g is in the part of the first block.
            part_e = part if FAMILY == "affine" else 0
            if FAMILY == "affine":
                b_grad_e = tl.where(part == 0, b_grad_e, 0.0) + b_product
            e_ptr = grad_e_ptr + part_e * sample_stride + b_offset
            stored = b_mask & (tl.program_id(2) == part_e)
            tl.store(e_ptr, b_grad_e.to(grad_e_ptr.dtype.element_ty), mask=stored)
        if FAMILY == "gated":
            b_grad_C, b_grad_projected = families.through_gate(
                b_grad_C,
                b_product,
                b_gate,
                rho,
                projected_ptr,
                C_ptr,
                b_token,
                last,
                b_d,
                b_h,
                D,
                H,
                DTYPE,
            )
        elif FAMILY == "mlp":
            b_grad_projected *= rho
        if PROJECTED:
            plane = (part * ND + block_d) * tl.num_programs(1) + group
            base = grad_projected_ptr + tl.cast(plane, tl.int64) * N * H
            stored = tl.where(block_r == part, last, 0)
            tiles.store_matrix(base, b_token, b_h, b_grad_projected, stored, H)

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
    if PROJECTED:
        scale = rho if FAMILY == "mlp" else 1.0
        base = grad_C_ptr + (slab * PARTS + part) * (H * D)
        rows = tl.where(block_r == part, H, 0)
        tiles.store_matrix(base, b_h, b_d, b_grad_C * scale, rows, D)


# (BT, BD, warps) for a 16-bit table and for fp32, where R <= 16 and H <= 64, by the family and
# whether the embeddings' gradient is wanted, which keeps another tile.
_TILES = {
    ("diagonal", False): ((4, 256, 4), (4, 256, 4)),
    ("diagonal", True): ((4, 256, 4), (4, 256, 4)),
    ("lowrank", False): ((32, 128, 4), (16, 64, 4)),
    ("lowrank", True): ((32, 128, 4), (16, 64, 4)),
    ("gated", False): ((32, 128, 8), (16, 64, 8)),
    ("gated", True): ((16, 128, 8), (16, 64, 8)),
    ("affine", False): ((32, 128, 4), (16, 64, 4)),
    ("affine", True): ((32, 64, 4), (16, 64, 4)),
    ("mlp", False): ((16, 256, 8), (16, 64, 8)),
    ("mlp", True): ((16, 256, 8), (16, 64, 8)),
}
# Programs enough for a few waves; gated and mlp store more per program, so fewer.
_PROGRAMS = {"diagonal": 1024, "lowrank": 1024, "affine": 1024, "gated": 512, "mlp": 512}


def tile_sizes(
    family: str, want_table: bool, half: bool, R: int, H: int, major: int
) -> tuple[int, int, int, int, int]:
    """Return (BT, BD, BR, BH, warps) that fit the registers, checked up to R = 128 and H = 256.

    The gradients of U [BR, BD] and C [BH, BD] stay in registers, so more latents or hidden units
    take a smaller tile; the smallest reads 16 bytes a thread. Before Hopper the operands of
    a product take registers too.
    """
    BT, BD, warps = _TILES[family, want_table][0 if half else 1]
    BR, BH = launch.block(R, 64 if half else 32), launch.block(H, 64)
    ampere = major < 9
    if family in ("gated", "affine") and (R > 16 or H > 128):
        return 16, 64 if half else 32, 32, 64, 4
    if family == "gated":  # dC of fewer rows is not the warpgroup's product, and spills
        BD, BH = (BD // 2, 64 if half else 32) if ampere else (BD, 64)
    if family == "mlp" and half and (R != 16 or H > 64 or ampere):  # at R = 16 it only just fits
        BD = BD // 2
    if family == "mlp" and not half and ampere:
        BH = min(BH, 32)
    return BT, BD, BR, BH, warps


def partial_shapes(layout: Layout, ND: int, parts: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the partial sums that this kernel makes, by the parameter's role."""
    family, D, R, H = layout.family, layout.D, layout.R, layout.H
    shapes: dict[str, tuple[int, ...]] = {"U": (1, R, D), "V": (1, R, D), "C": (parts, H, D)}
    if family == "diagonal":
        shapes["U"] = (1, D)
    if family == "mlp":
        shapes["U"] = (ND, R, H)
    return {role: shapes[role] for role in ROLES[family] if role in shapes}


def backward(
    layout: Layout,
    grad: Tensor,  # [M, B, T, D]
    *,
    want_table: bool,
    per_sample: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of the embeddings [N, D], and of the parameters in fp32.

    The parameters' are [groups, segments, ...]; `per_sample` makes a group of each sample and a
    segment of each batch row.
    """
    family, N, D, R, H = layout.family, layout.N, layout.D, layout.R, layout.H
    major = launch.capability(layout.table.device)
    half = grad.dtype != torch.float32
    BT, BD, BR, BH, num_warps = tile_sizes(family, want_table, half, R, H, major)
    BD = launch.block(D, BD)
    ND, NR, NH = triton.cdiv(D, BD), triton.cdiv(R, BR), triton.cdiv(H, BH)
    sums = layout.sums(per_sample=per_sample)
    groups = sums.groups
    slab_tokens, slabs = sums.slabs(BT, ND, _PROGRAMS[family])
    parts = NR if family in ("gated", "affine") else 1
    partial = {
        role: layout.fp32(groups, sums.segments, slabs, *shape)
        for role, shape in partial_shapes(layout, ND, parts).items()
    }
    grad_projected = None if layout.A is None else layout.fp32(parts * ND, groups, N, H)
    grad_e = None
    if want_table and layout.A is None and parts == 1:
        grad_e = layout.table.new_empty((1, N, D))
    elif want_table:
        grad_e = layout.fp32(parts if layout.A is None else 1, N, D)
    launch.start(
        backward_kernel,
        (sums.segments * slabs * ND, groups, NR * NH),
        {
            **layout.source,
            **layout.noise,
            **layout.parameters,
            "grad_ptr": grad.contiguous(),
            "grad_e_ptr": grad_e,
            "grad_U_ptr": partial["U"],
            "grad_V_ptr": partial.get("V"),
            "grad_C_ptr": partial.get("C"),
            "grad_projected_ptr": grad_projected,
            "projected_ptr": perturb_embed_projection.project(layout),
            "M": layout.M // groups if layout.M else 0,
            "segment_tokens": sums.segment_tokens,
            "slab_tokens": slab_tokens,
            "FAMILY": family,
            "PARTS": parts,
            "BT": BT,
            "BD": BD,
            "BR": BR,
            "BH": BH,
        },
        num_warps=num_warps,
        # In fp32 the tensor cores want g transposed, which async copies do element by element.
        num_stages=3 if half else 1,
    )
    grads = {role: value.sum((2, 3)) for role, value in partial.items()}
    if grad_projected is not None:
        grad_projected = grad_projected.sum(0)
        grads["b"] = grad_projected.view(groups, sums.segments, sums.segment_tokens, H).sum(2)
        grads["A"], grad_e = perturb_embed_projection.project_backward(
            layout, grad_projected, grad_e, sums
        )
    elif grad_e is not None:
        grad_e = grad_e[0] if parts == 1 else grad_e.sum(0).to(layout.table.dtype)
    return grad_e, [grads[role] for role in ROLES[family]]
