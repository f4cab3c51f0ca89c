"""One forward's batch and draws, laid out: what is moved, what is predicted, what is drawn."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb import estimators, noise
from fastperturb.config import PerturbConfig
from fastperturb.engine import plans
from fastperturb.engine.architectures import CausalLM
from fastperturb.engine.positions import document_starts
from fastperturb.engine.shared_prefix import Prefix
from fastperturb.ops import reference

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One forward's inputs, checked and laid out."""

    parts: CausalLM
    embeddings: Tensor  # [B, T, D]
    attention_mask: Tensor | None
    moving: Tensor | None  # [B, T] bool, which positions move; None: all
    positions: Tensor | None  # [B, T], told the model and keying the noise; None: 0, 1, ...
    labels: Tensor | None
    draws: Draws
    exact: bool  # whether nothing moves at all
    return_logits: bool
    marginal: str
    prefix: Prefix | None
    input_ids: Tensor | None  # where there are some

    def target(self) -> Tensor:
        """What each position predicts [B T]; the last one predicts nothing."""
        assert self.labels is not None
        # Shifting labels, not hidden states, saves a copy.
        return F.pad(self.labels[:, 1:], (0, 1), value=IGNORED).flatten()

    def mask(self) -> Tensor:
        """Which log-probs have a label [B, T-1]."""
        assert self.labels is not None
        return self.labels[:, 1:] != IGNORED

    def outcomes(self, log_probs: Tensor | None) -> Tensor:
        """The log-probs of what the marginal is of: labels [m, B, T-1], or rows [m, B]."""
        assert log_probs is not None
        if self.marginal == "token":
            return log_probs
        # A sum of thousands keeps in fp32 less than the samples differ by.
        return log_probs.sum(-1, dtype=torch.float64)

    def outcome_mask(self) -> Tensor:
        return self.mask() if self.marginal == "token" else self.mask().any(-1)

    @torch.no_grad()
    def shift(self, travelled: Tensor) -> Tensor:
        """The mean of |T(e) - e| / |e| over samples and positions that move."""
        length = self.embeddings.float().norm(dim=-1)
        counted = length > 0 if self.moving is None else self.moving & (length > 0)
        ratio = (travelled / self.draws.count / length).where(counted, 0.0)
        return ratio.sum() / counted.sum().clamp_min(1)


@dataclass(frozen=True)
class Copies:
    """What the trunk is run on for some samples, and where to read it."""

    embeddings: Tensor  # [m, B, L, D]
    attention_mask: Tensor | None  # [m B, L]
    position_ids: Tensor | None  # [m B, L]
    source: Tensor | None = None  # [m, B, T], what stands for each position; None: it itself

    def hidden_states(self, trunk: Any, prefix: Prefix | None = None) -> Tensor:  # [m, B, T, D]
        """The trunk's last hidden states, from which each position's label is predicted."""
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

    def _packed_lengths(self, trunk: Any) -> dict[str, Any]:
        """Where documents begin, for a flash kernel: it would take each row for one document."""
        attention = str(getattr(trunk.config, "_attn_implementation", None))
        if self.position_ids is None or not attention.startswith("flash"):
            return {}
        if self.attention_mask is not None:
            return {}  # with which documents are not packed
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

    def at_source(self, values: Tensor) -> Tensor:  # [m, B, L, D] to [m, B, T, D]
        if self.source is None:
            return values
        return values.gather(2, self.source[..., None].expand(-1, -1, -1, values.shape[-1]))


@dataclass(frozen=True)
class Live:
    """The drawn samples of `resample`, run again under a gradient."""

    resampled: estimators.Resampled
    found: plans.Pass


@dataclass(frozen=True)
class Draws:
    """The noise of one call: its seed and rows, how many samples, and what combines them."""

    seed: Tensor
    rows: Tensor
    count: int
    equations: dict[str, float]
    telescope: estimators.Telescope | None = None
    level: Tensor | None = None
    draw_noise: float | None = None  # of resample, where measured

    def backward_samples(self, config: PerturbConfig) -> int:
        """K of resample."""
        measured = 1.0 if self.draw_noise is None else self.draw_noise
        return estimators.default_backward_samples(self.count, config.backward_samples, measured)

    def combine(self, outcomes: Tensor, mask: Tensor, config: PerturbConfig) -> Tensor:
        """The value of a telescope or of resample, whose own draws come from the seed too."""
        if self.telescope is not None and self.level is not None:
            return self.telescope.combine(outcomes, self.level, mask=mask)[0]
        return estimators.resample(outcomes, self._uniforms(config), mask=mask)[0]

    def resample(
        self, outcomes: Tensor, mask: Tensor, config: PerturbConfig
    ) -> estimators.Resampled:
        """Which of the scored draws to run again, and their weights."""
        return estimators.Resampled.of(outcomes, self._uniforms(config), mask=mask)

    def _uniforms(self, config: PerturbConfig) -> Tensor:
        kept = self.backward_samples(config)
        first_rows = self.rows if self.rows.ndim == 1 else self.rows[:, 0]
        return noise.auxiliary_uniforms(self.seed, kept, first_rows)


@torch.no_grad()
def travelled(moved: Tensor, embeddings: Tensor) -> Tensor:
    """The sum over samples of |T(e) - e| [B, T], one sample at a time."""
    lengths = ((sample - embeddings).float().norm(dim=-1) for sample in moved)
    return functools.reduce(torch.add, lengths)


@torch.no_grad()
def variance_over_samples(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Over samples [M, ...], the mean of it where the mask is set; 0 for one sample."""
    variance = log_probs.float().var(0, correction=min(1, len(log_probs) - 1))
    return variance.where(mask, 0.0).sum() / mask.sum().clamp_min(1)


@torch.no_grad()
def log_sum_of(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """log sum_m softmax(logits of sample m), one sample's logits at a time."""
    samples = (reference.logits(sample, weight, **options).log_softmax(-1) for sample in hidden)
    return functools.reduce(torch.logaddexp, samples)


def repeated(per_row: Tensor | None, draws: int) -> Tensor | None:
    """[B, T] for every sample: [M * B, T], samples outermost."""
    return None if per_row is None else per_row.repeat(draws, 1)


def label_count(mask: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor | int:
    """What divides the loss; a global batch without labels has a loss of 0, not 0 / 0."""
    if num_items_in_batch is None:
        return mask.sum().clamp_min(1)
    if isinstance(num_items_in_batch, int):  # to put it on a GPU would wait for the whole forward
        return max(1, num_items_in_batch)
    count = torch.as_tensor(num_items_in_batch, device=mask.device)
    if count.numel() != 1 or count.is_complex():
        raise ValueError(f"num_items_in_batch must be one number, got {num_items_in_batch!r}")
    return count.reshape(()).clamp_min(1)
