"""One call's inputs, validated and laid out, and its labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastperturb.engine.architectures import CausalLM
from fastperturb.engine.head import IGNORED, LabelHead
from fastperturb.engine.packed import PackedDocuments
from fastperturb.engine.sampling import Sampling
from fastperturb.engine.shared_prefix import SharedPrefix


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One call's inputs, validated and laid out."""

    parts: CausalLM
    embeddings: Tensor  # [B, T, D], exact
    input_ids: Tensor | None  # None if the call has inputs_embeds
    attention_mask: Tensor | None
    perturb_mask: Tensor | None  # [B, T] bool, the perturbed positions; None: all
    positions: Tensor | None  # [B, T], for the model and for the noise; None: 0, 1, ...
    labels: Tensor | None
    label_count: Tensor | None  # [], which divides the loss; None without labels
    head: LabelHead | None  # None without labels
    sampling: Sampling
    exact: bool  # nothing is perturbed
    return_logits: bool
    marginal: str
    prefix: SharedPrefix | None
    documents: PackedDocuments | None  # for a trunk with flash kernels

    def token_mask(self) -> Tensor:
        """Return which log-probs have a label [B, T-1]."""
        assert self.labels is not None
        return self.labels[:, 1:] != IGNORED

    def marginal_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return log-probs of the marginal's events: of labels [m, B, T-1], or of rows [m, B]."""
        if self.marginal == "token":
            return log_probs
        # In fp32 a sum of thousands is rounded by more than the samples differ.
        return log_probs.sum(-1, dtype=torch.float64)

    def marginal_mask(self) -> Tensor:
        """Return which of the marginal's events have a label: [B, T-1] or [B]."""
        return self.token_mask() if self.marginal == "token" else self.token_mask().any(-1)

    @torch.no_grad()
    def shift(self, shift_norms: Tensor) -> Tensor:
        """Return the mean of |T(e) - e| / |e| over samples and perturbed positions."""
        length = self.embeddings.float().norm(dim=-1)
        counted = length > 0 if self.perturb_mask is None else self.perturb_mask & (length > 0)
        ratio = (shift_norms / self.sampling.count / length).where(counted, 0.0)
        return ratio.sum() / counted.sum().clamp_min(1)
