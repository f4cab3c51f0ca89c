"""The gradients of `perturb_embed` from its kernels, whose maths is in `perturb_embed`.

A call whose buffers would be large runs in pieces of its tokens, whose gradients are added up in
their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastperturb.kernels import launch
from fastperturb.kernels import perturb_embed_diagonal as diagonal
from fastperturb.kernels import perturb_embed_hidden as hidden
from fastperturb.kernels import perturb_embed_latents as latents
from fastperturb.kernels import perturb_embed_projection as projection
from fastperturb.kernels.perturb_embed_call import ROLES, Layout, Sums, pieces
from fastperturb.kernels.perturb_embed_columns import through_C
from fastperturb.kernels.perturb_embed_outer import outer

if TYPE_CHECKING:
    from fastperturb.ops.calls import EmbedCall


class Gradients(NamedTuple):
    """Gradients of a call, by what they are of."""

    embeddings: Tensor | None  # [N, D], where wanted
    parameters: list[Tensor]  # [groups, segments, ...] each, in fp32
    scale: Tensor | None  # context: [groups, N, R]


def backward(
    call: EmbedCall,
    grad: Tensor,  # [M, B, T, D]
    projected: Tensor | None,  # [N, H], made again if there is none
    *,
    want_table: bool,
    per_sample: bool,
) -> Gradients:
    """Return all gradients; `per_sample` makes a group of each sample and a segment of each row."""
    whole = Layout(call)
    grad = (grad if grad.dtype in launch.DTYPES else grad.float()).contiguous()
    if projected is None:
        projected = projection.project(whole)
    cut = list(pieces(call, _token_bytes(whole, grad, per_sample)))
    if len(cut) == 1:
        return _piece_backward(whole, grad, projected, want_table, per_sample)
    groups, segments, _ = whole.sums(per_sample=per_sample)
    totals = [whole.fp32(groups, segments, *value.shape).zero_() for value in call.parameters]
    grad_es: list[Tensor] = []
    grad_scales: list[Tensor] = []
    for piece in cut:
        kept = None if projected is None else piece.rows_of(projected, call)
        inputs = Layout(piece.of(call)), piece.tokens(grad), kept
        grad_e, grads, grad_scale = _piece_backward(*inputs, want_table, per_sample)
        if grad_e is not None:
            grad_es.append(grad_e)
        if grad_scale is not None:
            grad_scales.append(grad_scale)
        for total, value in zip(totals, grads, strict=True):
            total[:, piece.rows if per_sample else slice(None)] += value
    return Gradients(
        torch.cat(grad_es) if want_table else None,
        totals,
        torch.cat(grad_scales, 1) if grad_scales else None,
    )


def _token_bytes(layout: Layout, grad: Tensor, per_sample: bool) -> int:
    """Return the bytes of the buffers for a sample and token."""
    if layout.family == "diagonal":
        return 0
    if layout.family == "mlp":
        return (layout.dtype.itemsize + 4) * layout.H
    gate = layout.D * grad.dtype.itemsize if layout.family == "gated" and per_sample else 0
    return 4 * layout.R + gate


def _piece_backward(
    layout: Layout, grad: Tensor, projected: Tensor | None, want_table: bool, per_sample: bool
) -> Gradients:
    sums = layout.sums(per_sample=per_sample)
    grad_e = None
    if want_table:  # with a projection it is a part of the gradient, which stays in fp32
        dtype = layout.dtype if projected is None else torch.float32
        grad_e = layout.table.new_empty((layout.N, layout.D), dtype=dtype)
    grads = _FAMILIES[layout.family](layout, grad, projected, sums, grad_e)
    if projected is not None:
        grad_projected = grads["projected"]  # [groups, N, H]
        by_segment = grad_projected.view(*sums, layout.H)
        grads["b"] = by_segment.sum(2)
        grads["A"], grad_e = projection.project_backward(layout, grad_projected, grad_e, sums)
    parameters = [grads[role] for role in ROLES[layout.family]]
    return Gradients(grad_e, parameters, grads.get("scale"))


# Each takes (layout, grad, projected, sums, grad_e), writes grad_e where wanted, and returns the
# gradients of the parameters by role and, if there is one, of the projection or the scale.


def _products(
    layout: Layout, grad: Tensor, _: None, sums: Sums, grad_e: Tensor | None
) -> dict[str, Tensor]:
    z = latents.draw(layout)
    return outer(
        layout, layout.family, grad, z, sums, rho=layout.rho, grad_e=grad_e, scale=layout.scale
    )


def _gated(
    layout: Layout, grad: Tensor, projected: Tensor, sums: Sums, grad_e: Tensor | None
) -> dict[str, Tensor]:
    k = grad.new_empty((sums.groups, layout.N, layout.D))
    sums_over_samples = {"grad_e": grad_e, "grad_gate": k}
    z = latents.draw(layout)
    grads = outer(
        layout, "gated", grad, z, sums, rho=layout.rho, projected=projected, **sums_over_samples
    )
    grads["C"] = outer(layout, "lowrank", k, projected, sums)["U"]
    return {**grads, "projected": through_C(layout, k)}


def _mlp(
    layout: Layout, grad: Tensor, projected: Tensor, sums: Sums, grad_e: Tensor | None
) -> dict[str, Tensor]:
    grad_gelu = through_C(layout, grad)
    grad_projected, grad_B, change = hidden.hidden_backward(layout, projected, grad_gelu, sums)
    grad_C = outer(layout, "mlp", grad, change, sums, rho=layout.rho, grad_e=grad_e)["U"]
    return {"U": grad_B, "C": grad_C, "projected": grad_projected}


_FAMILIES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "diagonal": diagonal.backward,
    "lowrank": _products,
    "gated": _gated,
    "affine": _products,
    "mlp": _mlp,
}
