"""Passes of a language model, plain or perturbed, over tokens: caches in and out, M draws at once.

Under a perturbation the M draws share one seed and one row number, and a token's noise is keyed by
its place in the context, so that together they are one fixed language model.
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
from fastperturb.config import check_draws
from fastperturb.engine import architectures
from fastperturb.engine.architectures import CausalLM
from fastperturb.engine.positions import real_positions
from fastperturb.model import EditedLM, PerturbedLM
from fastperturb.rank.ask.oracle import Tokens


class Passes:
    """How a model is run: `run` gives logits, or the last hidden states without the head."""

    def __init__(self, model: nn.Module, *, num_samples: int, seed: int) -> None:
        self._lm = model if isinstance(model, PerturbedLM) else None
        self._model = _causal_lm(model)
        if self._lm is not None:
            check_draws("iwae", num_samples, antithetic=self._lm.config.antithetic)
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
    def draws(self) -> int:
        """M."""
        return 1 if self._lm is None or self._lm.has_one_draw else self._num_samples

    @property
    def weighs_draws(self) -> bool:
        """Whether draws count by how likely they make the context: under the sequence marginal."""
        return self.draws > 1 and self._lm is not None and self._lm.config.marginal == "sequence"

    def can_share(self, length: int) -> bool:
        """Whether a context's cache serves all that it goes on with, up to this length in all."""
        return length <= self._shareable_length and self._keeps_cache

    @cached_property
    def _keeps_cache(self) -> bool:
        """As a pass over one token shows."""
        if "past_key_values" not in self._arguments:
            return False
        one = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        _, cache = self.run(one, one[0], one, one[0], mask=torch.ones_like(one))
        return _is_shareable(cache)

    @cached_property
    def parts(self) -> CausalLM | None:
        """The trunk and the head, of a model that the engine knows."""
        try:
            return architectures.understand(self._model)
        except ValueError:
            return None

    def check_still(self) -> None:
        """Refuse dropout, under which no answer comes twice."""
        dropout = architectures.dropout_sources(self._model)
        if dropout:
            raise ValueError(
                f"dropout is active in {', '.join(dropout[:3])}, so that answers would be random: "
                "call model.eval() first"
            )

    def check_length(self, longest: int) -> None:
        if self.positions is not None and longest > self.positions:
            raise ValueError(
                f"the longest context, prompt, history and future together, has {longest} tokens, "
                f"and the model was made for {self.positions} positions; shorten them"
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
        """Each draw's logits [m, N, K, V], or last hidden states [m, N, K, D]; and the cache."""
        lm, draws = self._lm, len(samples)
        if lm is None or lm.is_exact:
            inputs = {"input_ids": ids}
        else:
            moved = lm.perturb(
                self._model.get_input_embeddings()(ids),
                self._seed.to(ids.device),
                samples,
                rows=torch.zeros_like(ids[:, 0]),
                positions=positions,
                antithetic=lm.config.antithetic,
                perturb_mask=None if mask is None else mask[:, -ids.shape[1] :].bool(),
            )
            inputs = {"inputs_embeds": moved.flatten(0, 1)}
        options = {
            "attention_mask": None if mask is None else mask.repeat(draws, 1),
            "position_ids": positions.repeat(draws, 1),
            "past_key_values": cache,
            "use_cache": mask is not None,
            "logits_to_keep": kept,
        }
        taken = {name: value for name, value in options.items() if name in self._arguments}
        if headless:
            assert self.parts is not None
            taken.pop("logits_to_keep", None)
            out = self.parts.trunk(**inputs, **taken)
            found = out.last_hidden_state[:, kept]
        else:
            out = self._model(**inputs, **taken)
            found = out.logits if "logits_to_keep" in taken else out.logits[:, kept]
        found = found.to(ids.device, torch.float32).unflatten(0, (draws, len(ids)))
        return found, getattr(out, "past_key_values", None)


class Padded(NamedTuple):
    """Contexts as a batch, padded on the left."""

    ids: Tensor  # [h, L]
    mask: Tensor  # [h, L], 0 at the padding
    positions: Tensor  # [h, L], of real tokens
    lengths: Tensor  # [h]

    @classmethod
    def of(cls, contexts: Sequence[Tokens], device: torch.device) -> Padded:
        lengths = torch.tensor([len(each) for each in contexts], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([(0,) * (longest - len(each)) + each for each in contexts])
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        return cls(ids.to(device), mask, real_positions(mask), lengths)


def _is_shareable(cache: Any) -> bool:
    """Whether it is one of keys and values, which a future of many tokens can continue.

    Recurrent states are continued by one token at a time only, in some versions of transformers.
    """
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(
        type(each) in known or getattr(each, "keys", each) is None for each in cache.layers
    )


def selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A copy of these rows, which a pass may append to."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.reorder_cache(rows)
    return chosen


def _causal_lm(model: Any) -> Any:
    """The model that runs; others than causal ones are refused."""
    if isinstance(model, EditedLM):
        raise ValueError(
            "model is an EditedLM, in which a history has no cache for all its futures: an edit "
            "moves every token after it; ask a PerturbedLM or the plain model"
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
            "those of futures too; use an adapter that lives inside the layers, such as LoRA"
        )
    return inner


def _arguments(model: Any) -> set[str]:
    """What its forward takes, which that of PEFT around it hands on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def _shareable_length(config: Any) -> float:
    """Up to which length a token's key is the same in every context: longer, some rotate anew."""
    given = getattr(config, "rope_parameters", None) or {}
    each_layers = [given, *(value for value in given.values() if isinstance(value, dict))]
    lengths = [
        each["original_max_position_embeddings"]
        for each in each_layers
        if each.get("rope_type") == "longrope"
    ]
    return min(lengths, default=float("inf"))
