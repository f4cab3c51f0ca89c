"""`perturb_embed` in torch, for any device, with its gradients by hand.

The registered op is opaque to autograd, so each family's gradient is written out here; the
tests hold it against autograd through `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb import noise
from fastperturb.ops import reference
from fastperturb.transforms import FAMILIES


def perturb_embed(
    ids: Tensor | None,
    table: Tensor,
    parameters: list[Tensor],
    embed_rms: Tensor,
    seed: Tensor,
    samples: Tensor,
    rows: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    family: str,
    latent: str,
    scope: str,
    antithetic: bool,
) -> Tensor:
    embeddings = table if ids is None else F.embedding(ids, table)
    dtype = reference.accumulate(embeddings)
    z = noise.draw_latent(
        seed,
        samples,
        rows,
        positions,
        latent_dim=latent_width(family, parameters),
        latent=latent,
        scope=scope,
        antithetic=antithetic,
    )
    moved = FAMILIES[family].formula(
        embeddings.to(dtype),
        z.to(dtype),
        embed_rms.to(dtype),
        *(value.to(dtype) for value in parameters),
    )
    moved = moved.to(embeddings.dtype)
    return moved if mask is None else torch.where(mask[..., None], moved, embeddings)


def latent_width(family: str, parameters: list[Tensor]) -> int:
    """R, read off the parameter whose rows the latent meets (for mlp that is B)."""
    return parameters[FAMILIES[family].latent_parameter].shape[0]


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    ids: Tensor | None,
    table: Tensor,
    parameters: list[Tensor],
    embed_rms: Tensor,
    seed: Tensor,
    samples: Tensor,
    rows: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    family: str,
    latent: str,
    scope: str,
    antithetic: bool,
    want_table: bool,
) -> list[Tensor]:
    """The gradients of [table, *parameters]; the table's is empty unless wanted."""
    embeddings = table if ids is None else F.embedding(ids, table)
    dtype = reference.accumulate(embeddings)
    z = noise.draw_latent(
        seed,
        samples,
        rows,
        positions,
        latent_dim=latent_width(family, parameters),
        latent=latent,
        scope=scope,
        antithetic=antithetic,
    ).to(dtype)
    upstream = grad.to(dtype)
    shifted = upstream if mask is None else upstream * mask[..., None]
    through_shift, grads = _SHIFT_GRADIENTS[family](
        embeddings.to(dtype),
        z,
        embed_rms.to(dtype),
        shifted,
        *(value.to(dtype) for value in parameters),
    )
    results = [value.to(like.dtype) for value, like in zip(grads, parameters, strict=True)]
    if not want_table:
        return [table.new_empty(0), *results]
    grad_embeddings = (upstream.sum(0) + through_shift).to(table.dtype)
    if ids is None:
        return [grad_embeddings, *results]
    # index_put_ sorts on a GPU, so the order of the sums is the same in every run.
    grad_table = torch.zeros_like(table).index_put_((ids,), grad_embeddings, accumulate=True)
    return [grad_table, *results]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """sum over every leading dimension of left [..., I] times right [..., J]: [I, J]."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)


# Each takes (e, z, rho, upstream gradient of the moved rows, *parameters) and returns the
# gradient that reaches e through the shift, and the parameters' gradients.


def _diagonal_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, s: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    return 0.0, [rho * (g * z).sum((0, 1, 2))]


def _lowrank_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, U: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    return 0.0, [rho * _outer(z, g)]


def _gated_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, U: Tensor, A: Tensor, C: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    x = e / rho
    inner = x @ A
    gate = torch.tanh(inner @ C)
    grad_gate = rho * (g * (z @ U)).sum(0) * (1 - gate.square())  # (B, T, D), through tanh
    grad_inner = grad_gate @ C.T
    grads = [rho * _outer(z, g * (1 + gate)), _outer(x, grad_inner), _outer(inner, grad_gate)]
    return grad_inner @ A.T / rho, grads


def _affine_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, Ua: Tensor, Ub: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    return (g * (z @ Ua)).sum(0), [_outer(z, g * e), rho * _outer(z, g)]


def _mlp_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, C: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    x = e / rho
    still = x @ A + b  # (B, T, H)
    moved = still + z @ B  # (M, B, T, H)
    grad_gelu = rho * (g @ C.T)
    grad_moved = grad_gelu * _gelu_slope(moved)
    grad_still = grad_moved.sum(0) - grad_gelu.sum(0) * _gelu_slope(still)
    grads = [
        _outer(x, grad_still),
        _outer(z, grad_moved),
        grad_still.sum((0, 1)),
        rho * _outer(F.gelu(moved) - F.gelu(still), g),
    ]
    return grad_still @ A.T / rho, grads


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


_SHIFT_GRADIENTS: dict[str, Callable[..., tuple[Tensor | float, list[Tensor]]]] = {
    "diagonal": _diagonal_gradient,
    "lowrank": _lowrank_gradient,
    "gated": _gated_gradient,
    "affine": _affine_gradient,
    "mlp": _mlp_gradient,
}
