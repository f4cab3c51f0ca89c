"""Hybrid perturbations: random edits of tokens, then noise on the embeddings of the edited copy.

    p(y | x) = E_omega E_z pi(y | T(E(omega(x)), z))

omega is drawn as in `edit_layout`, z as in `noise`, where a latent's position is its place in the
copy: its place in the document's copy, of packed documents. A token that was inserted is perturbed
if the token after it is perturbable. So a label has seen edits and noise of what comes before it
alone, as with each of the two by itself.

Edits and latents are independent, under one seed: edits have a Philox block of their own. The
samples of an antithetic pair or a stratified group have different edits, independent ones. If they
shared omega, the mean of the group would have all the variance of one sample's edits; with edits of
their own it has a share of it, and the pairing of the latents still takes its part away. Groups are
independent units either way, so estimators and errors that compare them stay right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fastperturb.config import PerturbConfig, check_keys
from fastperturb.engine.architectures import CausalLM, understand
from fastperturb.engine.batch import Batch
from fastperturb.engine.continuous import Continuous
from fastperturb.engine.edit_layout import Edited
from fastperturb.engine.edits import (
    EditConfig,
    TokenEdits,
    check_learned_rates,
    edited_samples,
    edited_sequences,
    edits_shapes,
    last_logits,
    make_edits,
    padded_right,
    require_ids,
)
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.sequences import Encoded, Sequences
from fastperturb.engine.trunk import TrunkInputs
from fastperturb.transforms import Transform

# The keys of EditConfig that say how tokens are edited; the others are about estimation.
_OF_EDITS = ("rate", "kinds", "neighbors", "learn_rates", "rate_limits")


@dataclass(frozen=True, kw_only=True)
class HybridConfig(PerturbConfig):
    """The configuration of noise and of the edits before it, and of the estimation."""

    edits: EditConfig = field(default_factory=EditConfig)
    """Random edits of tokens: rate, kinds, neighbors, learn_rates and rate_limits; their other keys
    are PerturbConfig's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.edits, EditConfig):
            raise TypeError(f"edits must be an EditConfig, got {type(self.edits).__name__}")
        if self.deterministic:
            raise ValueError(
                "deterministic=True is a control without randomness, and edits are random: leave "
                "edits out, or deterministic False"
            )
        self._check_estimation()
        check_learned_rates(self.edits, self.equations)
        # Later changes of the estimation are of one config.
        alone = EditConfig(**{name: getattr(self.edits, name) for name in _OF_EDITS})
        object.__setattr__(self, "edits", alone)

    def _check_estimation(self) -> None:
        for key in dataclasses.fields(EditConfig):
            value = getattr(self.edits, key.name)
            if key.name not in _OF_EDITS and value not in (key.default, getattr(self, key.name)):
                raise ValueError(
                    f"edits has {key.name}={value!r}, and PerturbConfig has "
                    f"{key.name}={getattr(self, key.name)!r}, which counts: set it there alone"
                )

    def _reason_against_proposals(self) -> str | None:
        return "moves latents to where the unedited tokens are likely, and edits come before them"

    @classmethod
    def of(cls, config: PerturbConfig, edits: EditConfig) -> HybridConfig:
        """Return the config of this noise after these edits."""
        if not isinstance(config, PerturbConfig):
            raise TypeError(f"config must be a PerturbConfig, got {type(config).__name__}")
        names = (key.name for key in dataclasses.fields(PerturbConfig))
        return cls(**{name: getattr(config, name) for name in names}, edits=edits)

    def to_dict(self) -> dict[str, Any]:
        edits = {name: getattr(self.edits, name) for name in _OF_EDITS}
        return {**super().to_dict(), "edits": edits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HybridConfig:
        check_keys(cls, values)
        return cls(**{**values, "edits": EditConfig.from_dict(values.get("edits", {}))})


class Copies(NamedTuple):
    """Edited copies [m, B, L] as m B batch rows of one sample, and the numbers of their noise."""

    ids: Tensor  # [m B, L]
    attention_mask: Tensor | None  # [m B, L]
    samples: Tensor  # [1, m B]
    rows: Tensor  # [m B] or [m B, L]
    positions: Tensor | None  # [m B, L], places in the document's copy
    perturb_mask: Tensor  # [m B, L]

    @classmethod
    def of(
        cls, edited: Edited, samples: Tensor, rows: Tensor, perturb_mask: Tensor | None
    ) -> Copies:
        """Lay out copies; samples [m] or [m, B], rows [B] or [B, T], perturb_mask [B, T]."""
        count, size, _ = edited.ids.shape
        if samples.ndim == 1:
            samples = samples[:, None].expand(-1, size)
        is_perturbed = edited.origin >= 0
        if perturb_mask is not None:
            is_perturbed = is_perturbed & edited.of_places(perturb_mask)
        mask, places = edited.attention_mask, edited.position_ids
        return cls(
            ids=edited.ids.flatten(0, 1),
            attention_mask=None if mask is None else mask.flatten(0, 1),
            samples=samples.reshape(1, -1),
            rows=rows.repeat(count) if rows.ndim == 1 else edited.of_places(rows).flatten(0, 1),
            positions=None if places is None else places.flatten(0, 1),
            perturb_mask=is_perturbed.flatten(0, 1),
        )


class Hybrid(Continuous):
    """Edits token ids by `lm.transform.edits`, and perturbs the copies by `lm.transform`.

    The shift is that of the noise, where labels are predicted; edits are no part of it.
    """

    config_class = HybridConfig
    described_by = (
        *Continuous.described_by,
        *(f"edits.{name}" for name in TokenEdits.described_by),
    )
    keeps_prefix = False  # an edit can renumber all later tokens

    def make_transform(self, parts: CausalLM, config: Any) -> Transform:
        if not isinstance(config, HybridConfig):
            raise TypeError(f"config must be a HybridConfig, got {type(config).__name__}")
        transform = super().make_transform(parts, config)
        transform.edits = make_edits(parts, config.edits)
        return transform

    def transform_shapes(self, config: Any, embed_dim: int) -> dict[str, list[int]]:
        shapes = {f"edits.{name}": shape for name, shape in edits_shapes(config.edits).items()}
        return super().transform_shapes(config, embed_dim) | shapes

    def check_inputs(
        self, lm: WrappedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        require_ids(inputs_embeds)

    def prepare(self, lm: WrappedModel, batch: Batch) -> Batch:
        return batch  # each copy has a context of its own

    def trunk_inputs(self, lm: WrappedModel, batch: Batch, samples: Tensor) -> TrunkInputs:
        edited = edited_samples(lm.transform.edits, batch, samples)
        inputs = self._perturbed(
            lm,
            batch.parts,
            edited,
            batch.sampling.seed,
            samples,
            rows=batch.sampling.rows,
            perturb_mask=batch.perturb_mask,
            antithetic=lm.config.draws_pairs,
            strata=batch.sampling.strata,
        )
        return dataclasses.replace(inputs, log_weights=lm.transform.edits.score(edited.drawn))

    def next_logits(
        self,
        lm: WrappedModel,
        model: Any,
        sequences: Sequences,
        seed: Tensor,
        encoded: Encoded | None,
    ) -> Tensor:  # [M N, V]
        parts, sequences = understand(lm.base), padded_right(sequences)
        count = sequences.samples.shape[1]
        inputs = self._perturbed(
            lm,
            parts,
            edited_sequences(lm.transform.edits, parts, sequences, seed),
            seed,
            sequences.samples.T,
            rows=sequences.rows,
            perturb_mask=sequences.perturb_mask,
            # Only samples that are averaged depend on each other, not steps and sequences.
            antithetic=lm.config.draws_pairs and count > 1,
            strata=lm.config.strata_of_mean(count) if count > 1 else 1,
        )
        return last_logits(inputs, parts, sequences)

    def perturb(self, lm: WrappedModel, embeddings: Tensor, **noise: Any) -> Tensor:
        raise TypeError(
            "Hybrid edits tokens before it perturbs embeddings, and embeddings hold no tokens: "
            "call the model on input_ids, or wrap the base without edits"
        )

    def _perturbed(
        self,
        lm: WrappedModel,
        parts: CausalLM,
        edited: Edited,
        seed: Tensor,
        samples: Tensor,  # [m] or [m, B]
        *,
        rows: Tensor,  # [B] or [B, T]
        perturb_mask: Tensor | None,  # [B, T]
        **drawn: Any,
    ) -> TrunkInputs:
        """Perturb the embeddings of the copies."""
        copies = Copies.of(edited, samples, rows, perturb_mask)
        embeddings = parts.embed(copies.ids)
        perturbed, shift = self.with_shift(lm, embeddings, seed=seed, **copies._asdict(), **drawn)
        shape = edited.ids.shape
        return TrunkInputs(
            perturbed.view(*shape, -1),
            copies.attention_mask,
            copies.positions,
            edited.source,
            shift.view(shape).gather(2, edited.source),
        )
