"""perturb_embed on GPUs: M perturbed samples of a batch of embeddings, and their gradients.

Forward. A program owns BT tokens by BD columns: it reads e once, projects it once, then for each
sample draws z in registers and writes a tile of T(e, z). With v = z U (for mlp, C takes U's part):

    diagonal  e + rho s z          lowrank  e + rho v          affine  (1 + z Ua) e + rho z Ub
    gated     e + rho (1 + G) v,   G = tanh(P C),              P = (e / rho) A
    mlp       e + rho (gelu(h + z B) - gelu(h)) C,   h = P + b

P [N, H] is made beforehand (`perturb_embed_projection`), G and gelu(h) from it once a tile.

Backward, with N = B T and g the upstream gradient, which counts as 0 for U, C, ... where a token
keeps its embedding:

    diagonal  ds = rho sum g z             lowrank  dU = rho z' g
    affine    dUa = z' (g e), dUb = rho z' g, de = sum_m g (1 + z Ua)
    gated     dU = rho z' (g (1 + G)), k = rho (1 - G^2) sum_m g v, dC = P' k, q = k C'
    mlp       p_m = rho g C', dB = z' (p_m gelu'(h + z B)), dC = rho (gelu(h + z B) - gelu(h))' g
              q = sum_m p_m (gelu'(h + z B) - gelu'(h)), db = sum q
    both      dA = (e / rho)' q, de = sum_m g + q A' / rho

g is read once for up to 64 latents (32 for gated, affine and in fp32) and 64 hidden units (32 in
fp32 on Ampere), and again for each further block of either. q is a sum over all columns, of which
blocks of columns store partial sums. All partial sums are added up in a fixed order: the same seed
gives the same bits. The table's gradient is torch's own of an embedding, in fp32, rounded once.

The cost for M = 8, N = 8192, D = 4096, R = 16, H = 64, bf16 and a frozen table, and the speed to
expect of an H100 at 3.0 TB/s. PREDICTED: this code has been compiled for sm_80, sm_90 and sm_100
and run in the interpreter, never yet on a GPU. Instructions are SASS of the sample loop per output
element and thread; one costs 9.1 us at the issue limit. The output is 537 MB: writing it takes
0.18 ms, copying it 0.36 ms.

              MB moved  floor  GFLOP  instr.  regs  smem   warps/SM  predicted (ms), and its limit
    forward
    diagonal       604   0.20      1    29.6    87   4 KB       20   0.38  issue: Philox per element
    lowrank        604   0.20      9     8.4   104  25 KB       16   0.22  memory
    gated          681   0.23     17    14.8   128  16 KB       16   0.30  memory, issue
    affine         604   0.20     17    11.9   136  19 KB       12   0.23  memory
    mlp            681   0.23     40    14.9   182  41 KB        8   0.30  issue: gelu per block
    backward
    diagonal       537   0.18      1    33.0    63   4 KB       32   0.42  issue: Philox per element
    lowrank        554   0.19     17     9.4    95  27 KB       20   0.20  memory
    gated          847   0.28     40    26.6   250  33 KB        8   0.50  registers, then issue
    affine         638   0.21     34    10.9   158  27 KB       12   0.23  memory
    mlp            805   0.27     86    27.9   231  66 KB        8   0.55  registers, then issue

So gated's and mlp's backward should miss 75% of the speed of a copy: dC of a block of columns
fills the registers, 8 warps a multiprocessor hide little latency, and their partial sums of q and
dC are half of the memory traffic beyond g.
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


def perturb_embed(call: EmbedCall, want_shift: bool) -> Embedded:
    whole = Layout(call)
    M, B, T, D = whole.M, whole.B, whole.T, whole.D
    out = call.table.new_empty((M, B, T, D))
    projected = projection.project(whole)
    squared_shifts = []
    cut = list(pieces(call, forward.token_bytes(whole)))
    for piece in cut:
        layout = whole if len(cut) == 1 else Layout(piece.of(call))
        kept = None if projected is None else piece.rows_of(projected, call)
        squared_shift = forward.forward(layout, piece.tokens(out), kept, want_shift=want_shift)
        squared_shifts.append(squared_shift)
    squared_shift = torch.cat(squared_shifts, 1).view(M, B, T) if want_shift else None
    return Embedded(out, squared_shift, projected)


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
    projected: Tensor | None,  # [N, H], from the forward; made again if there is none
    want_table: bool,
) -> list[Tensor]:
    """Return the gradients of [table, *parameters]; the table's is empty unless wanted."""
    grad_e, grads = backward.backward(
        call, grad, projected, want_table=want_table, per_sample=False
    )
    grads = [value[0, 0].to(like.dtype) for value, like in zip(grads, call.parameters)]
    if grad_e is None:
        return [call.table.new_empty(0), *grads]
    if call.ids is None:
        return [grad_e.reshape(call.table.shape), *grads]
    vocab, D = call.table.shape
    grad_table = torch.ops.aten.embedding_dense_backward(
        grad_e.float().reshape(*call.ids.shape, D), call.ids, vocab, -1, False
    )
    return [grad_table.to(call.table.dtype), *grads]


def perturb_embed_per_sample_grad(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
) -> list[Tensor]:
    """Return every parameter's gradient from each sample and batch row alone: [M, B, ...]."""
    _, grads = backward.backward(call, grad, None, want_table=False, per_sample=True)
    return [value.to(like.dtype) for value, like in zip(grads, call.parameters)]
