"""Running the trunk on some samples of a batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastperturb.engine.packed import PackedDocuments, needs_lengths
from fastperturb.engine.shared_prefix import SharedPrefix


@dataclass(frozen=True)
class TrunkInputs:
    """Perturbed embeddings of some samples, and where each label's prediction is read."""

    embeddings: Tensor  # [m, B, L, D]
    attention_mask: Tensor | None  # [m B, L]
    position_ids: Tensor | None  # [m B, L]
    source: Tensor | None = None  # [m, B, T], the index in L for each position; None: its own
    shift: Tensor | None = None  # [m, B, T], |T(e) - e|; None: to be computed
    log_weights: Tensor | None = None  # [m, B, T], of a position's choice of edits, if rates learn

    def hidden_states(
        self,
        trunk: Any,
        prefix: SharedPrefix | None = None,
        documents: PackedDocuments | None = None,
    ) -> Tensor:  # [m, B, T, D]
        """Return the trunk's last hidden states, from which each position predicts its label.

        documents: those of the batch, whose positions each sample has unless edits change them.
        """
        if prefix is not None:
            hidden = prefix.hidden_states(trunk, self.embeddings, self.attention_mask)
        else:
            hidden = trunk(
                inputs_embeds=self.embeddings.flatten(0, 1),
                attention_mask=self.attention_mask,
                position_ids=self.position_ids,
                use_cache=False,
                return_dict=True,
                **self._packed_lengths(trunk, documents),
            ).last_hidden_state  # (m B, L, D)
        return self.at_source(hidden.unflatten(0, self.embeddings.shape[:2]))

    def at_source(self, values: Tensor) -> Tensor:  # [m, B, L, D] to [m, B, T, D]
        """Gather the values from which each position's label is predicted."""
        if self.source is None:
            return values
        count, size, length = values.shape[:3]
        rows = torch.arange(count * size, device=values.device).view(count, size, 1)
        index, values = rows * length + self.source, values.flatten(0, 2)
        # Positions may share a source. On a GPU the gradient of `gather` is summed in any order,
        # and up to torch 2.11 that of an embedding of 1025 to 3072 positions may be wrong (pytorch
        # PR #187687). On a CPU indexing is slower.
        if values.is_cuda:
            return values[index]
        return torch.nn.functional.embedding(index, values)

    def _packed_lengths(self, trunk: Any, documents: PackedDocuments | None) -> dict[str, Any]:
        """Return where packed documents begin, for kernels that need it."""
        if self.source is not None and needs_lengths(trunk, self.attention_mask, self.position_ids):
            assert self.position_ids is not None  # of all samples, each with edits of its own
            return PackedDocuments(self.position_ids).lengths(1)
        return {} if documents is None else documents.lengths(len(self.embeddings))


def repeated(per_row: Tensor | None, count: int) -> Tensor | None:
    """Repeat [B, T] for every sample: [count * B, T], samples outermost."""
    return None if per_row is None else per_row.repeat(count, 1)


@torch.no_grad()
def shift_norms(inputs: TrunkInputs, embeddings: Tensor) -> Tensor:
    """Return the sum over samples of |T(e) - e| [B, T], from the exact embeddings [B, T, D]."""
    if inputs.shift is not None:
        return inputs.shift.sum(0, dtype=torch.float32)
    # One sample at a time: a difference is as large as its embeddings.
    perturbed = inputs.at_source(inputs.embeddings)
    norms = ((sample - embeddings).float().norm(dim=-1) for sample in perturbed)
    return functools.reduce(torch.add, norms)
