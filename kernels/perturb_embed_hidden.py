"""mlp's inner layer: its change gelu(h + z B) - gelu(h), and the gradients through it.

A program owns BT tokens by BH hidden units and draws the latents of its tokens in registers: for
every block of hidden units, not for every block of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch, maths
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout, Sums


@triton.jit
def hidden_tile(
    tokens,
    b_sample_ptr,
    b_rest,  # h [BT, BH]
    b_z,  # [BT, BR], all of z where R <= BR; else it is drawn block after block
    B_ptr,
    b_h,
    mean_ptr,
    std,
    R: tl.constexpr,
    H: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """h + z B [BT, BH]."""
    BR: tl.constexpr = b_z.shape[1]
    b_hidden = b_rest
    for r in range(0, R, BR):
        b_B = tiles.matrix_tile(B_ptr, r + tl.arange(0, BR), b_h, R, H)
        if R > BR:
            b_z = tiles.latent_tile(tokens, b_sample_ptr, r, mean_ptr, std, R, BR, NOISE)
        b_hidden = maths.dot(b_z, b_B, b_hidden, DTYPE)
    return b_hidden


@triton.jit(do_not_specialize=launch.VARYING)
def change_kernel(
    change_ptr,  # [M, N, H] in the table's dtype
    rest_ptr,  # h = (e / rho) A + b [N, H] fp32
    B_ptr,  # [R, H]
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    mean_ptr,
    N,
    T,
    samples_stride_m,
    samples_stride_b,
    row_ids_stride_b,
    row_ids_stride_t,
    positions_stride_b,
    positions_stride_t,
    mean_stride_b,
    mean_stride_t,
    std,
    R: tl.constexpr,
    H: tl.constexpr,
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,  # (latent, antithetic, strata, fast)
    BT: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """gelu(h + z B) - gelu(h) of one tile of one sample."""
    DTYPE: tl.constexpr = change_ptr.dtype.element_ty
    sample, b_token = tiles.sample_and_tokens(N, BT)
    b_h = tl.program_id(1) * BH + tl.arange(0, BH)
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    means = mean_stride_b, mean_stride_t
    seed = tl.load(seed_ptr)
    tokens = tiles.load_tokens(
        seed, b_token, b_token < N, T, row_ids, positions, mask_ptr, means, SCOPE
    )
    b_sample_ptr = samples_ptr + sample * samples_stride_m + tokens.b_batch * samples_stride_b
    b_rest = tiles.matrix_tile(rest_ptr, b_token, b_h, N, H)
    b_z = tiles.latent_tile(tokens, b_sample_ptr, 0, mean_ptr, std, R, BR, NOISE)
    b_hidden = hidden_tile(
        tokens, b_sample_ptr, b_rest, b_z, B_ptr, b_h, mean_ptr, std, R, H, NOISE, DTYPE
    )
    b_change = (maths.gelu(b_hidden) - maths.gelu(b_rest)).to(DTYPE)
    tiles.store_matrix(change_ptr + sample * N * H, b_token, b_h, b_change, N, H)


@triton.jit(do_not_specialize=launch.VARYING)
def hidden_backward_kernel(
    grad_rest_ptr,  # [G, N, H] fp32: q
    grad_B_ptr,  # [G, S, R, H] fp32
    change_ptr,  # [M, N, H] in the table's dtype
    grad_gelu_ptr,  # [M, N, H] fp32: p without rho
    rest_ptr,  # h [N, H] fp32
    B_ptr,  # [R, H]
    rho_ptr,
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    mean_ptr,
    M,  # samples of one group
    N,
    T,
    samples_stride_m,
    samples_stride_b,
    row_ids_stride_b,
    row_ids_stride_t,
    positions_stride_b,
    positions_stride_t,
    mean_stride_b,
    mean_stride_t,
    std,
    segment_tokens,
    slab_tokens,
    R: tl.constexpr,
    H: tl.constexpr,
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """dB = z' (p gelu'(h + z B)), q = sum_m p (gelu'(h + z B) - gelu'(h)), and the change."""
    DTYPE: tl.constexpr = change_ptr.dtype.element_ty
    NH: tl.constexpr = (H + BH - 1) // BH
    slab, first, last = tiles.slab_of_tokens(segment_tokens, slab_tokens, N, NH)
    group = tl.cast(tl.program_id(1), tl.int64)
    first_r = tl.program_id(2) * BR
    b_h = tl.program_id(0) % NH * BH + tl.arange(0, BH)
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    means = mean_stride_b, mean_stride_t
    seed = tl.load(seed_ptr)
    rho = tl.load(rho_ptr).to(tl.float32)
    sample_stride = tl.cast(N, tl.int64) * H
    grad_gelu_ptr += group * M * sample_stride
    change_ptr += group * M * sample_stride
    samples_ptr += group * M * samples_stride_m
    b_grad_B = tl.zeros([BR, BH], tl.float32)
    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_live = b_token < last
        tokens = tiles.load_tokens(
            seed, b_token, b_live, T, row_ids, positions, mask_ptr, means, SCOPE
        )
        b_sample_ptr = samples_ptr + tokens.b_batch * samples_stride_b
        stored = tl.where(tl.program_id(2) == 0, last, 0)  # by the first block of latents
        b_rest = tiles.matrix_tile(rest_ptr, b_token, b_h, last, H)
        b_gelu, b_slope = maths.gelu_and_slope(b_rest)
        b_grad_rest = tl.zeros([BT, BH], tl.float32)
        tile = tl.cast(0, tl.int64)
        for _ in range(M):
            b_z = tiles.latent_tile(tokens, b_sample_ptr, first_r, mean_ptr, std, R, BR, NOISE)
            b_hidden = hidden_tile(
                tokens, b_sample_ptr, b_rest, b_z, B_ptr, b_h, mean_ptr, std, R, H, NOISE, DTYPE
            )
            b_value, b_slope_perturbed = maths.gelu_and_slope(b_hidden)
            b_change = (b_value - b_gelu).to(DTYPE)
            tiles.store_matrix(change_ptr + tile, b_token, b_h, b_change, stored, H)
            b_grad_gelu = tiles.matrix_tile(grad_gelu_ptr + tile, b_token, b_h, last, H)
            b_grad_rest += b_grad_gelu * (b_slope_perturbed - b_slope)
            b_grad_hidden = b_grad_gelu * b_slope_perturbed
            b_grad_B = maths.dot(tl.trans(b_z), b_grad_hidden, b_grad_B, DTYPE)
            tile += sample_stride
            b_sample_ptr += samples_stride_m
        base = grad_rest_ptr + group * N * H
        tiles.store_matrix(base, b_token, b_h, b_grad_rest * rho, stored, H)
    slab += group * (tl.num_programs(0) // NH)
    b_r = first_r + tl.arange(0, BR)
    tiles.store_matrix(grad_B_ptr + slab * (R * H), b_r, b_h, b_grad_B * rho, R, H)


def _blocks(layout: Layout) -> dict[str, int]:
    return {"BR": launch.block(layout.R, 32), "BH": launch.block(layout.H, 64)}


def change(layout: Layout, rest: Tensor) -> Tensor:
    """Return gelu(h + z B) - gelu(h) [M, N, H] in the table's dtype from h [N, H]."""
    M, N, H = layout.M, layout.N, layout.H
    result = layout.table.new_empty((M, N, H))
    blocks = _blocks(layout)
    BT = 2048 // blocks["BH"]
    launch.start(
        change_kernel,
        (M * triton.cdiv(N, BT), triton.cdiv(H, blocks["BH"])),
        {
            **layout.noise,
            **blocks,
            "change_ptr": result,
            "rest_ptr": rest,
            "B_ptr": layout.U,
            "N": N,
            "R": layout.R,
            "H": H,
            "BT": BT,
        },
        num_warps=8,
    )
    return result


