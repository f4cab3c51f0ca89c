"""The projection (e / rho) A of gated and mlp, which all samples share, and its gradients.

It is made before the kernels that need it, in parts of the columns that torch adds up, and its
gradient [N, H] is carried on to A and e after them:

    dA = (e / rho)' q,   de = sum_m g + q A' / rho,   q the gradient of the projection.

Each pass is one product with A, 2 N D H flops, and reads each embedding once for every 64 hidden
units.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch, maths
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout, Sums


@triton.jit(do_not_specialize=launch.VARYING)
def project_kernel(
    projected_ptr,  # [K, N, H] fp32: one partial sum for each part of the columns
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
    """(e / rho) A over PART columns."""
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
        b_sum = maths.dot_exact(b_e, b_A, b_sum, DTYPE)
    b_sum = b_sum / tl.load(rho_ptr).to(tl.float32)
    b_mask = b_live[:, None] & (b_h < H)[None, :]
    offset = (part.to(tl.int64) * N + b_token)[:, None] * H + b_h[None, :]
    tl.store(projected_ptr + offset, b_sum, mask=b_mask)


@triton.jit(do_not_specialize=launch.VARYING)
def project_backward_kernel(
    grad_A_ptr,  # [G, S, D, H] fp32
    grad_e_ptr,  # [N, D] in the table's dtype, or None
    grad_sum_ptr,  # [N, D] fp32, sum_m g, or None
    grad_projected_ptr,  # [G, N, H] fp32
    table_ptr,
    ids_ptr,
    A_ptr,  # [D, H]
    rho_ptr,
    table_stride,
    N,
    vocab,
    segment_tokens,
    slab_tokens,
    D: tl.constexpr,
    H: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
):
    """The gradients of A over a slab of tokens, and of e."""
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    ND: tl.constexpr = (D + BD - 1) // BD
    slab, first, last = tiles.slab_of_tokens(segment_tokens, slab_tokens, N, ND)
    group = tl.cast(tl.program_id(1), tl.int64)
    b_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    b_h = tl.program_id(2) * BH + tl.arange(0, BH)
    grad_projected_ptr += group * N * H
    rho = tl.load(rho_ptr).to(tl.float32)
    b_grad_A = tl.zeros([BH, BD], tl.float32)
    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_live = b_token < last
        b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
        b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, 0.0)
        b_grad_projected = tiles.matrix_tile(grad_projected_ptr, b_token, b_h, last, H)
        b_grad_A = maths.dot_exact(tl.trans(b_grad_projected), b_e, b_grad_A, DTYPE)
        if grad_e_ptr is not None:
            b_through_A = tl.zeros([BT, BD], tl.float32)
            for h in range(0, H, BH):
                b_units = h + tl.arange(0, BH)
                b_part = tiles.matrix_tile(grad_projected_ptr, b_token, b_units, last, H)
                b_A = tiles.matrix_tile(A_ptr, b_d, b_units, D, H)
                b_through_A = maths.dot(b_part, tl.trans(b_A), b_through_A, DTYPE)
            b_sum = tiles.matrix_tile(grad_sum_ptr, b_token, b_d, last, D) + b_through_A / rho
            rows = tl.where(tl.program_id(2) == 0, last, 0)
            tiles.store_matrix(grad_e_ptr, b_token, b_d, b_sum.to(DTYPE), rows, D)
    base = grad_A_ptr + (group * (tl.num_programs(0) // ND) + slab) * (D * H)
    tiles.store_matrix(base, b_d, b_h, tl.trans(b_grad_A) / rho, D, H)


def project(layout: Layout) -> Tensor | None:
    """Return (e / rho) A [N, H] in fp32, for mlp + b; None for a family without A."""
    if layout.A is None:
        return None
    BT, BD, BH = 64 if layout.half else 32, 64, launch.block(layout.H, 64)
    # A few programs along D: those along N are too few to fill a GPU.
    part = BD * triton.cdiv(triton.cdiv(layout.D, BD), 4)
    parts = triton.cdiv(layout.D, part)
    projected = layout.fp32(parts, layout.N, layout.H)
    launch.start(
        project_kernel,
        (triton.cdiv(layout.N, BT), parts, triton.cdiv(layout.H, BH)),
        {
            **layout.source,
            "projected_ptr": projected,
            "A_ptr": layout.A,
            "rho_ptr": layout.rho,
            "N": layout.N,
            "D": layout.D,
            "H": layout.H,
            "PART": part,
            "BT": BT,
            "BD": BD,
            "BH": BH,
        },
        num_warps=4,
    )
    projected = projected.sum(0)
    return projected if layout.b is None else projected.add_(layout.b)


def project_backward(
    layout: Layout,
    grad_projected: Tensor,  # [groups, N, H]
    grad_sum: Tensor | None,  # sum_m g [N, D]
    sums: Sums,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of A [groups, segments, D, H] and, if grad_sum is set, of e [N, D]."""
    BT = 32 if layout.half and layout.H <= 64 else 16
    num_warps = 4 if layout.half else 8
    BD, BH = launch.block(layout.D, 64), launch.block(layout.H, 64)
    ND = triton.cdiv(layout.D, BD)
    slab_tokens, slabs = sums.slabs(BT, ND, launch.programs(layout.device, 8))
    grad_A = layout.fp32(*sums[:2], slabs, layout.D, layout.H)
    grad_e = None if grad_sum is None else layout.table.new_empty((layout.N, layout.D))
    launch.start(
        project_backward_kernel,
        (sums.segments * slabs * ND, sums.groups, triton.cdiv(layout.H, BH)),
        {
            **layout.source,
            "grad_A_ptr": grad_A,
            "grad_e_ptr": grad_e,
            "grad_sum_ptr": grad_sum,
            "grad_projected_ptr": grad_projected,
            "A_ptr": layout.A,
            "rho_ptr": layout.rho,
            "N": layout.N,
            "D": layout.D,
            "H": layout.H,
            "segment_tokens": sums.segment_tokens,
            "slab_tokens": slab_tokens,
            "BT": BT,
            "BD": BD,
            "BH": BH,
        },
        num_warps=num_warps,
    )
    return grad_A.sum(2), grad_e
