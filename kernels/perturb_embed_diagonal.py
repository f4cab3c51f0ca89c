"""The family diagonal, T(e, z) = e + rho s z, and its gradient ds = rho sum g z.

It has a latent for each column, so a program draws those of its tile in registers, unless all
tokens of a batch row share them: then they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout, Sums
from fastperturb.kernels.perturb_embed_latents import draw_sequences

_BT, _BD = 4, 256


def _warps(layout: Layout) -> int:
    return 4 if layout.half else 8  # 16 bytes of e a thread


@triton.jit(do_not_specialize=launch.VARYING)
def diagonal_forward_kernel(
    out_ptr,  # [M, N, D], of samples that are sample_tokens apart
    squared_shift_ptr,  # [ND, M, N] fp32, or None
    table_ptr,  # [vocab, D], or the embeddings [N, D] when there are no ids
    ids_ptr,
    s_ptr,  # [D]
    rho_ptr,
    z_ptr,  # [M, B, D] fp32, the latents of all tokens of a batch row; None: to be drawn
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    mean_ptr,
    table_stride,
    M,
    N,
    B,
    T,
    vocab,
    sample_tokens,
    samples_stride_m,
    samples_stride_b,
    row_ids_stride_b,
    row_ids_stride_t,
    positions_stride_b,
    positions_stride_t,
    mean_stride_b,
    mean_stride_t,
    std,
    D: tl.constexpr,
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,  # (latent, antithetic, strata, fast)
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    ND: tl.constexpr = (D + BD - 1) // BD
    block_d = tl.program_id(0) % ND
    b_token = tl.program_id(0) // ND * BT + tl.arange(0, BT)
    b_d = block_d * BD + tl.arange(0, BD)
    b_live = b_token < N
    seed = tl.load(seed_ptr)
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    means = mean_stride_b, mean_stride_t
    b_source, b_known = tiles.source_rows(ids_ptr, b_token, b_live, vocab)
    b_e = tiles.embedding_tile(table_ptr, table_stride, b_source, b_known, b_d, D, float("nan"))
    tokens = tiles.load_tokens(seed, b_token, b_live, T, row_ids, positions, mask_ptr, means, SCOPE)
    b_sample_ptr = samples_ptr + tokens.b_batch * samples_stride_b
    b_s = tl.load(s_ptr + b_d, mask=b_d < D, other=0.0).to(tl.float32)
    b_s *= tl.load(rho_ptr).to(tl.float32)

    b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
    b_mask = b_live[:, None] & (b_d < D)[None, :]
    if squared_shift_ptr is not None:
        squared_shift_ptr += tl.cast(block_d, tl.int64) * M * N
    b_z = tl.zeros([BT, BD], tl.float32)
    b_pair = tl.full([BT], -1, tl.int32)  # no pair has an odd number
    for _ in range(M):
        if z_ptr is None:
            b_z, b_pair, b_sign = tiles.latent_of_pair(
                tokens, b_sample_ptr, block_d * BD, b_z, b_pair, NOISE
            )
            b_latent = tiles.moved(tokens, b_z * b_sign[:, None], mean_ptr, std, b_d, D)
            b_shift = b_latent * b_s[None, :]
        else:
            b_shift = b_s[None, :] * tiles.latent_of_sequence(tokens, z_ptr, b_d, D)
            z_ptr += tl.cast(B, tl.int64) * D
        if squared_shift_ptr is not None:
            # Chosen by e, which is NaN where there is none, the sum takes e's layout: a row a warp.
            b_squared = tl.where(b_e == b_e, b_shift * b_shift, 0.0)
            tl.store(squared_shift_ptr + b_token, tl.sum(b_squared, axis=1), mask=b_live)
            squared_shift_ptr += tl.cast(N, tl.int64)
        tl.store(out_ptr + b_offset, (b_e.to(tl.float32) + b_shift).to(DTYPE), mask=b_mask)
        out_ptr += tl.cast(sample_tokens, tl.int64) * D
        b_sample_ptr += samples_stride_m


@triton.jit(do_not_specialize=launch.VARYING)
def diagonal_backward_kernel(
    grad_ptr,  # [M, N, D]
    grad_s_ptr,  # [G, S, D] fp32
    grad_e_ptr,  # [N, D], sum_m g in the table's dtype, or None
    rho_ptr,
    z_ptr,  # [M, B, D] fp32, the latents of all tokens of a batch row; None: to be drawn
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    mean_ptr,
    M,  # samples of one group
    N,
    B,
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
    D: tl.constexpr,
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """The sum of g z over a slab of tokens and the samples of a group."""
    ND: tl.constexpr = (D + BD - 1) // BD
    slab, first, last = tiles.slab_of_tokens(segment_tokens, slab_tokens, N, ND)
    block_d = tl.program_id(0) % ND
    group = tl.cast(tl.program_id(1), tl.int64)
    b_d = block_d * BD + tl.arange(0, BD)
    seed = tl.load(seed_ptr)
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    means = mean_stride_b, mean_stride_t
    sample_stride = tl.cast(N, tl.int64) * D
    grad_ptr += group * M * sample_stride
    samples_ptr += group * M * samples_stride_m
    if z_ptr is not None:
        z_ptr += group * M * B * D
    b_grad_s = tl.zeros([BT, BD], tl.float32)
    for start in range(first, last, BT):
        b_token = start + tl.arange(0, BT)
        b_live = b_token < last
        b_offset = b_token.to(tl.int64)[:, None] * D + b_d[None, :]
        b_mask = b_live[:, None] & (b_d < D)[None, :]
        tokens = tiles.load_tokens(
            seed, b_token, b_live, T, row_ids, positions, mask_ptr, means, SCOPE
        )
        b_sample_ptr = samples_ptr + tokens.b_batch * samples_stride_b
        b_grad_e = tl.zeros([BT, BD], tl.float32)
        tile_ptr, sequence_ptr = grad_ptr, z_ptr
        b_z = tl.zeros([BT, BD], tl.float32)
        b_pair = tl.full([BT], -1, tl.int32)
        for _ in range(M):
            b_g = tl.load(tile_ptr + b_offset, mask=b_mask, other=0.0).to(tl.float32)
            if z_ptr is None:
                b_z, b_pair, b_sign = tiles.latent_of_pair(
                    tokens, b_sample_ptr, block_d * BD, b_z, b_pair, NOISE
                )
                b_latent = tiles.moved(tokens, b_z * b_sign[:, None], mean_ptr, std, b_d, D)
                b_grad_s += b_g * b_latent
            else:
                b_grad_s += b_g * tiles.latent_of_sequence(tokens, sequence_ptr, b_d, D)
                sequence_ptr += tl.cast(B, tl.int64) * D
            if grad_e_ptr is not None:
                b_grad_e += b_g
            tile_ptr += sample_stride
            b_sample_ptr += samples_stride_m
        if grad_e_ptr is not None:
            b_stored = b_grad_e.to(grad_e_ptr.dtype.element_ty)
            tl.store(grad_e_ptr + b_offset, b_stored, mask=b_mask)
    slab += group * (tl.num_programs(0) // ND)
    b_sum = tl.sum(b_grad_s, axis=0) * tl.load(rho_ptr).to(tl.float32)
    tl.store(grad_s_ptr + slab * D + b_d, b_sum, mask=b_d < D)


def forward(layout: Layout, out: Tensor, *, want_shift: bool) -> Tensor | None:
    """Write the perturbed embeddings; return the squared shift of each, [M, N], if wanted."""
    BD = launch.block(layout.D, _BD)
    ND = triton.cdiv(layout.D, BD)
    squared_shift = layout.fp32(ND, layout.M, layout.N) if want_shift else None
    launch.start(
        diagonal_forward_kernel,
        (triton.cdiv(layout.N, _BT) * ND,),
        {
            **layout.source,
            **layout.noise,
            "out_ptr": out,
            "squared_shift_ptr": squared_shift,
            "s_ptr": layout.U,
            "rho_ptr": layout.rho,
            "M": layout.M,
            "z_ptr": draw_sequences(layout),
            "N": layout.N,
            "B": layout.B,
            "sample_tokens": layout.N,
            "D": layout.D,
            "BT": _BT,
            "BD": BD,
        },
        num_warps=_warps(layout),
    )
    return None if squared_shift is None else torch.sum(squared_shift, 0)


def backward(
    layout: Layout,
    grad: Tensor,  # [M, B, T, D]
    _: None,
    sums: Sums,
    grad_e: Tensor | None,  # [N, D], written
) -> dict[str, Tensor]:
    """Return the gradient of s in fp32, [groups, segments, D], as U."""
    BD = launch.block(layout.D, _BD)
    ND = triton.cdiv(layout.D, BD)
    slab_tokens, slabs = sums.slabs(_BT, ND, launch.programs(layout.device, _warps(layout)))
    grad_s = layout.fp32(sums.groups, sums.segments, slabs, layout.D)
    launch.start(
        diagonal_backward_kernel,
        (sums.segments * slabs * ND, sums.groups),
        {
            **layout.noise,
            "grad_ptr": grad,
            "grad_s_ptr": grad_s,
            "grad_e_ptr": grad_e,
            "rho_ptr": layout.rho,
            "M": layout.M // max(1, sums.groups),
            "z_ptr": draw_sequences(layout),
            "N": layout.N,
            "B": layout.B,
            "segment_tokens": sums.segment_tokens,
            "slab_tokens": slab_tokens,
            "D": layout.D,
            "BT": _BT,
            "BD": BD,
        },
        num_warps=_warps(layout),
    )
    return {"U": grad_s.sum(2)}
