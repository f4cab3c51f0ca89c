"""The gradient proposal: latents drawn around where a row's labels are likely.

Under the prior few samples of a whole sequence matter: a row's log-prob varies by tens of nats.
A proposal draws z = mu + sigma eps instead, eps as the noise contract has it, and adds the weight

    log N(z; 0, 1) - log N(z; mu, sigma^2) = (|eps|^2 - |z|^2) / 2 + R log sigma

to a sample's log-prob. The mean of exp(log-prob + weight) is the marginal, whatever mu is: it is a
function of the inputs and the parameters, but not of the samples.

mu climbs f = log p(labels | T(e, mu)) - |mu|^2 / 2 from 0, one sample's forward and backward a
step, with parameters fixed. A step is the gradient of f: where log p is linear, one such step ends
at the mean of the posterior. It is no longer than a reach, 0.7 sqrt(n) for n latents, and where f
fell the row goes back and halves its reach.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.engine import label_weights, sharding
from fastperturb.engine.batch import Batch
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.tracing import untraced
from fastperturb.engine.trunk import TrunkInputs

# The first steps go this share of the way from 0 to where the prior has its mass.
_REACH = 0.7
# sigma of the proposal. One latent for a sequence is known better than under the prior, and sigma^2
# above 1/2 keeps the variance of the weights finite. Of one latent a token little is learned, and
# with thousands of them a sigma other than 1 would make the weights' variance large.
STD = {"sequence": 0.9, "token": 1.0}


def check(lm: WrappedModel, batch: Batch) -> None:
    """Raise on a call whose latents cannot be proposed."""
    if batch.labels is None:
        raise ValueError(
            "proposal='gradient' draws latents by the labels, and the call has none: give labels, "
            "or use proposal='prior'"
        )
    if batch.return_logits:
        raise ValueError(
            "return_logits=True with proposal='gradient' would return logits that know the labels: "
            "use proposal='prior'"
        )
    if lm.transform.scope == "sequence":
        _check_rows(batch.sampling.rows)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "proposal='gradient' takes gradients, which torch.inference_mode() rules out: use "
            "torch.no_grad()"
        )


@untraced
def fitted_mean(lm: WrappedModel, batch: Batch) -> Tensor:
    """Return mu [B, T, R] for a batch with labels; it has no gradient."""
    owner = _owners(lm, batch)
    length, latent_dim = batch.embeddings.shape[1], lm.transform.latent_dim
    count = 1 if lm.transform.scope == "sequence" and batch.sampling.rows.ndim == 1 else length
    mean = batch.embeddings.new_zeros((len(batch), count, latent_dim), dtype=torch.float32)
    reach = _REACH * (_latents(lm, batch, owner) * latent_dim).float().sqrt()  # [B]
    best = torch.full_like(reach, -torch.inf, dtype=torch.float64)
    best_mean, best_gradient = mean, mean
    step = reach
    for _ in range(lm.config.proposal_steps):
        log_prob, gradient = _gradient(lm, batch, mean, owner)
        sharding.gather_root(lm)
        value = log_prob - mean.double().square().sum((1, 2)) / 2
        gradient = gradient - mean
        fell = value < best
        reach = torch.where(fell, step / 2, reach)
        mean = torch.where(fell[:, None, None], best_mean, mean)
        gradient = torch.where(fell[:, None, None], best_gradient, gradient)
        best, best_mean, best_gradient = torch.maximum(best, value), mean, gradient
        norm = gradient.norm(dim=(1, 2))
        step = torch.minimum(norm, reach)
        mean = mean + gradient * (step / norm.clamp_min(1e-30))[:, None, None]
    return _spread(mean, owner, length)


@torch.no_grad()
def log_weights(lm: WrappedModel, batch: Batch, samples: Tensor) -> Tensor:
    """Return what to add to the log-probs [m, B, T-1] of samples with these numbers.

    A label gets the weights of the latents that it depends on.
    """
    shape, mean = batch.embeddings.shape[:2], batch.latent_mean
    assert mean is not None
    scope, std, device = lm.transform.scope, STD[lm.transform.scope], mean.device
    m, b, t = noise.counters(
        samples, batch.sampling.rows, batch.positions, (shape[0], shape[1]), device=device
    )
    perturbed = torch.ones(shape, dtype=torch.bool, device=device)
    if batch.perturb_mask is not None:
        perturbed = batch.perturb_mask
    owner = _owners(lm, batch)
    if owner is not None:
        first = _first_positions(owner)
        if batch.sampling.rows.ndim == 1:
            first = first[:, :1]
        b, t, mean = b.gather(1, first), t.gather(1, first), _at(mean, first)
    eps = noise.draw_latent(
        batch.sampling.seed,
        m,
        b,
        t,
        latent_dim=lm.transform.latent_dim,
        latent=lm.transform.latent,
        scope=scope,
        antithetic=lm.config.draws_pairs,
        strata=batch.sampling.strata,
    )
    z = mean + std * eps
    ratio = (eps.square() - z.square()).sum(-1) / 2 + z.shape[-1] * math.log(std)
    starts = label_weights.first_positions(batch)
    if owner is None:
        ratio = ratio * perturbed
    else:
        # A latent's weight counts from its first perturbed position on.
        runs = _changes(owner)
        is_first = perturbed & (label_weights.running_sums(perturbed[None].float(), runs)[0] == 1)
        starts = starts & runs  # a label sees the latents of its whole document
        ratio = ratio.gather(2, owner.expand(len(ratio), -1, -1)) * is_first
    return label_weights.of_labels(batch, ratio, starts)


def _gradient(
    lm: WrappedModel, batch: Batch, mean: Tensor, owner: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return log p(labels | T(e, mu)) of each row, and its gradient with respect to mu."""
    assert batch.head is not None
    with torch.enable_grad():
        leaf = mean.detach().requires_grad_()
        embeddings = batch.embeddings.detach()
        latent = _spread(leaf, owner, embeddings.shape[1])
        scale = None if batch.latent_scale is None else batch.latent_scale.detach()
        perturbed = lm.transform(embeddings.float(), latent, scale).to(embeddings.dtype)
        if batch.perturb_mask is not None:
            perturbed = torch.where(batch.perturb_mask[..., None], perturbed, embeddings)
        inputs = TrunkInputs(perturbed[None], batch.attention_mask, batch.positions)
        hidden = inputs.hidden_states(batch.parts.trunk, batch.prefix, batch.documents)
        log_probs = batch.head.log_probs(hidden)[0].sum(-1, dtype=torch.float64)  # [B]
        gradient = None
        if log_probs.requires_grad:
            gradient = _gradient_of(log_probs.sum(), leaf)
    if gradient is None:
        raise ValueError(
            f"proposal='gradient' needs the gradient of log-probs with respect to embeddings, and "
            f"{type(lm.base).__name__} gives none; use proposal='prior'"
        )
    return log_probs.detach(), gradient


