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
from fastperturb.ops.calls import EmbedCall, Embedded
from fastperturb.transforms import FAMILIES


def perturb_embed(call: EmbedCall, want_shift: bool) -> Embedded:
    embeddings = _embeddings(call)
    dtype = reference.accumulation_dtype(embeddings)
    e, z, rho = (value.to(dtype) for value in (embeddings, _latent(call), call.embed_rms))
    if call.latent_scale is not None:
        z = z * call.latent_scale
    projected = _project(call, e)
    parameters = (value.to(dtype) for value in call.parameters)
    shift = _SHIFTS[call.family](e, z, rho, projected, *parameters)  # (M, B, T, D)
    squared_shift = torch.linalg.vector_norm(shift, dim=-1).square_() if want_shift else None
    out = shift.add_(e).to(embeddings.dtype)
    if call.mask is not None:
        out = torch.where(call.mask[..., None], out, embeddings)
        squared_shift = None if squared_shift is None else squared_shift.where(call.mask, 0.0)
    return Embedded(out, squared_shift, None if projected is None else projected.flatten(0, 1))


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
    projected: Tensor | None,  # [N, H], from the forward
    want_table: bool,
) -> list[Tensor]:
    """Return the gradients of [table, *parameters, latent_scale if there is one].

    The table's is empty unless wanted.
    """
    if projected is not None:
        projected = projected.unflatten(0, call.positions.shape)
    z, embeddings = _latent(call), _embeddings(call)
    through_shift, grads = _shift_gradient(grad, call, z, embeddings, projected)
    table = call.table
    if not want_table:
        return [table.new_empty(0), *grads]
    upstream = grad.to(reference.accumulation_dtype(table)).sum(0)
    return [_table_gradient(upstream + through_shift, call), *grads]


def perturb_embed_per_sample_grad(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
) -> list[Tensor]:
    """Return every parameter's gradient from each sample and batch row alone: [M, B, ...].

    A latent_scale's comes last.
    """
    z, embeddings = _latent(call), _embeddings(call)
    projected = _project(call, embeddings.to(reference.accumulation_dtype(embeddings)))
    M, B = call.samples.shape
    results = [value.new_empty((M, B, *value.shape)) for value in call.parameters]
    if call.latent_scale is not None:
        results.append(call.latent_scale.new_empty((M, *call.latent_scale.shape)))
    for m in range(M):
        for b in range(B):
            sample, row = slice(m, m + 1), slice(b, b + 1)
            mask, scale = (
                None if value is None else value[row] for value in (call.mask, call.latent_scale)
            )
            part = call._replace(mask=mask, latent_scale=scale)
            kept = None if projected is None else projected[row]
            tensors = z[sample, row], embeddings[row], kept
            _, grads = _shift_gradient(grad[sample, row], part, *tensors)
            for result, value in zip(results, grads, strict=True):
                result[m, b] = value  # a scale's has a row dimension of one
    return results


def _table_gradient(grad_embeddings: Tensor, call: EmbedCall) -> Tensor:
    """Return the gradient of the table, or of the embeddings where there is none."""
    table, ids = call.table, call.ids
    if ids is None:
        return grad_embeddings.to(table.dtype)
    # In 16 bits a frequent token's sum would stop growing.
    grad_table = grad_embeddings.new_zeros(table.shape)
    # The same bits in every run: index_add_ takes the tokens in turn on a CPU, and index_put_ sorts
    # them on a GPU. The other way round each adds atomically.
    if table.device.type == "cpu":
        grad_table.index_add_(0, ids.flatten(), grad_embeddings.flatten(0, 1))
    else:
        grad_table.index_put_((ids,), grad_embeddings, accumulate=True)
    return grad_table.to(table.dtype)


def _embeddings(call: EmbedCall) -> Tensor:
    return call.table if call.ids is None else F.embedding(call.ids, call.table)


def _latent(call: EmbedCall) -> Tensor:
    z = noise.draw_latent(
        call.seed,
        call.samples,
        call.rows,
        call.positions,
        latent_dim=call.latent_dim,
        latent=call.latent,
        scope=call.scope,
        antithetic=call.antithetic,
        strata=call.strata,
    )
    if call.latent_std != 1.0:
        z *= call.latent_std
    return z if call.latent_mean is None else z.add_(call.latent_mean)


def _project(call: EmbedCall, e: Tensor) -> Tensor | None:
    """Return (e / rho) A [B, T, H], for mlp + b, in e's dtype; None for a family without A."""
    if call.projection_width is None:
        return None
    named = dict(zip(FAMILIES[call.family].parameter_names, call.parameters, strict=True))
    projected = (e / call.embed_rms.to(e.dtype)) @ named["A"].to(e.dtype)
    return projected.add_(named["b"]) if "b" in named else projected


# Each takes (e, z, rho, the projection of e, *parameters) and returns the shift [M, B, T, D].


def _diagonal_shift(e: Tensor, z: Tensor, rho: Tensor, _: None, s: Tensor) -> Tensor:
    return rho * s * z


