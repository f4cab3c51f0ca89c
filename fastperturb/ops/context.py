"""The scales that a context transform gives to latents, from what a document holds so far.

They are the same for all samples: a call computes them once, in fp32, for the op that takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.ops import reference
from fastperturb.ops.context_scan import context_scan
from fastperturb.transforms import Context, latent_scale


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
        return latent_scale(states, G), last
