"""The oracle: each op in plain differentiable torch, in at least fp32.

fp64 inputs are computed in fp64, so these functions define the right answer. They keep
everything in memory and are never the fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb import noise
from fastperturb.transforms import Transform, lowrank


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: the widest of the tensors', and at least fp32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def perturb_embed(
    ids: Tensor,  # [B, T], or embeddings [B, T, D] with table=None
    table: Tensor | None,  # [V, D]
    transform: Transform,
    seed: int | Tensor,
    samples: int | Tensor,
    *,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    antithetic: bool = False,
    strata: int = 1,
    latent_mean: Tensor | None = None,  # [B, T, R]
    latent_std: float = 1.0,
    latent_scale: Tensor | None = None,  # [B, T, R]; None: as of rows that are one document each
    perturb_mask: Tensor | None = None,
) -> Tensor:  # [M, B, T, D]
    embeddings = ids if table is None else F.embedding(ids, table)
    dtype = accumulation_dtype(embeddings)
    num_samples = samples if isinstance(samples, int) else samples.shape[0]
    z = noise.latent(
        noise.seed_tensor(seed, embeddings.device),
        (num_samples, *embeddings.shape[:2], transform.latent_dim),
        latent=transform.latent,
        scope=transform.scope,
        samples=samples if isinstance(samples, Tensor) else None,
        rows=rows,
        positions=positions,
        antithetic=antithetic,
        strata=strata,
    )
    z = z.to(dtype) * latent_std
    if latent_mean is not None:
        z = z + latent_mean.to(dtype)
    parameters = [value.to(dtype) for value in transform.effective_parameters()]
    rho, formula = transform.embed_rms.to(dtype), type(transform).formula
    if latent_scale is not None:
        z, parameters, formula = z * latent_scale, parameters[:1], lowrank
    perturbed = formula(embeddings.to(dtype), z, rho, *parameters)
    perturbed = perturbed.to(embeddings.dtype)
    if perturb_mask is None:
        return perturbed
    return torch.where(perturb_mask[..., None], perturbed, embeddings)


def logits(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> Tensor:  # [..., valid vocabulary]
    dtype = accumulation_dtype(hidden, weight)
    scores = hidden.to(dtype) @ weight[:valid_vocab].to(dtype).T
    if bias is not None:
        scores = scores + bias[:valid_vocab].to(dtype)
    scores = scores * logit_scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> Tensor:  # [N]
    scores = logits(
        hidden,
        weight,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
    )
    kept = target != ignore_index
    index = target.where(kept, 0)[:, None]
    log_probs = torch.log_softmax(scores, dim=-1).gather(1, index)[:, 0].clamp_max(0.0)
    return log_probs.where(kept, 0.0)


def linear_quadratic(
    hidden: Tensor,  # [M, N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,  # [M, N]
    strata: int = 1,
) -> Tensor:  # [N]
    """2/M sum_m r_m p_m(y) - 1/(M(M-G)) sum r_i r_j <p_i, p_j>, summed pair by pair.

    The pairs i, j are of different groups of G = strata samples.
    """
    scores = logits(
        hidden,
        weight,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
    )
    num_samples = hidden.shape[0]
    kept = target != ignore_index
    index = target.where(kept, 0)
    probs = torch.softmax(scores, dim=-1)  # (M, N, V)
    if row_weights is not None:
        probs = probs * row_weights.detach().to(probs)[..., None]
    hit = probs.gather(2, index.expand(num_samples, -1)[..., None])[..., 0]
    inner = torch.einsum("inv,jnv->nij", probs, probs)
    group = torch.arange(num_samples, device=hidden.device) // strata
    cross = inner.where(group[:, None] != group, 0.0).sum((1, 2))
    value = 2 * hit.mean(0) - cross / (num_samples * (num_samples - strata))
    return value.where(kept, 0.0)
