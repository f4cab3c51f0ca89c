"""perturb_embed on GPUs: M perturbed samples of a batch of embeddings, and their gradients.

With N = B T tokens, latents z [M, N, R] and v = z U:

    diagonal  e + rho s z          lowrank  e + rho v          affine  (1 + z Ua) e + rho z Ub
    context   lowrank with z s in the place of z, s [N, R] the scale of each token
    gated     e + rho (1 + G) v,   G = tanh(P C),              P = (e / rho) A
    mlp       e + rho c C,         c = gelu(h + z B) - gelu(h),    h = P + b

Forward. P [N, H] is made first and kept for the backward (`projection`). Then a small kernel writes
z [M, N, R] (`latents`), for mlp c [M, N, H] (`hidden`), once for each sample and token. The main
kernel (`forward`) owns a tile of tokens by columns: it reads e once and, for each sample,
multiplies z or c by the directions of its columns and writes a tile of T(e, z). If wanted it also
stores the sum of (T(e, z) - e)^2 over its columns, which torch adds up. diagonal has a latent for
each column and draws it in registers (`diagonal`), once for an antithetic pair, or reads the draw
that the tokens of a sequence share.

Backward, with g the upstream gradient, which counts as 0 for U, C, ... where a token keeps its
embedding:

    diagonal  ds = rho sum g z             lowrank  dU = rho z' g
    affine    dUa = z' (g e), dUb = rho z' g, de = sum_m g (1 + z Ua)
    context   dU = rho (z s)' g, ds = rho sum_m z (g U')
    gated     dU = rho z' (g (1 + G)), k = rho (1 - G^2) sum_m g v, dC = P' k, q = k C'
    mlp       p = rho g C', dB = z' (p gelu'(h + z B)), dC = rho c' g
              q = sum_m p (gelu'(h + z B) - gelu'(h)), db = sum q
    both      dA = (e / rho)' q, de = sum_m g + q A' / rho

Every product x' g is one kernel (`outer`), which also writes the sums over samples of g, gated's k
and context's ds; every product with C' is another (`columns`); mlp's dB, q and c are a third on
[M, N, H] (`hidden`). g is read once for up to 64 latents (32 for gated, affine, context and in
fp32) and again for each further block. mlp reads it twice: a program that kept dC of its columns
and p, q and dB of its tokens at once would have no registers left for enough warps.

The buffers hold 4 R bytes a sample and token (mlp: 2 H forward, 6 H backward) where the output
holds 2 D. A call whose buffers would exceed 32 MiB runs in pieces of its tokens, so that they stay
in the L2 cache and memory does not grow with M. All partial sums are added up in a fixed order: the
same seed gives the same bits. torch adds up the table's gradient, in fp32, which is rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastperturb.kernels import perturb_embed_backward as backward
from fastperturb.kernels import perturb_embed_forward as forward
from fastperturb.kernels import perturb_embed_projection as projection
from fastperturb.kernels.perturb_embed_call import Layout, pieces
from fastperturb.ops.calls import Embedded

if TYPE_CHECKING:
    from fastperturb.ops.calls import EmbedCall


# Up to so many tokens embedding_dense_backward runs a kernel whose warps, from 1025 tokens on,
# overwrite ids in shared memory that others still read (torch 2.11; pytorch PR #187687).
_RACING_TOKENS = 3072


def perturb_embed(call: EmbedCall, want_shift: bool) -> Embedded:
    whole = Layout(call)
    M, B, T, D = whole.M, whole.B, whole.T, whole.D
    out = call.table.new_empty((M, B, T, D))
    projected = projection.project(whole)
    squared_shifts: list[Tensor] = []
    cut = list(pieces(call, forward.token_bytes(whole)))
    for piece in cut:
        layout = whole if len(cut) == 1 else Layout(piece.of(call))
        kept = None if projected is None else piece.rows_of(projected, call)
        squared_shift = forward.forward(layout, piece.tokens(out), kept, want_shift=want_shift)
        if squared_shift is not None:
            squared_shifts.append(squared_shift)
    squared_shift = torch.cat(squared_shifts, 1).view(M, B, T) if want_shift else None
    return Embedded(out, squared_shift, projected)


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
    projected: Tensor | None,  # [N, H], from the forward; made again if there is none
    want_table: bool,
) -> list[Tensor]:
    """Return the gradients of [table, *parameters, latent_scale if there is one].

    The table's is empty unless wanted.
    """
    grad_e, sums, grad_scale = backward.backward(
        call, grad, projected, want_table=want_table, per_sample=False
    )
    grads = [value[0, 0].to(like.dtype) for value, like in zip(sums, call.parameters)]
    if call.latent_scale is not None and grad_scale is not None:
        grads.append(grad_scale.view(call.latent_scale.shape).to(call.latent_scale.dtype))
    if grad_e is None:
        return [call.table.new_empty(0), *grads]
    if call.ids is None:
        return [grad_e.reshape(call.table.shape), *grads]
    grad_table = _table_gradient(grad_e.float(), call.ids.flatten(), call.table.shape[0])
    return [grad_table.to(call.table.dtype), *grads]


def _table_gradient(grad_e: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Return the sum of each id's gradients [vocab, D], in a fixed order."""
    # An id out of range has no row. As -1 it is left out: it names an extra last row, or padding.
    ids = ids.where((ids >= 0) & (ids < vocab), -1)
    if ids.numel() > _RACING_TOKENS:
        return torch.ops.aten.embedding_dense_backward(grad_e, ids, vocab, -1, False)
    grad_table = grad_e.new_zeros((vocab + 1, grad_e.shape[1]))
    return grad_table.index_put_((ids,), grad_e, accumulate=True)[:vocab]


def perturb_embed_per_sample_grad(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
) -> list[Tensor]:
    """Return every parameter's gradient from each sample and batch row alone: [M, B, ...].

    A latent_scale's comes last.
    """
    _, sums, grad_scale = backward.backward(call, grad, None, want_table=False, per_sample=True)
    grads = [value.to(like.dtype) for value, like in zip(sums, call.parameters)]
    if call.latent_scale is not None and grad_scale is not None:
        grads.append(grad_scale.unflatten(1, call.positions.shape))
    return grads
