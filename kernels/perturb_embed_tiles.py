"""Tiles that the kernels of `perturb_embed` load, draw and store.

A tile is BT tokens by BD columns. Tokens are numbered n = b T + t. Offsets into rows are int64
because M B T D passes 2^31 in ordinary use; counters are taken mod 2^32 by truncation.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastperturb.kernels import noise


class Tokens(NamedTuple):
    """The numbers that key the noise of a tile's tokens, each [BT]."""

    seed: tl.tensor  # a scalar
    b_batch: tl.tensor  # the index b
    b_row_id: tl.tensor
    b_position: tl.tensor
    b_perturbed: tl.tensor  # False for tokens that keep their embedding
    b_mean_offset: tl.tensor  # where the means of their latents are


@triton.jit
def slab_of_tokens(segment_tokens, slab_tokens, N, ND: tl.constexpr):
    """The program's slab, and the first of its tokens and the one after its last."""
    slab = tl.program_id(0) // ND
    slabs = tl.cdiv(segment_tokens, slab_tokens)
    first = slab // slabs * segment_tokens
    last = tl.minimum(first + segment_tokens, N)
    first += slab % slabs * slab_tokens
    return slab, first, tl.minimum(first + slab_tokens, last)


@triton.jit
def sample_and_tokens(N, BT: tl.constexpr):
    """The sample, int64, and the tokens of a program that owns one tile of one sample."""
    tiles = tl.cdiv(N, BT)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    return sample, tl.program_id(0) % tiles * BT + tl.arange(0, BT)


@triton.jit
def source_rows(ids_ptr, b_token, b_live, vocab):
    """The table row of each token, and whether there is one: an id out of range reads NaN."""
    if ids_ptr is None:
        return b_token.to(tl.int64), b_live
    else:
        b_id = tl.load(ids_ptr + b_token, mask=b_live, other=0)
        return b_id, b_live & (b_id >= 0) & (b_id < vocab)


@triton.jit
def embedding_tile(
    table_ptr, table_stride, b_source, b_known, b_d, D: tl.constexpr, OTHER: tl.constexpr
):
    """e [BT, BD] in the table's dtype, OTHER for tokens without a row and beyond D."""
    b_mask = b_known[:, None] & (b_d < D)[None, :]
    pointers = table_ptr + b_source[:, None] * table_stride + b_d[None, :]
    return tl.load(pointers, mask=b_mask, other=OTHER)


