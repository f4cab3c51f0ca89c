"""Continuous perturbations: a learned random transform T(e, z) of each embedding."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastperturb import ops
from fastperturb.config import PerturbConfig
from fastperturb.engine import context, validate
from fastperturb.engine.architectures import FLOATS, CausalLM, embedding_rms, understand
from fastperturb.engine.batch import Batch
from fastperturb.engine.positions import real_positions
from fastperturb.engine.proposal import STD
from fastperturb.engine.protocol import Perturbation, WrappedModel
from fastperturb.engine.sequences import Encoded, Sequences
from fastperturb.engine.trunk import TrunkInputs, repeated
from fastperturb.transforms import Context, Transform, make_transform

# A shift below this share of its start is a collapse.
_COLLAPSED = 0.01
# On a GPU the shift is read once in so many steps, since reading it costs a synchronisation.
_WATCHED_STEPS = 100

_NO_IDS = (
    "deterministic=True draws the latent of each token by its id, and there are only embeddings: "
    "give input_ids, or use scope='sequence', which has one latent for all tokens"
)


class Continuous(Perturbation):
    """Perturbs embeddings by `lm.transform`, in fp32 beside the embedding."""

    config_class = PerturbConfig
    described_by: ClassVar[tuple[str, ...]] = ("latent", "scope", "min_scale", "context_source")
    keeps_prefix = True

    def make_transform(self, parts: CausalLM, config: Any) -> Transform:
        if not isinstance(config, PerturbConfig):
            raise TypeError(f"config must be a PerturbConfig, got {type(config).__name__}")
        rms, embed_dim = embedding_rms(parts.embed)
        hidden_dim = parts.head.weight.shape[-1]
        of_trunk = config.transform == "context" and config.context_source == "trunk"
        if of_trunk and hidden_dim != embed_dim:
            raise ValueError(
                f"context_source='trunk' needs hidden states as wide as embeddings, got "
                f"{hidden_dim} and {embed_dim}: use context_source='embedding'"
            )
        return make_transform(config, embed_dim, embed_rms=rms).to(rms.device)

    def transform_shapes(self, config: PerturbConfig, embed_dim: int) -> dict[str, list[int]]:
        with torch.device("meta"):
            transform: nn.Module = make_transform(config, embed_dim)
        return {name: list(value.shape) for name, value in transform.state_dict().items()}

    def check_inputs(
        self, lm: WrappedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        if inputs_embeds is None:
            return
        if _needs_ids(lm):
            raise ValueError(_NO_IDS)
        validate.tensor("inputs_embeds", inputs_embeds, "[B, T, D]", FLOATS)
        if inputs_embeds.shape[-1] != lm.transform.embed_dim:
            raise ValueError(
                f"inputs_embeds must be {lm.transform.embed_dim} wide, as the model's "
                f"embeddings are, got {list(inputs_embeds.shape)}"
            )

    def prepare(self, lm: WrappedModel, batch: Batch) -> Batch:
        scale = context.latent_scale(
            lm.transform,
            batch.parts.trunk,
            batch.embeddings,
            batch.attention_mask,
            batch.positions,
            batch.sampling.rows,
        )
        return dataclasses.replace(batch, latent_scale=scale)

    def trunk_inputs(self, lm: WrappedModel, batch: Batch, samples: Tensor) -> TrunkInputs:
        perturbed, shift = self.with_shift(
            lm,
            batch.embeddings,
            ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            latent_scale=batch.latent_scale,
            seed=batch.sampling.seed,
            samples=samples,
            rows=batch.sampling.rows,
            positions=batch.positions,
            antithetic=lm.config.draws_pairs,
            strata=batch.sampling.strata,
            latent_mean=batch.latent_mean,
            latent_std=1.0 if batch.latent_mean is None else STD[lm.transform.scope],
            perturb_mask=batch.perturb_mask,
        )
        count = len(samples)
        return TrunkInputs(
            perturbed,
            repeated(batch.attention_mask, count),
            repeated(batch.positions, count),
            shift=shift,
        )

    def with_shift(
        self, lm: WrappedModel, embeddings: Tensor, **noise: Any
    ) -> tuple[Tensor, Tensor]:
        """Return perturbed embeddings [M, B, T, D], and the shift of each [M, B, T].

        The arguments are those of `perturb`.
        """
        noise = _noise(lm, embeddings, **noise)
        return ops.perturb_embed(embeddings, None, lm.transform, **noise, return_shift=True)

    def perturb(self, lm: WrappedModel, embeddings: Tensor, **noise: Any) -> Tensor:
        noise = _noise(lm, embeddings, **noise)
        return ops.perturb_embed(embeddings, None, lm.transform, **noise)

    def next_logits(
        self,
        lm: WrappedModel,
        model: Any,
        sequences: Sequences,
        seed: Tensor,
        encoded: Encoded | None,
    ) -> Tensor:  # [M N, V]
        start = 0 if encoded is None else encoded.length
        cache = None if encoded is None else encoded.cache
        positions = real_positions(sequences.mask)[:, start:]
        count = sequences.samples.shape[1]
        ids = sequences.ids[:, start:]
        embed = model.get_input_embeddings()
        perturbed = self.perturb(
            lm,
            embed(ids),
            ids=ids,
            latent_scale=context.next_scale(lm, embed, sequences, encoded),
            seed=seed,
            samples=sequences.samples.T,
            rows=sequences.rows,
            positions=positions,
            # Only samples that are averaged depend on each other, not steps and sequences.
            antithetic=lm.config.draws_pairs and count > 1,
            strata=lm.config.strata_of_mean(count) if count > 1 else 1,
            perturb_mask=sequences.perturb_mask[:, start:],
        )  # (M, N, L, D)
        output = model(
            inputs_embeds=perturbed.flatten(0, 1),
            attention_mask=sequences.mask.repeat(count, 1),
            position_ids=positions.repeat(count, 1),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        if encoded is not None and encoded.length == start:
            raise RuntimeError(
                "the model filled no cache, as under gradient checkpointing in training mode; "
                "call lm.eval() first or generate with use_cache=False"
            )
        return output.logits[:, -1]

    def watch(self, lm: WrappedModel, shift: Tensor) -> None:
        """Warn, once, when training has all but stopped perturbing."""
        if torch.compiler.is_compiling():
            torch._dynamo.skip_frame()  # a graph can neither count steps nor read the shift
        if lm.is_exact or not lm.training or lm.state.collapsed:
            return
        lm.state.training_steps += 1
        if shift.device.type != "cpu" and lm.state.training_steps % _WATCHED_STEPS:
            return
        lm.state.collapsed = bool(0 < shift < _COLLAPSED * lm.config.init_scale)
        if lm.state.collapsed:
            warnings.warn(
                f"the perturbation has collapsed: embeddings shift by {float(shift):.1e} of their "
                f"length, below {_COLLAPSED:.0%} of init_scale={lm.config.init_scale}, which is "
                "exact-prefix training again; use more samples, an estimator that is unbiased with "
                "few (quadratic, jvi_clip), or a floor (min_scale)",
                RuntimeWarning,
                stacklevel=6,
            )


def _noise(
    lm: WrappedModel,
    embeddings: Tensor,  # [B, T, D]
    *,
    ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T], 0 at padding
    latent_scale: Tensor | None = None,  # [B, T, R]; None: to be computed, if there is one
    **noise: Any,
) -> dict[str, Any]:
    """Return the options of `ops.perturb_embed` for embeddings and the numbers of their noise."""
    if latent_scale is None and isinstance(lm.transform, Context):
        latent_scale = context.latent_scale(
            lm.transform,
            understand(lm.base).trunk,
            embeddings,
            attention_mask,
            noise["positions"],
            noise["rows"],
        )
    return {**_held(lm, embeddings, ids, noise), "latent_scale": latent_scale}


def _needs_ids(lm: WrappedModel) -> bool:
    """Return True if latents are keyed by token ids."""
    return lm.config.deterministic and lm.transform.scope == "token" and not lm.is_exact


def _held(
    lm: WrappedModel, embeddings: Tensor, ids: Tensor | None, noise: dict[str, Any]
) -> dict[str, Any]:
    """Return these keys of the noise, or under `deterministic` keys that only ids can change.

    There a token's id takes the place of its position, so a token always has the same latent.
    """
    if not lm.config.deterministic:
        return noise
    if _needs_ids(lm):
        if ids is None:
            raise ValueError(_NO_IDS)
        positions = ids.long()
    else:
        positions = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
    keys = {key: torch.zeros_like(noise[key]) for key in ("seed", "samples", "rows")}
    return {**noise, **keys, "positions": positions}
