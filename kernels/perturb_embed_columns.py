"""The product of upstream gradients with C', a sum over all columns of each row.

    mlp    g C' [M, N, H], of which the gradients of the inner layer are made
    gated  k C' [N, H], the gradient of the projection

It reads each upstream gradient once for every 128 hidden units, and writes H / D of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch, maths
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout


@triton.jit(do_not_specialize=launch.VARYING)
def through_C_kernel(
    result_ptr,  # [PARTS, M, N, H] fp32: one partial sum for each part of the columns
    grad_ptr,  # [M, N, D], of samples that are sample_tokens apart
    C_ptr,  # [H, D]
    M,
    N,
    sample_tokens,
    D: tl.constexpr,
    H: tl.constexpr,
    PART: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
):
    """g C' of a tile of one sample over PART columns, in the precision of g's dtype."""
    sample, b_token = tiles.sample_and_tokens(N, BT)
    part = tl.program_id(1)
    b_h = tl.program_id(2) * BH + tl.arange(0, BH)
    grad_ptr += sample * sample_tokens * D
    b_sum = tl.zeros([BT, BH], tl.float32)
    for start in range(0, PART, BD):
        b_d = part * PART + start + tl.arange(0, BD)
        b_g = tiles.matrix_tile(grad_ptr, b_token, b_d, N, D)
        b_C = tiles.matrix_tile(C_ptr, b_h, b_d, H, D)
        b_sum = maths.dot_narrow(b_g, tl.trans(b_C), b_sum, grad_ptr.dtype.element_ty)
    result_ptr += (part.to(tl.int64) * M + sample) * N * H
    tiles.store_matrix(result_ptr, b_token, b_h, b_sum, N, H)


def through_C(layout: Layout, grad: Tensor) -> Tensor:
    """Return grad [M, ..., D] times C', [M, N, H] in fp32."""
    M, half = grad.shape[0], grad.dtype.itemsize == 2
    N, D, H = layout.N, layout.D, layout.H
    BT, BD = (128, 64) if half else (64, 32)
    num_warps = 4
    BD = launch.block(D, BD)
    BH = launch.block(H, 128 if half else 64)
    row_tiles = M * triton.cdiv(N, BT)
    # Parts of the columns where the rows are too few to fill a GPU; their partial sums are traffic.
    wanted = triton.cdiv(launch.programs(layout.device, num_warps) // 2, max(1, row_tiles))
    part = BD * triton.cdiv(triton.cdiv(D, BD), min(4, wanted))
    parts = triton.cdiv(D, part)
    result = layout.fp32(parts, M, N, H)
    launch.start(
        through_C_kernel,
        (row_tiles, parts, triton.cdiv(H, BH)),
        {
            "result_ptr": result,
            "grad_ptr": grad,
            "C_ptr": layout.C,
            "M": M,
            "N": N,
            "sample_tokens": grad.stride(0) // D,
            "D": D,
            "H": H,
            "PART": part,
            "BT": BT,
            "BD": BD,
            "BH": BH,
        },
        num_warps=num_warps,
        num_stages=3,
    )
    return result[0] if parts == 1 else result.sum(0)
