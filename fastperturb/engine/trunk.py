"""Running the trunk on some samples of a batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb.engine.positions import document_starts
from fastperturb.engine.shared_prefix import SharedPrefix


@dataclass(frozen=True)
class TrunkInputs:
    """Perturbed embeddings of some samples, and where each label's prediction is read."""

    embeddings: Tensor  # [m, B, L, D]
    attention_mask: Tensor | None  # [m B, L]
    position_ids: Tensor | None  # [m B, L]
    source: Tensor | None = None  # [m, B, T], the index in L for each position; None: its own
    shift: Tensor | None = None  # [m, B, T], |T(e) - e|; None: to be computed

    def hidden_states(
        self, trunk: Any, prefix: SharedPrefix | None = None
    ) -> Tensor:  # [m, B, T, D]
        """Return the trunk's last hidden states, from which each position predicts its label."""
        if prefix is not None:
            hidden = prefix.hidden_states(trunk, self.embeddings, self.attention_mask)
        else:
            hidden = trunk(
                inputs_embeds=self.embeddings.flatten(0, 1),
                attention_mask=self.attention_mask,
                position_ids=self.position_ids,
                use_cache=False,
                return_dict=True,
                **self._packed_lengths(trunk),
            ).last_hidden_state  # (m B, L, D)
        return self.at_source(hidden.unflatten(0, self.embeddings.shape[:2]))

    def at_source(self, values: Tensor) -> Tensor:  # [m, B, L, D] to [m, B, T, D]
        """Gather the values from which each position's label is predicted."""
        if self.source is None:
            return values
        return values.gather(2, self.source[..., None].expand(-1, -1, -1, values.shape[-1]))

    @torch.no_grad()
    def shift_norms(self, exact: Tensor) -> Tensor:  # [B, T]
        """Return the sum over samples of |T(e) - e|, with the exact embeddings [B, T, D]."""
        if self.shift is not None:
            return self.shift.sum(0)
        # One sample at a time, since a difference is as large as the embeddings.
        norms = ((sample - exact).float().norm(dim=-1) for sample in self.at_source(self.embeddings))
        return functools.reduce(torch.add, norms)

    def _packed_lengths(self, trunk: Any) -> dict[str, Any]:
        """Return where documents begin, for flash kernels, which would take a row for one."""
        attention = str(getattr(trunk.config, "_attn_implementation", None))
        if self.position_ids is None or not attention.startswith("flash"):
            return {}
        if self.attention_mask is not None:
            return {}  # packed documents have no mask
        begins = document_starts(self.position_ids)
        if int(begins.sum()) == len(begins):
            return {}  # a document a row
        edges = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=begins.numel())
        edges, longest = edges.int(), int(edges.diff().max())
        return {
            "cu_seq_lens_q": edges,
            "cu_seq_lens_k": edges,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def repeated(per_row: Tensor | None, count: int) -> Tensor | None:
    """Repeat [B, T] for every sample: [count * B, T], samples outermost."""
    return None if per_row is None else per_row.repeat(count, 1)