def hidden_backward(
    layout: Layout,
    rest: Tensor,  # h [N, H]
    grad_gelu: Tensor,  # [M, N, H] fp32
    sums: Sums,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of h [groups, N, H] and of B, and the inner layer's change."""
    blocks = _blocks(layout)
    BT, num_warps = (16, 8) if blocks["BH"] == 64 else (32, 4)
    NR, NH = triton.cdiv(layout.R, blocks["BR"]), triton.cdiv(layout.H, blocks["BH"])
    wanted = launch.programs(layout.device, num_warps)
    slab_tokens, slabs = sums.slabs(BT, NH * NR, wanted)
    grad_rest = layout.fp32(sums.groups, layout.N, layout.H)
    grad_B = layout.fp32(sums.groups, sums.segments, slabs, layout.R, layout.H)
    result = layout.table.new_empty((layout.M, layout.N, layout.H))
    launch.start(
        hidden_backward_kernel,
        (sums.segments * slabs * NH, sums.groups, NR),
        {
            **layout.noise,
            **blocks,
            "grad_rest_ptr": grad_rest,
            "grad_B_ptr": grad_B,
            "change_ptr": result,
            "grad_gelu_ptr": grad_gelu,
            "rest_ptr": rest,
            "B_ptr": layout.U,
            "rho_ptr": layout.rho,
            "M": layout.M // max(1, sums.groups),
            "N": layout.N,
            "segment_tokens": sums.segment_tokens,
            "slab_tokens": slab_tokens,
            "R": layout.R,
            "H": layout.H,
            "BT": BT,
        },
        num_warps=num_warps,
    )
    return grad_rest, grad_B.sum(2), result