def _gradient_of(value: Tensor, leaf: Tensor) -> Tensor | None:
    try:
        return torch.autograd.grad(value, leaf, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "proposal='gradient' takes gradients within a call, which re-entrant checkpointing "
            "rules out: enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
        ) from error


def _owners(lm: WrappedModel, batch: Batch) -> Tensor | None:
    """Return the number of the latent that each position has [B, T]; None: each its own.

    Under scope sequence all tokens of a row id share one.
    """
    if lm.transform.scope == "token":
        return None
    rows = batch.sampling.rows
    if rows.ndim == 1:
        return rows.new_zeros(batch.embeddings.shape[:2])
    return _changes(rows).cumsum(1) - 1


def _check_rows(rows: Tensor) -> None:
    """Raise for a row id that comes back after another: its parts would have means of their own."""
    if rows.ndim == 1 or rows.device.type != "cpu":  # reading them costs a GPU a wait
        return
    runs = _changes(rows).sum(1)
    for row, count in zip(rows, runs.tolist(), strict=True):
        if len(row.unique()) < count:
            raise ValueError(
                "rows must number documents that lie in one piece, with proposal='gradient' and "
                f"scope='sequence', got a row id that comes back after another: {row.tolist()}"
            )


def _first_positions(owner: Tensor) -> Tensor:
    """Return the first position of latents 0, 1, ... [B, T], and 0 for those that are not."""
    index = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    return torch.zeros_like(owner).scatter_reduce(1, owner, index, "amin", include_self=False)


def _changes(numbers: Tensor) -> Tensor:
    """Return where numbers [B, T] differ from those before: bool, true at the first position."""
    starts = numbers != numbers.roll(1, 1)
    starts[:, 0] = True
    return starts


def _latents(lm: WrappedModel, batch: Batch, owner: Tensor | None) -> Tensor:
    """Return the number of latents z of each row [B], at least 1."""
    if owner is not None:
        return owner.amax(1) + 1
    size, length = batch.embeddings.shape[:2]
    if batch.perturb_mask is None:
        return torch.full((size,), length, device=batch.embeddings.device)
    return batch.perturb_mask.sum(1).clamp_min(1)


def _spread(mean: Tensor, owner: Tensor | None, length: int) -> Tensor:
    """Return each position's mean [B, T, R], from those of the latents [B, K, R]."""
    if owner is None:
        return mean
    if mean.shape[1] == 1:
        return mean.expand(-1, length, -1)
    return _at(mean, owner)


def _at(mean: Tensor, index: Tensor) -> Tensor:
    """Return the means [B, K, R] at an index [B, N]: [B, N, R]."""
    rows = torch.arange(len(mean), device=mean.device)[:, None]
    return mean[rows, index]  # the gradient of gather has no fixed order on a GPU