@triton.jit
def load_tokens(
    seed,
    b_token,
    b_live,
    T,
    row_ids,  # the pointer and the strides of b and t; so is positions
    positions,
    mask_ptr,
    mean_strides,  # of b and t
    SCOPE: tl.constexpr,
):
    b_batch = (b_token // T).to(tl.int64)
    b_time = (b_token % T).to(tl.int64)
    b_offset = b_batch * row_ids[1] + b_time * row_ids[2]
    b_row_id = tl.load(row_ids[0] + b_offset, mask=b_live, other=0).to(tl.int32)
    if SCOPE == "token":
        b_offset = b_batch * positions[1] + b_time * positions[2]
        b_position = tl.load(positions[0] + b_offset, mask=b_live, other=0).to(tl.int32)
    else:
        b_position = tl.zeros_like(b_row_id)
    b_perturbed = b_live
    if mask_ptr is not None:
        b_perturbed = b_live & (tl.load(mask_ptr + b_token, mask=b_live, other=0) != 0)
    b_mean_offset = b_batch * mean_strides[0] + b_time * mean_strides[1]
    return Tokens(seed, b_batch, b_row_id, b_position, b_perturbed, b_mean_offset)


@triton.jit
def latent_tile(
    tokens,
    b_sample_ptr,  # [BT], where each token's sample number is
    first,
    mean_ptr,
    std,
    R: tl.constexpr,
    BR: tl.constexpr,
    NOISE: tl.constexpr,  # (latent, antithetic, strata, fast)
):
    """z [BT, BR] from latent `first` on, 0 for tokens that keep their embedding.

    Where there are means, z is the mean plus std times the noise.
    Latents beyond R are drawn too: they meet zeros, or sums that are masked out when stored.
    """
    LATENT: tl.constexpr = NOISE[0]
    ANTITHETIC: tl.constexpr = NOISE[1]
    STRATA: tl.constexpr = NOISE[2]
    FAST: tl.constexpr = NOISE[3]
    b_sample = tl.load(b_sample_ptr, mask=tokens.b_perturbed, other=0).to(tl.int32)
    b_pair, b_sign = noise.pair_and_sign(b_sample, ANTITHETIC)
    b_factor = tl.where(tokens.b_perturbed, b_sign, 0.0)
    quad = first // 4 + tl.arange(0, BR // 4)
    b_z = noise.tile(
        tokens.seed,
        quad,
        tokens.b_position,
        b_pair,
        tokens.b_row_id,
        b_factor,
        LATENT,
        STRATA,
        FAST,
    )
    return moved(tokens, b_z, mean_ptr, std, first + tl.arange(0, BR), R)


@triton.jit
def moved(tokens, b_z, mean_ptr, std, b_r, R: tl.constexpr):
    """The mean plus std times the noise [BT, BR], where there are means.

    Tokens that keep their embedding have a mean of 0.
    """
    if mean_ptr is None:
        return b_z
    else:
        b_mask = tokens.b_perturbed[:, None] & (b_r < R)[None, :]
        pointers = mean_ptr + tokens.b_mean_offset[:, None] + b_r[None, :]
        return tl.load(pointers, mask=b_mask, other=0.0) + std * b_z


@triton.jit
def latent_of_pair(
    tokens,
    b_sample_ptr,  # [BT], where each token's sample number is
    first,
    b_z,  # [BT, BR], the latents of the sample before, without their signs
    b_pair,  # [BT], the numbers that key them
    NOISE: tl.constexpr,
):
    """The latents of this sample without their signs, their numbers, and the signs [BT].

    Samples of an antithetic pair that follow each other share a draw.
    """
    LATENT: tl.constexpr = NOISE[0]
    ANTITHETIC: tl.constexpr = NOISE[1]
    STRATA: tl.constexpr = NOISE[2]
    FAST: tl.constexpr = NOISE[3]
    BR: tl.constexpr = b_z.shape[1]
    b_sample = tl.load(b_sample_ptr, mask=tokens.b_perturbed, other=0).to(tl.int32)
    b_next, b_sign = noise.pair_and_sign(b_sample, ANTITHETIC)
    b_sign = tl.where(tokens.b_perturbed, b_sign, 0.0)
    if (not ANTITHETIC) or tl.max((b_next != b_pair).to(tl.int32)) > 0:
        quad = first // 4 + tl.arange(0, BR // 4)
        b_one = tl.full(b_sign.shape, 1.0, tl.float32)
        b_z = noise.tile(
            tokens.seed,
            quad,
            tokens.b_position,
            b_next,
            tokens.b_row_id,
            b_one,
            LATENT,
            STRATA,
            FAST,
        )
    return b_z, b_next, b_sign


@triton.jit
def latent_of_sequence(tokens, z_ptr, b_d, D: tl.constexpr):
    """z [BT, BD] from the latents [B, D] of batch rows, 0 for tokens that keep their embedding."""
    b_mask = tokens.b_perturbed[:, None] & (b_d < D)[None, :]
    return tl.load(z_ptr + tokens.b_batch[:, None] * D + b_d[None, :], mask=b_mask, other=0.0)


@triton.jit
def matrix_tile(ptr, b_i, b_j, I, J: tl.constexpr):  # noqa: E741
    """The entries (b_i, b_j) of a contiguous [I, J] matrix, 0 outside."""
    b_mask = (b_i < I)[:, None] & (b_j < J)[None, :]
    pointers = ptr + b_i.to(tl.int64)[:, None] * J + b_j[None, :]
    return tl.load(pointers, mask=b_mask, other=0.0)


@triton.jit
def store_matrix(ptr, b_i, b_j, b_value, I, J: tl.constexpr):  # noqa: E741
    b_mask = (b_i < I)[:, None] & (b_j < J)[None, :]
    tl.store(ptr + b_i.to(tl.int64)[:, None] * J + b_j[None, :], b_value, mask=b_mask)
