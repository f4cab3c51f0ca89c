"""Discrete perturbations: each sample is the prefix with random edits of its tokens.

Our reconstruction of a published idea (arXiv 2605.04344): a random neighbour replaces the prefix,
at training and at inference alike. Tokens are replaced, inserted, deleted and swapped as
`edit_layout` draws them. Marginals, estimators, plans, scoring, decoding and saving are those of
continuous perturbations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastperturb.config import PerturbConfig, check_keys, suggestion
from fastperturb.engine.architectures import CausalLM, embedding_rms, understand
from fastperturb.engine.batch import Batch
from fastperturb.engine.edit_layout import DEFAULT_KINDS, KINDS, Edited, Edits
from fastperturb.engine.protocol import Perturbation, WrappedModel
from fastperturb.engine.sequences import Encoded, Sequences
from fastperturb.engine.sharding import is_shard
from fastperturb.engine.trunk import TrunkInputs
from fastperturb.ops import reference


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Configuration of random token edits and of the estimation of the marginal.

    The distribution of the edits is in `edit_layout`.
    """

    rate: float = 0.1
    """Probability that a token is edited."""

    kinds: Sequence[str] = DEFAULT_KINDS
    """Kinds of edit, each as likely as the others: replace, insert, delete, swap. A label is
    predicted without the token before it where that is deleted or swapped."""

    neighbors: int = 10
    """Number of most similar tokens (cosine of embeddings) from which a replacement is drawn."""

    learn_rates: bool = False
    """True learns the rate of each kind of edit; together they start at `rate`."""

    rate_limits: tuple[float, float] = (0.01, 0.5)
    """Lowest and highest rate, of all kinds together, that learned rates can reach."""

    marginal: str = "token"
    """Marginal to estimate: token averages each token's probability over samples, sequence the
    probability of the whole sequence."""

    estimator: str | Mapping[str, float] = "iwae"
    """Estimator of the marginal, or a mixture: names and their weights in the loss."""

    num_samples: int = 8
    """Number of Monte-Carlo samples M."""

    backward_samples: int | None = None
    """Number of samples K that resample sends backward; None is round(sqrt(M / 2))."""

    plan: str = "auto"
    """Plan by which samples go through the trunk: auto, batched, chunked or resample."""

    chunk_size: int | None = None
    """Number of samples at a time under plan chunked."""

    draws_pairs: ClassVar[bool] = False  # an edit has no mirror image
    deterministic: ClassVar[bool] = False
    proposal: ClassVar[str] = "prior"  # an edit has no latent to move

    def __post_init__(self) -> None:
        estimation = self._estimation()
        object.__setattr__(self, "estimator", estimation.estimator)
        rate = self.rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"rate must be a probability from 0 to 1, got {rate!r}")
        if isinstance(self.kinds, str) or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be one or more of {KINDS}, got {self.kinds!r}")
        for kind in self.kinds:
            if kind not in KINDS:
                hint = suggestion(str(kind), KINDS)
                raise ValueError(f"kinds must be of {KINDS}, got {kind!r}{hint}")
        object.__setattr__(self, "kinds", tuple(self.kinds))
        count = self.neighbors
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"neighbors must be a positive int, got {count!r}")
        limits = self.rate_limits
        if (
            not isinstance(limits, tuple | list)
            or len(limits) != 2
            or not 0 < limits[0] < limits[1] < 1
        ):
            raise ValueError(
                f"rate_limits must be two rising numbers between 0 and 1, got {limits!r}"
            )
        object.__setattr__(self, "rate_limits", tuple(limits))
        check_learned_rates(self, estimation.equations)

    def _estimation(self) -> PerturbConfig:
        """Return the keys that PerturbConfig has too, as it validates them."""
        own = {field.name for field in dataclasses.fields(self)}
        shared = [field.name for field in dataclasses.fields(PerturbConfig) if field.name in own]
        values = {name: getattr(self, name) for name in shared}
        return PerturbConfig(**values, sampling="independent")

    @property
    def equations(self) -> dict[str, float]:
        """The estimators and their weights in the loss."""
        return self._estimation().equations

    def strata(self, num_samples: int | None = None) -> int:
        """Return 1, since edits are independent; raise where the estimators cannot use so many."""
        return self._estimation().strata(num_samples)

    def strata_of_mean(self, num_samples: int, min_groups: int = 1) -> int:
        """Return 1, since edits are independent."""
        return self._estimation().strata_of_mean(num_samples, min_groups)

    def strata_of_errors(self, num_samples: int) -> int:
        """Return 1, since edits are independent."""
        return self.strata_of_mean(num_samples)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditConfig:
        """Return a config from plain data; raise on a key that is not a field."""
        check_keys(cls, values)
        return cls(**values)

    @property
    def limits(self) -> tuple[float, float] | None:
        """The limits of rates that learn, None if they do not."""
        return self.rate_limits if self.learn_rates else None


def check_learned_rates(edits: EditConfig, equations: Mapping[str, float]) -> None:
    """Raise for a rate outside its limits, and for estimators under which rates cannot learn."""
    if not edits.learn_rates:
        return
    limits = edits.rate_limits
    if not limits[0] < edits.rate < limits[1]:
        raise ValueError(
            f"learn_rates=True needs a rate between rate_limits={limits}, got {edits.rate!r}"
        )
    for name in equations:
        if name in ("jensen", "quadratic"):
            raise ValueError(
                f"learn_rates=True has no estimator={name!r}, which gives all samples the same "
                "weight or none: use iwae, jvi_clip, resample, sumo or mlmc"
            )