def _lowrank_shift(e: Tensor, z: Tensor, rho: Tensor, _: None, U: Tensor) -> Tensor:
    return (z @ U).mul_(rho)


def _gated_shift(
    e: Tensor, z: Tensor, rho: Tensor, projected: Tensor, U: Tensor, A: Tensor, C: Tensor
) -> Tensor:
    return (z @ U).mul_(rho * (1 + torch.tanh(projected @ C)))


def _affine_shift(e: Tensor, z: Tensor, rho: Tensor, _: None, Ua: Tensor, Ub: Tensor) -> Tensor:
    return (z @ Ua).mul_(e).add_((z @ Ub).mul_(rho))


def _mlp_shift(
    e: Tensor, z: Tensor, rho: Tensor, rest: Tensor, A: Tensor, B: Tensor, b: Tensor, C: Tensor
) -> Tensor:
    return ((F.gelu(rest + z @ B) - F.gelu(rest)) @ C).mul_(rho)


_SHIFTS: dict[str, Callable[..., Tensor]] = {
    "diagonal": _diagonal_shift,
    "lowrank": _lowrank_shift,
    "gated": _gated_shift,
    "affine": _affine_shift,
    "mlp": _mlp_shift,
    "context": _lowrank_shift,  # of scaled latents
}


def _shift_gradient(
    grad: Tensor, call: EmbedCall, z: Tensor, embeddings: Tensor, projected: Tensor | None
) -> tuple[Tensor | float, list[Tensor]]:
    """Return the embeddings' gradient through the shift, and those of parameters and scale."""
    dtype = reference.accumulation_dtype(embeddings)
    upstream = grad.to(dtype)
    if call.mask is not None:
        upstream = upstream * call.mask[..., None]
    rho, latent, scale = call.embed_rms.to(dtype), z.to(dtype), call.latent_scale
    through_shift, grads = _SHIFT_GRADIENTS[call.family](
        embeddings.to(dtype),
        latent if scale is None else latent * scale,
        rho,
        upstream,
        projected,
        *(value.to(dtype) for value in call.parameters),
    )
    grads = [value.to(like.dtype) for value, like in zip(grads, call.parameters, strict=True)]
    if scale is not None:
        (U,) = call.parameters
        grads.append(rho * (latent * (upstream @ U.to(dtype).T)).sum(0))
    return through_shift, grads


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum left [..., I] times right [..., J] over every leading dimension: [I, J]."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)


# Each takes (e, z, rho, upstream gradient of the perturbed rows, the projection of e, *parameters)
# and returns the gradient of e through the shift, and the parameters' gradients.


def _diagonal_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, _: None, s: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    return 0.0, [rho * (g * z).sum((0, 1, 2))]


def _lowrank_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, _: None, U: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    return 0.0, [rho * _outer(z, g)]


def _gated_gradient(
    e: Tensor,
    z: Tensor,
    rho: Tensor,
    g: Tensor,
    projected: Tensor,
    U: Tensor,
    A: Tensor,
    C: Tensor,
) -> tuple[Tensor | float, list[Tensor]]:
    gate = torch.tanh(projected @ C)
    grad_gate = rho * (g * (z @ U)).sum(0) * (1 - gate.square())  # (B, T, D), through tanh
    grad_projected = grad_gate @ C.T
    grads = [
        rho * _outer(z, g * (1 + gate)),
        _outer(e / rho, grad_projected),
        _outer(projected, grad_gate),
    ]
    return grad_projected @ A.T / rho, grads


def _affine_gradient(
    e: Tensor, z: Tensor, rho: Tensor, g: Tensor, _: None, Ua: Tensor, Ub: Tensor
) -> tuple[Tensor | float, list[Tensor]]:
    return (g * (z @ Ua)).sum(0), [_outer(z, g * e), rho * _outer(z, g)]


def _mlp_gradient(
    e: Tensor,
    z: Tensor,
    rho: Tensor,
    g: Tensor,
    rest: Tensor,  # [B, T, H], the hidden layer at z = 0
    A: Tensor,
    B: Tensor,
    b: Tensor,
    C: Tensor,
) -> tuple[Tensor | float, list[Tensor]]:
    hidden = rest + z @ B  # (M, B, T, H)
    grad_gelu = rho * (g @ C.T)
    grad_hidden = grad_gelu * _gelu_slope(hidden)
    grad_rest = grad_hidden.sum(0) - grad_gelu.sum(0) * _gelu_slope(rest)
    grads = [
        _outer(e / rho, grad_rest),
        _outer(z, grad_hidden),
        grad_rest.sum((0, 1)),
        rho * _outer(F.gelu(hidden) - F.gelu(rest), g),
    ]
    return grad_rest @ A.T / rho, grads


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


_SHIFT_GRADIENTS: dict[str, Callable[..., tuple[Tensor | float, list[Tensor]]]] = {
    "diagonal": _diagonal_gradient,
    "lowrank": _lowrank_gradient,
    "gated": _gated_gradient,
    "affine": _affine_gradient,
    "mlp": _mlp_gradient,
    "context": _lowrank_gradient,
}
