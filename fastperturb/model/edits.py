"""The family of discrete perturbations: M copies of the prefix, each with random edits.

Our reconstruction of a published idea (arXiv 2605.04344): the prefix gives way to a random
neighbour of it, at training and at inference alike. Where `wrap` moves embeddings by a learned
transform, `edit` replaces, inserts, deletes and swaps tokens (see `edited`). All else is the same
engine: marginals, estimating equations, plans, scoring, decoding, saving.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastperturb.config import PerturbConfig, suggestion
from fastperturb.engine.architectures import CausalLM, understand
from fastperturb.engine.batch import Batch, Copies
from fastperturb.engine.edit_layout import KINDS, Edits
from fastperturb.engine.generate import Decoder, Sequences
from fastperturb.model.wrapper import PerturbedLM, embedding_rms
from fastperturb.ops import reference


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How tokens of the prefix are edited; and, as in PerturbConfig, how the marginal is estimated.

    The law of the edits is in `edited`.
    """

    rate: float = 0.1
    """The probability that a token is edited."""

    kinds: Sequence[str] = KINDS
    """Of which edits: replace, insert, delete and swap, each as likely as the others."""

    neighbors: int = 10
    """A token is replaced by one of this many of highest cosine similarity to it."""

    marginal: str = "token"
    estimator: str | Mapping[str, float] = "iwae"
    num_samples: int = 8
    backward_samples: int | None = None
    plan: str = "auto"
    chunk_size: int | None = None
    antithetic: ClassVar[bool] = False  # an edit has no mirror image
    deterministic: ClassVar[bool] = False

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

    def _estimation(self) -> PerturbConfig:
        """The keys that both families share, as PerturbConfig checks them."""
        own = {field.name for field in dataclasses.fields(self)}
        shared = [each.name for each in dataclasses.fields(PerturbConfig) if each.name in own]
        return PerturbConfig(**{name: getattr(self, name) for name in shared})

    @property
    def equations(self) -> dict[str, float]:
        """The estimating equations and their weights in the loss."""
        return self._estimation().equations

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditConfig:
        """A config from plain data; a key that is no field is refused, never ignored."""
        return cls(**values)


def edit(model: nn.Module, config: EditConfig) -> EditedLM:
    """Wrap a Hugging Face causal LM, plain or PEFT, with random edits of its prefix."""
    return EditedLM(model, config)


class EditedDecoder(Decoder):
    """Decoding under edits: the whole prefix is encoded at every step, since any edit moves it."""

    lm: EditedLM
    caches = False

    def _logits(self, model: Any, sequences: Sequences, cache: Any) -> Tensor:  # [M N, V]
        parts = understand(self.lm.base)
        # There is no cache to append to: with padding on the right, positions are indices.
        length = sequences.mask.sum(1, keepdim=True)  # (N, 1)
        total = sequences.mask.shape[1]
        index = (torch.arange(total, device=length.device) - length) % total
        ids, mask, moves = (each.gather(1, index) for each in sequences[:3])
        copies = self.lm._edited(
            parts,
            ids,
            self.seed,
            sequences.samples.T,
            rows=sequences.rows,
            positions=None,
            moving=moves,
            attention_mask=mask,
            position_ids=None,
        )
        assert copies.source is not None
        last = copies.source.gather(2, (length - 1).expand(self.draws, -1, -1))
        hidden = dataclasses.replace(copies, source=last).hidden_states(parts.trunk)
        return reference.logits(hidden.flatten(0, 2), parts.head.weight, **parts.head_options)


class EditedLM(PerturbedLM):
    """A causal LM whose samples are random edits of the prefix.

    It is called as a PerturbedLM is, with input_ids; perturb_mask says which tokens may be edited.
    Entries of its output are about the labels as given. shift compares, in embeddings, where a
    label is predicted with the token that precedes it: an insertion alone is no shift.
    """

    config: EditConfig  # type: ignore[assignment]
    transform: Edits  # type: ignore[assignment]
    decoder = EditedDecoder

    def __init__(self, model: nn.Module, config: EditConfig) -> None:
        super().__init__(model, config)  # type: ignore[arg-type]

    def _make_transform(self, parts: CausalLM, config: Any) -> Any:
        if not isinstance(config, EditConfig):
            raise TypeError(f"config must be an EditConfig, got {type(config).__name__}")
        rms, embed_dim = embedding_rms(parts.embed)
        return Edits(
            rate=config.rate,
            kinds=config.kinds,
            neighbors=config.neighbors,
            special=_special_tokens(parts),
            max_positions=getattr(_trunk_config(parts), "max_position_embeddings", None),
            embed_dim=embed_dim,
            embed_rms=rms,
        )

    def _embeddings(
        self, embed: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds holds no tokens to edit: give input_ids")
        return super()._embeddings(embed, input_ids, None)

    def _copies(self, batch: Batch, samples: Tensor) -> Copies:
        if batch.exact:
            return super()._copies(batch, samples)
        assert batch.input_ids is not None
        return self._edited(
            batch.parts,
            batch.input_ids,
            batch.draws.seed,
            samples,
            rows=batch.draws.rows,
            positions=batch.positions,
            moving=batch.moving,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
        )

    def _edited(
        self, parts: CausalLM, ids: Tensor, seed: Tensor, samples: Tensor, **layout: Any
    ) -> Copies:
        table: Any = parts.embed.weight
        if hasattr(table, "full_tensor"):
            raise ValueError(
                "the input embedding is sharded by itself, and edits compare all of its rows; "
                "shard the wrapper and make no unit of the embedding"
            )
        edited = self.transform(table, ids, seed, samples, **layout)
        mask, places = edited.attention_mask, edited.position_ids
        return Copies(
            parts.embed(edited.ids),
            None if mask is None else mask.flatten(0, 1),
            None if places is None else places.flatten(0, 1),
            edited.source,
        )

    def _watch(self, shift: Tensor) -> None:
        """Edits are not learned, so they do not collapse."""


def _special_tokens(parts: CausalLM) -> Tensor:
    """bool [V]: what the model's config names as begin, end and padding."""
    table: Any = parts.embed.weight
    special = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(_trunk_config(parts), name, None)
        for token in given if isinstance(given, list | tuple) else [given]:
            if token is not None and 0 <= token < len(special):
                special[token] = True
    if len(special) - int(special.sum()) < 2:
        raise ValueError("edits need a vocabulary of two or more tokens that are not special")
    return special


def _trunk_config(parts: CausalLM) -> Any:
    trunk: Any = parts.trunk
    return trunk.config
