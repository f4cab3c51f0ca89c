"""Positions before the first perturbed one (a fixed system prompt, say): encoded once for all M.

No sample's noise reaches them. So their keys, values and last hidden states serve every sample,
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
class SharedPrefix:
    """The trunk's keys, values and hidden states at the first positions of each row."""

    hidden: Tensor  # [B, P, D]
    keys_values: list[tuple[Tensor, Tensor]]  # of each layer, [B, heads, P, head_dim]

    @classmethod
    def encode(
        cls, trunk: Any, embeddings: Tensor, attention_mask: Tensor | None, perturb_mask: Tensor
    ) -> SharedPrefix | None:
        """Encode the prefix without perturbed positions [B, T], if there is one worth caching."""
        if not _cacheable(trunk):
            return None
        exact = ~perturb_mask.any(0)
        length = int(exact.long().cumprod(0).sum())
        if length == len(exact) or length < _LEAST_SHARE * len(exact):
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
        keys_values = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return cls(out.last_hidden_state, keys_values)

    def hidden_states(
        self, trunk: Any, perturbed: Tensor, attention_mask: Tensor | None
    ) -> Tensor:  # [m B, T, D]
        """Run the trunk on perturbed embeddings [m, B, T, D], from the end of the prefix on."""
        count, length = len(perturbed), self.hidden.shape[1]
        cache = DynamicCache()
        for index, pair in enumerate(self.keys_values):
            cache.update(*(value.repeat(count, 1, 1, 1) for value in pair), index)
        positions = own_positions(attention_mask, None)
        rest = trunk(
            inputs_embeds=perturbed[:, :, length:].flatten(0, 1),
            attention_mask=attention_mask,
            position_ids=None if positions is None else positions[:, length:],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        return torch.cat([self.hidden.repeat(count, 1, 1), rest], dim=1)


def _cacheable(trunk: Any) -> bool:
    """Return whether the trunk attends to all of a plain cache, and fills one in its present mode.

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
    checkpoints = any(getattr(part, "gradient_checkpointing", False) for part in trunk.modules())
    return is_whole and not (checkpoints and trunk.training)
