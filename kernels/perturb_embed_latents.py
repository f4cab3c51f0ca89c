"""The latents of all samples and tokens, drawn once into a buffer that the products read.

A block of columns that drew its own would repeat Philox D / BD times a token. The buffer holds
4 R bytes a sample and token where the output holds 2 D, and `perturb_embed_call.pieces` bounds it.
Pairs and sequences that share a latent draw it again: at one draw a token that costs no more than
to read it, and no host knows which samples are pairs. With D latents a token, for diagonal, it
does: see `draw_sequences`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.kernels.perturb_embed_call import Layout


@triton.jit(do_not_specialize=launch.VARYING)
def draw_kernel(
    z_ptr,  # [M, N, R] fp32
    seed_ptr,
    samples_ptr,
    row_ids_ptr,
    positions_ptr,
    mask_ptr,
    mean_ptr,
    scale_ptr,  # [N, R], or None: 1
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
    SCOPE: tl.constexpr,
    NOISE: tl.constexpr,  # (latent, antithetic, strata, fast)
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """z of a tile of one sample's tokens, scaled; 0 for tokens that keep their embedding."""
    sample, b_token = tiles.sample_and_tokens(N, BT)
    first = tl.program_id(1) * BR
    row_ids = row_ids_ptr, row_ids_stride_b, row_ids_stride_t
    positions = positions_ptr, positions_stride_b, positions_stride_t
    means = mean_stride_b, mean_stride_t
    seed = tl.load(seed_ptr)
    tokens = tiles.load_tokens(
        seed, b_token, b_token < N, T, row_ids, positions, mask_ptr, means, SCOPE
    )
    b_sample_ptr = samples_ptr + sample * samples_stride_m + tokens.b_batch * samples_stride_b
    b_r = first + tl.arange(0, BR)
    b_z = tiles.latent_tile(tokens, b_sample_ptr, first, mean_ptr, std, R, BR, NOISE)
    if scale_ptr is not None:
        b_z *= tiles.matrix_tile(scale_ptr, b_token, b_r, N, R)
    tiles.store_matrix(z_ptr + sample * N * R, b_token, b_r, b_z, N, R)


def draw(layout: Layout, scale: Tensor | None = None) -> Tensor:
    """Return the latents [M, N, R] in fp32, 0 for tokens that keep their embedding.

    scale: [N, R], which multiplies them.
    """
    return _draw(layout, layout.N, {**layout.noise, "scale_ptr": scale})


def draw_sequences(layout: Layout) -> Tensor | None:
    """Return the latents [M, B, R] that all tokens of a batch row share, or None if they do not."""
    if layout.noise["SCOPE"] != "sequence" or layout.noise["row_ids_stride_t"] != 0:
        return None
    if layout.T < 16:  # the buffer would be as large as the output
        return None
    if layout.noise["mean_ptr"] is not None and layout.noise["mean_stride_t"] != 0:
        return None
    return _draw(layout, layout.B, {**layout.noise, "T": 1, "mask_ptr": None, "scale_ptr": None})


def _draw(layout: Layout, N: int, noise: dict[str, Any]) -> Tensor:
    z = layout.fp32(layout.M, N, layout.R)
    BR = launch.block(layout.R, 32)
    BT = 1024 // BR
    launch.start(
        draw_kernel,
        (layout.M * triton.cdiv(N, BT), triton.cdiv(layout.R, BR)),
        {**noise, "z_ptr": z, "N": N, "R": layout.R, "BT": BT, "BR": BR},
        num_warps=4,
    )
    return z