class TokenEdits(Perturbation):
    """Edits token ids; `lm.transform` draws the edits, and may learn their rates.

    A call needs input_ids; its perturb_mask says which tokens may be edited. Labels are not edited,
    and outputs have one entry for each. The shift compares the embedding of the token at which a
    label is predicted with that of the token before the label: an insertion alone is no shift.
    """

    config_class = EditConfig
    described_by = ("rate", "kinds", "neighbors", "limits")
    keeps_prefix = False  # an edit can renumber all later tokens

    def make_transform(self, parts: CausalLM, config: Any) -> Edits:
        if not isinstance(config, EditConfig):
            raise TypeError(f"config must be an EditConfig, got {type(config).__name__}")
        return make_edits(parts, config)

    def transform_shapes(self, config: EditConfig, embed_dim: int) -> dict[str, list[int]]:
        return edits_shapes(config)

    def check_inputs(
        self, lm: WrappedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        require_ids(inputs_embeds)

    def trunk_inputs(self, lm: WrappedModel, batch: Batch, samples: Tensor) -> TrunkInputs:
        edited = edited_samples(lm.transform, batch, samples)
        inputs = _embedded(batch.parts, edited)
        return dataclasses.replace(inputs, log_weights=lm.transform.score(edited.drawn))

    def next_logits(
        self,
        lm: WrappedModel,
        model: Any,
        sequences: Sequences,
        seed: Tensor,
        encoded: Encoded | None,
    ) -> Tensor:  # [M N, V]
        parts, sequences = understand(lm.base), padded_right(sequences)
        edited = edited_sequences(lm.transform, parts, sequences, seed)
        return last_logits(_embedded(parts, edited), parts, sequences)


def make_edits(parts: CausalLM, config: EditConfig) -> Edits:
    """Return the module that draws a config's edits for this model."""
    rms, embed_dim = embedding_rms(parts.embed)
    return Edits(
        rate=config.rate,
        kinds=config.kinds,
        neighbors=config.neighbors,
        rate_limits=config.limits,
        special=_special_tokens(parts),
        max_positions=getattr(_trunk_config(parts), "max_position_embeddings", None),
        embed_dim=embed_dim,
        embed_rms=rms,
    )


def edits_shapes(config: EditConfig) -> dict[str, list[int]]:
    """Return the shape of each tensor of the state of a config's edits."""
    shapes: dict[str, list[int]] = {"embed_rms": []}
    return shapes | ({"rate_logits": [len(config.kinds)]} if config.learn_rates else {})


def require_ids(inputs_embeds: Tensor | None) -> None:
    """Raise for a call without token ids."""
    if inputs_embeds is not None:
        raise ValueError("inputs_embeds holds no tokens to edit: give input_ids")


def edited_samples(edits: Edits, batch: Batch, samples: Tensor) -> Edited:
    """Return a batch's samples with these numbers, [m] or [m, B]."""
    assert batch.input_ids is not None
    return edits(
        _whole_table(batch.parts),
        batch.input_ids,
        batch.sampling.seed,
        samples,
        rows=batch.sampling.rows,
        positions=batch.positions,
        editable=batch.perturb_mask,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions,
    )


def edited_sequences(edits: Edits, parts: CausalLM, sequences: Sequences, seed: Tensor) -> Edited:
    """Return the samples of sequences that are padded on the right."""
    return edits(
        _whole_table(parts),
        sequences.ids,
        seed,
        sequences.samples.T,
        rows=sequences.rows,
        positions=None,
        editable=sequences.perturb_mask,
        attention_mask=sequences.mask,
        position_ids=None,
    )


def padded_right(sequences: Sequences) -> Sequences:
    """Return sequences with their padding on the right, where positions are indices.

    There is no cache to append to.
    """
    length = sequences.mask.sum(1, keepdim=True)  # (N, 1)
    total = sequences.mask.shape[1]
    index = (torch.arange(total, device=length.device) - length) % total
    ids, mask, editable = (values.gather(1, index) for values in sequences[:3])
    return sequences._replace(ids=ids, mask=mask, perturb_mask=editable)


def last_logits(inputs: TrunkInputs, parts: CausalLM, sequences: Sequences) -> Tensor:  # [M N, V]
    """Return the logits of the token after each sequence, which is padded on the right."""
    assert inputs.source is not None
    last = sequences.mask.sum(1, keepdim=True) - 1
    source = inputs.source.gather(2, last.expand(len(inputs.source), -1, -1))
    hidden = dataclasses.replace(inputs, source=source).hidden_states(parts.trunk)
    return reference.logits(hidden.flatten(0, 2), parts.head.weight, **parts.head_options)


def _embedded(parts: CausalLM, edited: Edited) -> TrunkInputs:
    mask, places = edited.attention_mask, edited.position_ids
    return TrunkInputs(
        parts.embed(edited.ids),
        None if mask is None else mask.flatten(0, 1),
        None if places is None else places.flatten(0, 1),
        edited.source,
    )


def _whole_table(parts: CausalLM) -> Tensor:
    """Return the input embeddings [V, D]; raise where they are one shard of them."""
    table: Any = parts.embed.weight
    if is_shard(table):
        raise ValueError(
            "the input embedding is sharded by itself, and edits compare all of its rows; "
            "shard the wrapper and make no unit of the embedding"
        )
    return table


def _special_tokens(parts: CausalLM) -> Tensor:
    """Return bool [V]: the tokens that the model's config names as begin, end and padding."""
    table: Any = parts.embed.weight
    special = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(_trunk_config(parts), name, None)
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and 0 <= token < len(special):
                special[token] = True
    if len(special) - int(special.sum()) < 2:
        raise ValueError("edits need a vocabulary of two or more tokens that are not special")
    return special


def _trunk_config(parts: CausalLM) -> Any:
    trunk: Any = parts.trunk
    return trunk.config
