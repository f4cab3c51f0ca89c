"""Positions before the first one that moves (a fixed system prompt, say): encoded once for all M.

No sample's noise reaches them, so their keys, values and last hidden states serve every sample,
and so does one backward through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastperturb.engine.positions import own_positions

# A shorter prefix is not worth a pass of its own.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Prefix:
    """What the trunk made of the first positions of each row."""

    hidden: Tensor  # [B, P, D]
    keys_values: list[tuple[Tensor, Tensor]]  # of each layer, [B, heads, P, head_dim]

    @classmethod
    def of(
        cls, trunk: Any, embeddings: Tensor, attention_mask: Tensor | None, moving: Tensor
    ) -> Prefix | None:
        """The prefix in which nothing moves [B, T], if there is one and the cache can hold it."""
        if not _cacheable(trunk):
            return None
        still = ~moving.any(0)
        length = int(still.long().cumprod(0).sum())
        if length == len(still) or length < _LEAST_SHARE * len(still):
            return None
        mask = None if attention_mask is None else attention_mask[:, :length]
        out = trunk(
            inputs_embeds=embeddings[:, :length],
            attention_mask=mask,
            position_ids=own_positions(mask, None),
            past_key_values=DynamicCache(),
            use_cache=True,
            return_dict=True,
        )
        kept = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return cls(out.last_hidden_state, kept)

    def hidden_states(
        self, trunk: Any, moved: Tensor, attention_mask: Tensor | None
    ) -> Tensor:  # [m B, T, D]
        """The trunk on moved embeddings [m, B, T, D], from the end of the prefix on."""
        count, length = len(moved), self.hidden.shape[1]
        cache = DynamicCache()
        for index, pair in enumerate(self.keys_values):
            cache.update(*(value.repeat(count, 1, 1, 1) for value in pair), index)
        positions = own_positions(attention_mask, None)
        rest = trunk(
            inputs_embeds=moved[:, :, length:].flatten(0, 1),
            attention_mask=attention_mask,
            position_ids=None if positions is None else positions[:, length:],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        return torch.cat([self.hidden.repeat(count, 1, 1), rest], dim=1)


def _cacheable(trunk: Any) -> bool:
    """Whether the trunk attends to all of a plain cache, and takes one as it is now.

    Rotary angles that depend on a pass's length ("dynamic", "longrope") would differ between the
    prefix and the rest.
    """
    config = trunk.config
    if any(kind in str(getattr(config, "rope_parameters", "")) for kind in ("dynamic", "longrope")):
        return False
    kinds = getattr(config, "layer_types", None) or []
    is_whole = all(kind == "full_attention" for kind in kinds) and not (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    )
    checkpoints = any(getattr(each, "gradient_checkpointing", False) for each in trunk.modules())
    return is_whole and not (checkpoints and trunk.training)
