"""The wrapper: any supported causal LM, run on M perturbed copies of its prefix embeddings.

    embed -> perturb_embed -> trunk -> head op -> estimator -> loss

Everything happens inside one forward of one nn.Module, with one ordinary backward after it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from fastperturb import checks, estimators, noise, ops
from fastperturb.architectures import CausalLM, understand
from fastperturb.config import PerturbConfig, check_draws
from fastperturb.ops import reference
from fastperturb.ops.combine import COMBINABLE
from fastperturb.transforms import make_transform

IGNORED = -100


@dataclass
class PerturbedOutput(ModelOutput):
    """What a perturbed forward yields; entry t of a [.., T-1] tensor is about label t + 1.

    loss: minus the sum of the estimator's value over the number of labelled tokens.
    log_marginal: log mean_m of the samples' probabilities, [B, T-1] (token marginal) or [B].
    log_probs: each sample's log-prob of each label, [M, B, T-1], 0 where there is no label.
    ess: effective samples, the mean over labelled outcomes of 1 / sum_m w[m]^2.
    shift: mean of |T(e) - e| / |e| over samples and perturbed positions.
    logits: log of the mean probability over samples, [B, T, V], on request.
    """

    loss: Tensor | None = None
    log_marginal: Tensor | None = None
    log_probs: Tensor | None = None
    ess: Tensor | None = None
    shift: Tensor | None = None
    logits: Tensor | None = None


def wrap(model: nn.Module, config: PerturbConfig) -> PerturbedLM:
    """Wrap a Hugging Face causal LM, plain or PEFT, with a learned perturbation."""
    return PerturbedLM(model, config)


class PerturbedLM(nn.Module):
    """A causal LM whose prefix embeddings are moved by a learned random transform.

    base: the model as given, its parameters and adapters untouched; config: the
    PerturbConfig; transform: the learned T(e, z), in fp32 beside the embedding.
    """

    # For Hugging Face's Trainer: the loss divides by num_items_in_batch itself, and that count
    # is of shifted labels. (Its plain class still fails, since it writes to model.config.)
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(self, model: nn.Module, config: PerturbConfig) -> None:
        super().__init__()
        if not isinstance(config, PerturbConfig):
            raise TypeError(f"config must be a PerturbConfig, got {type(config).__name__}")
        if config.plan not in ("auto", "batched"):
            raise ValueError(
                f"plan={config.plan!r} is not implemented in this version; "
                "use plan='batched' (which 'auto' means for now)"
            )
        if config.chunk_size is not None:
            raise ValueError(
                f"chunk_size={config.chunk_size} has no meaning before plan='chunked' is "
                "implemented; leave it None"
            )
        parts = understand(model)
        self.base = model
        self.config = config
        rms, embed_dim = _embedding_rms(parts.embed)
        self.transform = make_transform(config, embed_dim, embed_rms=rms)
        self.transform.to(rms.device)
        self._exact = False

    @contextlib.contextmanager
    def exact(self) -> Iterator[PerturbedLM]:
        """Within it the model is the base on exact prefixes: one sample, nothing moved."""
        before, self._exact = self._exact, True
        try:
            yield self
        finally:
            self._exact = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        perturb_mask: Tensor | None = None,
        num_samples: int | None = None,
        rows: Tensor | None = None,
        seed: int | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = False,
    ) -> PerturbedOutput:
        """Run M perturbed copies; with labels [B, T], estimate the loss.

        input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T] (1 = real token).
        perturb_mask: bool [B, T], which positions move; default every real token.
        num_samples: M for this call. rows: global example numbers [B], or [B, T] for packed
            documents, that key the noise; default 0..B-1.
        seed: keys the noise; default drawn from torch's generator.
        num_items_in_batch: the labelled tokens of the global batch, which divide the loss.
        """
        parts = understand(self.base)
        embeddings = self._embeddings(parts.embed, input_ids, inputs_embeds)
        batch = len(embeddings)
        checks.like(embeddings, "attention_mask", attention_mask, checks.MASKS)
        checks.like(embeddings, "position_ids", position_ids, (torch.int64,))
        checks.like(embeddings, "labels", labels, (torch.int64,))
        checks.like(embeddings, "perturb_mask", perturb_mask, (torch.bool,))
        if labels is not None:
            vocab = parts.head.weight.shape[0]
            checks.range("labels", labels[labels != IGNORED], vocab, f"be {IGNORED} (no label) or ")
        checks.no_packing_under_flash_attention(parts.trunk, position_ids)
        draws = self._draw(seed, rows, num_samples, embeddings)
        moved, shift = self._perturb(embeddings, draws, attention_mask, position_ids, perturb_mask)
        hidden = parts.trunk(
            inputs_embeds=moved.flatten(0, 1),
            attention_mask=_repeat(attention_mask, draws.count),
            position_ids=_repeat(position_ids, draws.count),
            use_cache=False,
        ).last_hidden_state.unflatten(0, (draws.count, batch))  # (M, B, T, D)
        logits = None
        if return_logits:
            logits = _mean_logits(hidden, parts.head.weight, parts.head_options)
        if labels is None:
            return PerturbedOutput(shift=shift, logits=logits)
        log_probs, quadratic = self._head(parts, hidden, labels, draws)
        estimates = self._estimate(log_probs, quadratic, labels, draws, num_items_in_batch)
        return PerturbedOutput(**estimates, log_probs=log_probs, shift=shift, logits=logits)

    def _embeddings(
        self, embed: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give either input_ids or inputs_embeds, got {given}")
        if input_ids is not None:
            checks.tensor("input_ids", input_ids, "[B, T]", (torch.int64, torch.int32))
            table: Any = embed.weight
            checks.range("input_ids", input_ids, table.shape[0])
            return embed(input_ids)
        assert inputs_embeds is not None
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        checks.tensor("inputs_embeds", inputs_embeds, "[B, T, D]", floats)
        if inputs_embeds.shape[-1] != self.transform.embed_dim:
            raise ValueError(
                f"inputs_embeds must be {self.transform.embed_dim} wide, as the model's "
                f"embeddings are, got {list(inputs_embeds.shape)}"
            )
        return inputs_embeds

    def _draw(
        self,
        seed: int | Tensor | None,
        rows: Tensor | None,
        num_samples: int | None,
        embeddings: Tensor,
    ) -> _Draws:
        """The noise of a call, and how many samples the estimator takes of it."""
        estimator = "iwae" if self._exact else self.config.estimator
        if estimator == "jvi" and self.training and torch.is_grad_enabled():
            raise ValueError(
                "estimator='jvi' is for evaluation: its weights can be negative and training "
                "with them diverged; use estimator='jvi_clip', whose weights are clipped"
            )
        device = embeddings.device
        if seed is None:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
        seed = noise.seed_tensor(seed, device)
        if rows is None:
            rows = torch.arange(len(embeddings), device=device)
        if self._exact:
            return _Draws(seed, rows, 1, estimator)
        wanted = self.config.num_samples if num_samples is None else num_samples
        check_draws(estimator, wanted, antithetic=self.config.antithetic)
        if estimator not in ("sumo", "mlmc"):
            return _Draws(seed, rows, wanted, estimator)
        telescope = estimators.Telescope(estimator, wanted)
        # One level for the whole step: every row, micro-batch and rank agrees on it.
        one_row = torch.zeros(1, dtype=torch.int64, device=device)
        uniform = noise.auxiliary_uniforms(seed, 1, one_row)
        level = telescope.sample(uniform.reshape(()))
        return _Draws(seed, rows, int(telescope.draws(level)), estimator, telescope, level)

    def _perturb(
        self,
        embeddings: Tensor,
        draws: _Draws,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        perturb_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The moved embeddings [M, B, T, D] and how far they moved."""
        if self._exact:
            return embeddings[None], embeddings.new_zeros((), dtype=torch.float32)
        positions = position_ids
        if attention_mask is not None:
            real = attention_mask.bool()
            perturb_mask = real if perturb_mask is None else perturb_mask & real
            if positions is None:
                positions = (real.cumsum(1) - 1).clamp_min(0)
        moved = ops.perturb_embed(
            embeddings,
            None,
            self.transform,
            draws.seed,
            draws.count,
            rows=draws.rows,
            positions=positions,
            antithetic=self.config.antithetic,
            perturb_mask=perturb_mask,
        )
        return moved, _relative_shift(moved, embeddings, perturb_mask)

    def _head(
        self, parts: CausalLM, hidden: Tensor, labels: Tensor, draws: _Draws
    ) -> tuple[Tensor, Tensor | None]:
        """Each sample's log-probs [M, B, T-1], and the quadratic values [B * T] if asked for."""
        M, batch, length, _ = hidden.shape
        # The last position predicts nothing: shifting labels, not hidden, saves a copy.
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        weight, options = parts.head.weight, parts.head_options
        quadratic = None
        if draws.estimator == "quadratic":
            quadratic, log_probs = ops.linear_quadratic(
                hidden.flatten(1, 2), weight, target.flatten(), **options, return_log_probs=True
            )
            log_probs = log_probs.detach()
        else:
            log_probs = ops.linear_logprob(
                hidden.flatten(0, 2), weight, target.repeat(M, 1).flatten(), **options
            )
        return log_probs.view(M, batch, length)[:, :, :-1], quadratic

    def _estimate(
        self,
        log_probs: Tensor,  # [M, B, T-1]
        quadratic: Tensor | None,
        labels: Tensor,
        draws: _Draws,
        num_items_in_batch: int | Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss, and what is known about the samples."""
        mask = labels[:, 1:] != IGNORED
        count = _label_count(mask, num_items_in_batch)
        marginal = self.config.marginal
        combinable = draws.estimator in COMBINABLE
        combined = ops.combine(
            log_probs if combinable else log_probs.detach(),
            mask,
            draws.estimator if combinable else "iwae",
            marginal=marginal,
        )
        value = combined.value
        if quadratic is not None:
            value = quadratic
        elif not combinable and marginal == "sequence":
            value = draws.combine(log_probs.sum(-1), mask.any(-1), self.config)
        elif not combinable:
            value = draws.combine(log_probs, mask, self.config)
        outcomes = mask if marginal == "token" else mask.any(-1)
        return {
            "loss": -value.sum() / count,
            "log_marginal": combined.log_marginal,
            "ess": combined.effective_samples.sum() / outcomes.sum().clamp_min(1),
        }


@dataclass(frozen=True)
class _Draws:
    """The noise of one call: its seed and rows, how many samples, and what combines them."""

    seed: Tensor
    rows: Tensor
    count: int
    estimator: str
    telescope: estimators.Telescope | None = None
    level: Tensor | None = None

    def combine(self, outcomes: Tensor, mask: Tensor, config: PerturbConfig) -> Tensor:
        """The value of a telescope or of resample, whose own draws come from the seed too."""
        if self.telescope is not None and self.level is not None:
            return self.telescope.combine(outcomes, self.level, mask=mask)[0]
        kept = estimators.default_backward_samples(self.count, config.backward_samples)
        first_rows = self.rows if self.rows.ndim == 1 else self.rows[:, 0]
        uniforms = noise.auxiliary_uniforms(self.seed, kept, first_rows)
        return estimators.resample(outcomes, uniforms, mask=mask)[0]


@torch.no_grad()
def _embedding_rms(embed: Any) -> tuple[Tensor, int]:
    """Root mean square over all that the embedding puts out, scaling included; and its width."""
    if embed.weight.is_meta:
        raise ValueError("model is on the meta device: load its weights before wrapping it")
    total, count, width = torch.zeros((), device=embed.weight.device), 0, 0
    for ids in torch.arange(embed.weight.shape[0], device=embed.weight.device).split(4096):
        chunk = embed(ids).float()
        total += chunk.square().sum()
        count += chunk.numel()
        width = chunk.shape[-1]
    return (total / count).sqrt(), width


@torch.no_grad()
def _relative_shift(moved: Tensor, embeddings: Tensor, mask: Tensor | None) -> Tensor:
    length = embeddings.float().norm(dim=-1)
    travelled = torch.stack([(sample - embeddings).float().norm(dim=-1) for sample in moved])
    counted = length > 0 if mask is None else mask & (length > 0)
    ratio = (travelled.mean(0) / length).where(counted, 0.0)
    return ratio.sum() / counted.sum().clamp_min(1)


def _mean_logits(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """log mean_m softmax(logits of sample m), one sample's logits at a time."""
    samples = (reference.logits(sample, weight, **options).log_softmax(-1) for sample in hidden)
    return functools.reduce(torch.logaddexp, samples) - math.log(len(hidden))


def _repeat(per_row: Tensor | None, draws: int) -> Tensor | None:
    """[B, T] for every sample: [M * B, T], samples outermost."""
    return None if per_row is None else per_row.repeat(draws, 1)


def _label_count(mask: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """What divides the loss; a global batch without labels has a loss of 0, not 0 / 0."""
    if num_items_in_batch is None:
        return mask.sum().clamp_min(1)
    count = torch.as_tensor(num_items_in_batch, device=mask.device)
    if count.numel() != 1 or count.is_complex():
        raise ValueError(f"num_items_in_batch must be one number, got {num_items_in_batch!r}")
    return count.reshape(()).clamp_min(1)
