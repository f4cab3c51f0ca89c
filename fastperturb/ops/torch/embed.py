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
from fastperturb.ops.calls import EmbedCall
from fastperturb.transforms import FAMILIES


def perturb_embed(call: EmbedCall) -> Tensor:  # [M, B, T, D]
    embeddings = _embeddings(call)
    dtype = reference.accumulation_dtype(embeddings)
    perturbed = FAMILIES[call.family].formula(
        embeddings.to(dtype),
        _latent(call).to(dtype),
        call.embed_rms.to(dtype),
        *(value.to(dtype) for value in call.parameters),
    )
    perturbed = perturbed.to(embeddings.dtype)
    if call.mask is None:
        return perturbed
    return torch.where(call.mask[..., None], perturbed, embeddings)


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
    want_table: bool,
) -> list[Tensor]:
    """Return the gradients of [table, *parameters]; the table's is empty unless wanted."""
    through_shift, grads = _shift_gradient(grad, call, _latent(call), _embeddings(call))
    table = call.table
    if not want_table:
        return [table.new_empty(0), *grads]
    upstream = grad.to(reference.accumulation_dtype(table)).sum(0)
    grad_embeddings = upstream + through_shift
    if call.ids is None:
        return [grad_embeddings.to(table.dtype), *grads]
    # index_put_ sorts on a GPU, so the order of the sums is the same in every run. In 16 bits a
    # frequent token's sum would stop growing.
    grad_table = grad_embeddings.new_zeros(table.shape)
    grad_table.index_put_((call.ids,), grad_embeddings, accumulate=True)
    return [grad_table.to(table.dtype), *grads]


def perturb_embed_per_sample_grad(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
) -> list[Tensor]:
    """Return every parameter's gradient from each sample and batch row alone: [M, B, ...]."""
    z, embeddings = _latent(call), _embeddings(call)
    M, B = call.samples.shape
    results = [value.new_empty((M, B, *value.shape)) for value in call.parameters]
    for m in range(M):
        for b in range(B):
            sample, row = slice(m, m + 1), slice(b, b + 1)
            part = call._replace(mask=None if call.mask is None else call.mask[row])
            _, grads = _shift_gradient(grad[sample, row], part, z[sample, row], embeddings[row])
            for result, value in zip(results, grads, strict=True):
                result[m, b] = value
    return results


def _embeddings(call: EmbedCall) -> Tensor:
    return call.table if call.ids is None else F.embedding(call.ids, call.table)


def _latent(call: EmbedCall) -> Tensor:
    return noise.draw_latent(
        call.seed,
        call.samples,
        call.rows,
        call.positions,
        latent_dim=call.parameters[FAMILIES[call.family].latent_parameter].shape[0],
        latent=call.latent,
        scope=call.scope,
        antithetic=call.antithetic,
    )


def _shift_gradient(
    grad: Tensor, call: EmbedCall, z: Tensor, embeddings: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    """Return the embeddings' gradient through the shift, and the parameters' gradients."""
    dtype = reference.accumulation_dtype(embeddings)
    upstream = grad.to(dtype)
    through_shift, grads = _SHIFT_GRADIENTS[call.family](
        embeddings.to(dtype),
        z.to(dtype),
        call.embed_rms.to(dtype),
        upstream if call.mask is None else upstream * call.mask[..., None],
        *(value.to(dtype) for value in call.parameters),
    )
    return through_shift, [
        value.to(like.dtype) for value, like in zip(grads, call.parameters, strict=True)
    ]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum left [..., I] times right [..., J] over every leading dimension: [I, J]."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)


# Each takes (e, z, rho, upstream gradient of the perturbed rows, *parameters) and returns the
# gradient of e through the shift, and the parameters' gradients.


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
    rest = x @ A + b  # (B, T, H), the hidden layer at z = 0
    hidden = rest + z @ B  # (M, B, T, H)
    grad_gelu = rho * (g @ C.T)
    grad_hidden = grad_gelu * _gelu_slope(hidden)
    grad_inner = grad_hidden.sum(0) - grad_gelu.sum(0) * _gelu_slope(rest)
    grads = [
        _outer(x, grad_inner),
        _outer(z, grad_hidden),
        grad_inner.sum((0, 1)),
        rho * _outer(F.gelu(hidden) - F.gelu(rest), g),
    ]
    return grad_inner @ A.T / rho, grads


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
