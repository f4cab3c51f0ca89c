"""The inputs of a call: validated, copied, and laid out as a Batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fastperturb import estimators, noise
from fastperturb.engine import architectures, levels, proposal, sharding, validate
from fastperturb.engine.architectures import understand
from fastperturb.engine.batch import Batch
from fastperturb.engine.head import IGNORED, LabelHead
from fastperturb.engine.packed import PackedDocuments, needs_lengths
from fastperturb.engine.positions import documents_apart, perturbed_positions
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.sampling import Sampling
from fastperturb.engine.shared_prefix import SharedPrefix
from fastperturb.engine.tracing import untraced


@untraced
def lay_out(
    lm: WrappedModel,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    perturb_mask: Tensor | None,
    num_samples: int | None,
    rows: Tensor | None,
    seed: int | Tensor | None,
    num_items_in_batch: int | Tensor | None,
    return_logits: bool,
) -> list[Batch]:
    """Validate the arguments of `PerturbedLM.forward` and return them as a Batch.

    A telescope has several: one for the rows of each level.
    """
    parts = understand(lm.base).at_temperature(lm.state.temperature)
    embeddings = _exact_embeddings(lm, parts.embed, input_ids, inputs_embeds)
    validate.like(embeddings, "attention_mask", attention_mask, validate.MASKS)
    validate.like(embeddings, "position_ids", position_ids, (torch.int64,))
    validate.like(embeddings, "labels", labels, (torch.int64,))
    validate.like(embeddings, "perturb_mask", perturb_mask, (torch.bool,))
    if labels is not None and labels.device.type == "cpu":  # reading them costs a GPU a sync
        real = labels[labels != IGNORED]
        vocab = parts.head.weight.shape[0]
        validate.range("labels", real, vocab, f"be {IGNORED} (no label) or ")
    # Clone the inputs: a recomputed chunk must see the values of the first pass.
    attention_mask, position_ids, labels, perturb_mask, rows, input_ids = (
        None if value is None else value.clone()
        for value in (attention_mask, position_ids, labels, perturb_mask, rows, input_ids)
    )
    marginal = lm.config.marginal
    attention_mask = documents_apart(attention_mask, position_ids, rows, marginal)
    sampling = _sampling(lm, embeddings, seed=seed, rows=rows, num_samples=num_samples)
    perturbed, positions = perturbed_positions(attention_mask, position_ids, perturb_mask)
    batch = Batch(
        parts=parts,
        embeddings=embeddings,
        input_ids=input_ids,
        attention_mask=attention_mask,
        perturb_mask=perturbed,
        positions=positions,
        labels=labels,
        label_count=None if labels is None else _label_count(labels, num_items_in_batch),
        sampling=sampling,
        exact=lm.is_exact,
        return_logits=return_logits,
        marginal=marginal,
        pairs=sampling.count * len(embeddings),
    )
    may_share = perturb_mask is not None and position_ids is None
    if not batch.exact:
        batch = lm.perturbation.prepare(lm, batch)
    if lm.config.proposal == "gradient" and not lm.is_exact:
        proposal.check(lm, batch)
        mean = proposal.fitted_mean(lm, _prepared(lm, batch, may_share=may_share))
        batch = dataclasses.replace(batch, latent_mean=mean)
    return [_prepared(lm, part, may_share=may_share) for part in levels.split(lm, batch)]


def _prepared(lm: WrappedModel, batch: Batch, *, may_share: bool) -> Batch:
    """Return the batch with all that its samples, chunks and passes share."""
    trunk, positions = batch.parts.trunk, batch.positions
    documents = None
    if positions is not None and needs_lengths(trunk, batch.attention_mask, positions):
        documents = PackedDocuments(positions)
    return dataclasses.replace(
        batch,
        head=None if batch.labels is None else LabelHead(batch.parts, batch.labels),
        prefix=_shared_prefix(lm, batch) if may_share else None,
        documents=documents,
    )


def _label_count(labels: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """Return the divisor of the loss, at least 1: a batch without labels has a loss of 0."""
    if num_items_in_batch is None:
        return (labels[:, 1:] != IGNORED).sum().clamp_min(1)
    if isinstance(num_items_in_batch, int):  # a fill: a copy to a GPU would wait for all its work
        return torch.full((), max(1, num_items_in_batch), device=labels.device)
    count = torch.as_tensor(num_items_in_batch, device=labels.device)
    if count.numel() != 1 or count.is_complex():
        raise ValueError(f"num_items_in_batch must be one number, got {num_items_in_batch!r}")
    return count.reshape(()).clamp_min(1)


def _exact_embeddings(
    lm: WrappedModel, embed: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"give either input_ids or inputs_embeds, got {got}")
    lm.perturbation.check_inputs(lm, input_ids, inputs_embeds)
    if inputs_embeds is not None:
        return inputs_embeds.clone()
    assert input_ids is not None
    table = embed.weight
    assert isinstance(table, Tensor)
    validate.tensor("input_ids", input_ids, "[B, T]", (torch.int64, torch.int32))
    validate.range("input_ids", input_ids, table.shape[0])
    return embed(input_ids)


def _sampling(
    lm: WrappedModel,
    embeddings: Tensor,
    *,
    seed: int | Tensor | None,
    rows: Tensor | None,
    num_samples: int | None,
) -> Sampling:
    """Return the sampling of a call; without a seed, draw one."""
    config = lm.config
    equations = {"iwae": 1.0} if lm.has_one_draw else config.equations
    if "jvi" in equations and lm.training and torch.is_grad_enabled():
        raise ValueError(
            "estimator='jvi' is for evaluation: its weights can be negative and training "
            "with them diverged; use estimator='jvi_clip', whose weights are clipped"
        )
    device = embeddings.device
    if seed is None:
        seed = lm.state.split.from_first(noise.drawn_seed().to(device, non_blocking=True))
    seed = noise.seed_tensor(seed, device).clone()  # the caller may change the tensor
    if rows is None:
        rows = torch.arange(len(embeddings), device=device)
    if lm.has_one_draw:
        return Sampling(seed=seed, rows=rows, count=1, strata=1, equations=equations)
    count = config.num_samples if num_samples is None else num_samples
    strata = config.strata(count)
    return Sampling(
        seed=seed,
        rows=rows,
        count=count,
        strata=strata,
        equations=equations,
        telescope=estimators.telescope_of(config, count),
    )


def _shared_prefix(lm: WrappedModel, batch: Batch) -> SharedPrefix | None:
    """Encode the leading exact positions, unless dropout would tie the samples there."""
    # Where parameters are sharded, all processes must run the trunk equally often.
    dropout = architectures.dropout_sources(lm.base)
    if batch.sampling.count == 1 or dropout or sharding.is_sharded(lm):
        return None
    assert batch.perturb_mask is not None
    return SharedPrefix.encode(
        batch.parts.trunk, batch.embeddings, batch.attention_mask, batch.perturb_mask
    )
