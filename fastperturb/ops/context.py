"""The scales that a context transform gives to latents, from what a document holds so far.

They are the same for all samples: a call computes them once, in fp32, for the op that takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb.ops import reference
from fastperturb.ops.context_scan import context_scan
from fastperturb.transforms import Context, Transform, scale_of_states


def context_scale(
    transform: Context,
    embeddings: Tensor,
    starts: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Return s [B, T, R] of exact embeddings [B, T, D], in fp32.

    embeddings: or hidden states, for context_source="trunk".
    starts: bool [B, T], where documents start; the first position always does.
    real: bool [B, T], False for padding; default all True.
    """
    return scale_and_state(transform, embeddings, starts, real)[0]


def scale_and_state(
    transform: Context,
    embeddings: Tensor,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return s [B, T, R] and h [B, H] after the last position, from that before the first."""
    with torch.autocast(embeddings.device.type, enabled=False):
        source = embeddings.to(reference.accumulation_dtype(embeddings))
        A, G, retain = (
            value.to(source.dtype) for value in (transform.A, transform.G, transform.retain())
        )
        if transform.context_source == "embedding":
            inputs = source @ (A / transform.embed_rms)
        else:  # hidden states, each over its own root mean square
            mean_square = source.square().mean(-1, keepdim=True).clamp_min(1e-24)
            inputs = (source * mean_square.rsqrt()) @ A
        states = context_scan(inputs, retain, starts=starts, real=real, initial=state)
        last = states[:, -1] if states.shape[1] else state
        return scale_of_states(states, G), last


def scale_of_call(
    transform: Transform,
    latent_scale: Tensor | None,
    ids: Tensor,
    table: Tensor | None,
    positions: Tensor,
) -> Tensor | None:
    """Return the scales [B, T, R] of a call; None for another family.

    latent_scale: as given; None is that of rows without padding, in which a document starts where a
        position does not follow the last.
    """
    if not isinstance(transform, Context):
        if latent_scale is not None:
            raise ValueError(
                f"latent_scale is of transform='context', got transform={transform.family!r}: "
                "leave it None"
            )
        return None
    if latent_scale is None:
        if transform.context_source != "embedding":
            raise ValueError(
                f"context_source={transform.context_source!r} makes the context of hidden states: "
                "give latent_scale, from ops.context_scale(transform, hidden_states)"
            )
        embeddings = ids if table is None else F.embedding(ids, table)
        starts = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)[:, : positions.shape[1]]
        return context_scale(transform, embeddings, starts)
    wanted = (*positions.shape, transform.latent_dim)
    dtype = reference.accumulation_dtype(ids if table is None else table)
    if (
        latent_scale.dtype != dtype
        or latent_scale.shape != wanted
        or latent_scale.device != positions.device
    ):
        raise ValueError(
            f"latent_scale must be {dtype} [B, T, R] = {list(wanted)} on {positions.device}, got "
            f"{latent_scale.dtype} {list(latent_scale.shape)} on {latent_scale.device}"
        )
    return latent_scale.contiguous()


def parameter_gradients(
    transform: Transform, latent_scale: Tensor, grad_scale: Tensor
) -> list[Tensor]:
    """Return the gradients of the context's parameters from those of the scales [M, B, T, R]."""
    parameters = [getattr(transform, name) for name in transform.context_parameters]
    if not latent_scale.requires_grad:
        raise ValueError(
            "latent_scale has no graph to the context's parameters: compute it by "
            "ops.context_scale under torch.enable_grad(), with parameters that require gradients"
        )
    M, B = grad_scale.shape[:2]
    psi = [value.new_empty((M, B, *value.shape)) for value in parameters]
    for b in range(B):
        for m in range(M):
            grads = torch.autograd.grad(
                latent_scale[b], parameters, grad_scale[m, b], retain_graph=True
            )
            for result, value in zip(psi, grads, strict=True):
                result[m, b] = value
    return psi
