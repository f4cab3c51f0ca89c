"""One call's inputs, validated and laid out, and its labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastperturb.engine.architectures import CausalLM
from fastperturb.engine.head import IGNORED, LabelHead
from fastperturb.engine.packed import PackedDocuments
from fastperturb.engine.sampling import Sampling
from fastperturb.engine.shared_prefix import SharedPrefix

_PER_ROW = (
    *("embeddings", "input_ids", "attention_mask", "perturb_mask", "positions", "labels"),
    *("latent_mean", "latent_scale"),
)


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
    sampling: Sampling
    exact: bool  # nothing is perturbed
    return_logits: bool
    marginal: str
    pairs: int  # of a row and a sample, in the whole call
    latent_mean: Tensor | None = None  # [B, T, R], where a proposal draws; None: the prior
    latent_scale: Tensor | None = None  # [B, T, R], where a context scales latents
    numbers: Tensor | None = None  # [B], of the rows among those of the call; None: all of them
    head: LabelHead | None = None  # None without labels
    prefix: SharedPrefix | None = None
    documents: PackedDocuments | None = None  # for a trunk with flash kernels

    def __len__(self) -> int:
        return len(self.embeddings)

    def of_rows(self, numbers: Tensor) -> Batch:
        """Return the rows with these numbers [b], as a batch whose loss is their part of it."""
        cut: dict[str, Any] = {"numbers": numbers}
        for name in _PER_ROW:
            value = getattr(self, name)
            cut[name] = None if value is None else value.index_select(0, numbers)
        rows = self.sampling.rows.index_select(0, numbers)
        return replace(self, **cut, sampling=replace(self.sampling, rows=rows))

    def at_level(self, level: int) -> Batch:
        """Return the batch with the samples that this level of its telescope needs."""
        assert self.sampling.telescope is not None
        count = self.sampling.telescope.level_draws[level]
        return replace(self, sampling=replace(self.sampling, count=count, level=level))

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
        length, counted = self._perturbable()
        ratio = (shift_norms / self.sampling.count / length).where(counted, 0.0)
        return ratio.sum() / counted.sum().clamp_min(1)

    @torch.no_grad()
    def shift_count(self) -> Tensor:
        """Return the number of positions of which `shift` is the mean."""
        return self._perturbable()[1].sum()

    def _perturbable(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings' lengths, and the perturbed positions where they are not 0."""
        length = self.embeddings.float().norm(dim=-1)
        return length, length > 0 if self.perturb_mask is None else self.perturb_mask & (length > 0)
