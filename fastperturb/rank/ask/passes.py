"""Passes of a plain or perturbed language model over tokens: caches in and out, M samples at once.

Under a perturbation the M samples share one seed and one row id, and a token's noise is keyed by
its position in the context, so that together they are one fixed language model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastperturb import noise
from fastperturb.engine import architectures
from fastperturb.engine.architectures import CausalLM
from fastperturb.engine.positions import real_positions
from fastperturb.model import PerturbedLM
from fastperturb.rank.types import Tokens
from fastperturb.transforms import Context


class Passes:
    """A model to run: `run` returns logits, or the last hidden states without the head."""

    def __init__(self, model: nn.Module, *, num_samples: int, seed: int) -> None:
        self._lm = model if isinstance(model, PerturbedLM) else None
        self._model = _causal_lm(model)
        if self._lm is not None:
            self._strata = self._lm.config.strata_of_errors(num_samples)  # as lm.score draws them
        self._num_samples = num_samples
        self._seed = noise.seed_tensor(seed, torch.device("cpu"))
        self._arguments = _arguments(self._model)
        config = self._model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self._shareable_length = _shareable_length(config)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def num_samples(self) -> int:
        """M; 1 for a plain model, and for a perturbed one whose samples are all the same."""
        return 1 if self._lm is None or self._lm.has_one_draw else self._num_samples

    @property
    def is_weighted(self) -> bool:
        """True if samples count by the probability of the context: under the sequence marginal."""
        return (
            self.num_samples > 1 and self._lm is not None and self._lm.config.marginal == "sequence"
        )

    def can_share_cache(self, length: int) -> bool:
        """Return True if a cache serves all continuations of its context, up to `length` tokens."""
        return length <= self._shareable_length and self._keeps_cache

    @cached_property
    def _keeps_cache(self) -> bool:
        """True if a pass over one token returns a cache that can be shared."""
        if "past_key_values" not in self._arguments:
            return False
        if self._lm is not None and isinstance(self._lm.transform, Context):
            return False  # a future's latents depend on the tokens before it
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        _, cache = self.run(zero, zero[0], zero, zero[0], mask=torch.ones_like(zero))
        return _is_shareable(cache)

    @cached_property
    def parts(self) -> CausalLM | None:
        """The trunk and the head; None for a model that the engine does not know."""
        try:
            return architectures.understand(self._model)
        except ValueError:
            return None

    def check_dropout(self) -> None:
        """Raise if dropout is active, since answers would then be random."""
        dropout = architectures.dropout_sources(self._model)
        if dropout:
            raise ValueError(
                f"dropout is active in {', '.join(dropout[:3])}, so that answers would be random: "
                "call model.eval() first"
            )

    def check_length(self, longest: int) -> None:
        """Raise if a context of `longest` tokens exceeds the model's positions."""
        if self.positions is not None and longest > self.positions:
            raise ValueError(
                f"the longest context (prompt, history and future together) has {longest} tokens, "
                f"but the model has {self.positions} positions; shorten them"
            )

    def run(
        self,
        ids: Tensor,  # [N, T]
        samples: Tensor,  # [m]
        positions: Tensor,  # [N, T]
        kept: Tensor,  # [K], where logits are wanted
        *,
        mask: Tensor | None = None,  # [N, cached + T]
        cache: DynamicCache | None = None,  # of [m N] rows
        headless: bool = False,
    ) -> tuple[Tensor, Any]:
        """Return each sample's logits [m, N, K, V] or hidden states [m, N, K, D], and the cache."""
        lm, num_samples = self._lm, len(samples)
        if lm is None or lm.is_exact:
            inputs = {"input_ids": ids}
        else:
            perturbed = lm.perturb(
                self._model.get_input_embeddings()(ids),
                self._seed.to(ids.device),
                samples,
                rows=torch.zeros_like(ids[:, 0]),
                ids=ids,
                positions=positions,
                attention_mask=None if mask is None else mask[:, -ids.shape[1] :],
                strata=self._strata,
                perturb_mask=None if mask is None else mask[:, -ids.shape[1] :].bool(),
            )
            inputs = {"inputs_embeds": perturbed.flatten(0, 1)}
        options = {
            "attention_mask": None if mask is None else mask.repeat(num_samples, 1),
            "position_ids": positions.repeat(num_samples, 1),
            "past_key_values": cache,
            "use_cache": mask is not None,
            "logits_to_keep": kept,
        }
        accepted = {name: value for name, value in options.items() if name in self._arguments}
        if headless:
            assert self.parts is not None
            accepted.pop("logits_to_keep", None)
            out = self.parts.trunk(**inputs, **accepted)
            result = out.last_hidden_state[:, kept]
        else:
            out = self._model(**inputs, **accepted)
            result = out.logits if "logits_to_keep" in accepted else out.logits[:, kept]
        result = result.to(ids.device, torch.float32).unflatten(0, (num_samples, len(ids)))
        return result, getattr(out, "past_key_values", None)


class Padded(NamedTuple):
    """Contexts as a batch, padded on the left."""

    ids: Tensor  # [h, L]
    mask: Tensor  # [h, L], 0 at the padding
    positions: Tensor  # [h, L], of real tokens
    lengths: Tensor  # [h]

    @classmethod
    def of(cls, contexts: Sequence[Tokens], device: torch.device) -> Padded:
        lengths = torch.tensor([len(context) for context in contexts], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([(0,) * (longest - len(context)) + context for context in contexts])
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        return cls(ids.to(device), mask, real_positions(mask), lengths)


def _is_shareable(cache: Any) -> bool:
    """Return True for a cache of keys and values, which a future of many tokens can continue.

    Recurrent states are continued by one token at a time only, in some versions of transformers.
    """
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(
        type(layer) in known or getattr(layer, "keys", layer) is None for layer in cache.layers
    )


def copy_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Copy these rows of a cache, so that a pass may append to them."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.reorder_cache(rows)
    return copied


def _causal_lm(model: Any) -> Any:
    """Return the model to run; raise unless it is a causal LM whose caches futures can share."""
    if isinstance(model, PerturbedLM) and not model.perturbation.keeps_prefix:
        raise ValueError(
            "model edits tokens at random, so its futures cannot share a history's cache: an edit "
            "changes the position of every token after it; pass a model without edits"
        )
    inner = model.base if isinstance(model, PerturbedLM) else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise TypeError(
            "model must be a Hugging Face causal LM or a PerturbedLM (or, for logit_matrix, an "
            f"oracle that has log_probs), got {type(model).__name__}"
        )
    adapter = getattr(inner, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"PEFT type {adapter.peft_type.value} puts virtual tokens in front of every pass, "
            "also in front of futures; use an adapter inside the layers, such as LoRA"
        )
    return inner


def _arguments(model: Any) -> set[str]:
    """Return the arguments of the model's forward, looking through PEFT, which passes them on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def _shareable_length(config: Any) -> float:
    """Return up to which context length a token's key does not depend on that length.

    LongRoPE rotates all keys by other angles once the context is longer.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    lengths = [
        layer["original_max_position_embeddings"]
        for layer in of_layers
        if layer.get("rope_type") == "longrope"
    ]
    return min(lengths, default=float("inf"))
