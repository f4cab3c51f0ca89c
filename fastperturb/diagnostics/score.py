"""Scoring: the marginal log-likelihood of a batch, and the Monte-Carlo error of M samples on it.

An event is a labelled token (token marginal) or a row with labels (sequence marginal). With
w[m] = p[m] / sum p the share of sample m in an event's mean probability, sample m's influence on
log mean p is w[m] - 1/M (the delta method), and the standard error of any sum of events is

    sqrt(M / (M - 1) * sum_m (the sum over those events of w[m] - 1/M)^2).

Events of one row share their samples, so influences add before they are squared; rows are
independent, since their numbers key the noise, and their squares add. All of it, the jackknife
and the M-curve too, comes from one set of log-probs [M, B, T-1], 4 bytes a token and sample: seven
times that, or one chunk's activations, is all the memory it takes.

Stratified samples are independent by groups and antithetic ones by pairs, so there errors,
jackknife and M-curve take a group's mean probability for one sample. A config that leaves the group
size open gets 8 groups here, or as many of 4 and 2 as there can be.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperturb import estimators, ops
from fastperturb.config import PerturbConfig
from fastperturb.engine import validate
from fastperturb.engine.architectures import reject_dropout
from fastperturb.engine.batch import IGNORED
from fastperturb.engine.positions import document_starts
from fastperturb.engine.protocol import WrappedModel

# With fewer effective samples than these the Monte-Carlo error is too small.
_FEW = 10


class Curve(NamedTuple):
    """The nll with fewer samples: the mean over disjoint groups of the same samples."""

    num_samples: list[int]  # G, 2 G, 4 G, ... and M; G samples are a group, 1 if independent
    nll: Tensor  # [len(num_samples)] fp64, a token
    jackknife: Tensor  # the same, corrected; NaN where a group is one sample


@dataclass(frozen=True, eq=False)
class Score:
    """The marginal log-likelihood of a batch; entry t of a [B, T-1] tensor is about label t + 1.

    Entries are of labels [B, T-1] (token marginal) or rows [B] (sequence marginal), and 0 where
    there is no label. One sample, as under `lm.exact()`, has no jackknife and no error: NaN.

    log_marginal: log mean_m p[m], of bias about -standard_error^2 / 2.
    jackknife: the same without that bias, up to O(1/M^2); 0 where it would be above.
    standard_error: Monte-Carlo standard error of either; too small where ess is below ten or so.
    ess: effective samples 1 / sum_m w[m]^2, from 1 to M.
    sum, count: of log_marginal and of labels over the batch. Over batches both add, and so do
        the squares of `nll_standard_error * count` if each batch has its own seed or rows.
    nll_standard_error: Monte-Carlo standard error of `nll`.
    curve: the nll at 1, 2, 4, ..., M samples: where it falls to the end, M is too small.
    """

    log_marginal: Tensor
    jackknife: Tensor
    standard_error: Tensor
    ess: Tensor
    sum: Tensor
    count: Tensor
    nll_standard_error: Tensor
    curve: Curve

    @property
    def nll(self) -> Tensor:
        """Return -log_marginal a labelled token."""
        return -self.sum / self.count

    @property
    def perplexity(self) -> Tensor:
        return self.nll.exp()


@torch.no_grad()
def score(
    lm: WrappedModel,
    inputs: dict[str, Any],
    sampling: dict[str, Any],
    chunk_size: int | None,
    temperature: float,
) -> Score:
    """Score inputs with a `sampling` of num_samples, rows and seed, as `PerturbedLM.score` does."""
    reject_dropout(lm.base, "would change the score from call to call")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
    labels = inputs["labels"]
    if labels is None:
        labels = _own_labels(*(inputs[k] for k in ("input_ids", "attention_mask", "position_ids")))
    if chunk_size is None:
        chunk_size = lm.samples_at_once()
    num_samples = sampling["num_samples"]
    group_size, changes = _groups(lm, num_samples)[0], for_scoring(lm, num_samples, chunk_size)
    with lm.at_temperature(temperature), lm.overriding(**changes):
        output = lm(**inputs | {"labels": labels, **sampling})
    log_probs = output.log_probs
    if output.log_weights is not None:
        log_probs = log_probs + output.log_weights
    rows = sampling["rows"]
    if rows is None:
        rows = torch.arange(len(labels), device=labels.device)
    result = summarise(log_probs, labels, rows, marginal=lm.config.marginal, group_size=group_size)
    if lm.config.marginal == "sequence" and len(log_probs) > 1:
        _warn_of_few_effective_samples(lm.config, result, len(log_probs))
    return result


def for_scoring(lm: WrappedModel, num_samples: int | None, chunk_size: int) -> dict[str, Any]:
    """Return the keys of the config under which samples are scored, so many at a time."""
    changes: dict[str, Any] = {"estimator": "iwae", "plan": "chunked", "chunk_size": chunk_size}
    if lm.config.marginal == "token" and lm.config.proposal != "prior":
        changes["proposal"] = "prior"  # one that knows a row's labels only adds noise to each token
    return changes | _groups(lm, num_samples)[1]


def _warn_of_few_effective_samples(config: Any, score: Score, num_samples: int) -> None:
    labelled = score.ess > 0
    if not labelled.any():
        return
    ess = score.ess[labelled].mean().item()
    if ess >= min(_FEW, num_samples / 2):
        return
    remedy = "use more samples"
    if config.proposal != "prior":
        remedy = "use more proposal_steps or more samples"
    elif isinstance(config, PerturbConfig) and config.can_propose:
        remedy = "use proposal='gradient' or more samples"
    warnings.warn(
        f"on average {ess:.1f} of {num_samples} samples have a sequence's probability (ess): the "
        f"marginal comes out too low, and its error too small; {remedy}",
        stacklevel=5,
    )


def _groups(lm: WrappedModel, num_samples: int | None) -> tuple[int, dict[str, Any]]:
    """Return the samples of an independent group, and the keys of the config that draw them so."""
    if lm.has_one_draw or not isinstance(lm.config, PerturbConfig):
        return 1, {}
    count = num_samples or lm.config.num_samples
    size = lm.config.strata_of_errors(count)
    if lm.config.draws_pairs:
        return 2, {}
    if size > 1:
        samples = {"num_samples": count, "backward_samples": None}
        return size, {"sampling": "stratified", "group_size": size, **samples}
    return 1, {"sampling": "independent", "group_size": None}


def _own_labels(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Label every token that follows another one of its document."""
    validate.tensor("input_ids", input_ids, "[B, T]", (torch.int64, torch.int32))
    validate.like(input_ids, "attention_mask", attention_mask, validate.MASKS)
    validate.like(input_ids, "position_ids", position_ids, (torch.int64,))
    follows = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.bool()
        follows &= real & real.roll(1, dims=1)
    if position_ids is not None:
        follows &= ~document_starts(position_ids, attention_mask)
    return input_ids.long().where(follows, IGNORED)


def summarise(
    log_probs: Tensor,  # [M, B, T-1], 0 where there is no label
    labels: Tensor,  # [B, T]
    rows: Tensor,  # [B] or [B, T], whose equal numbers share samples
    *,
    marginal: str,
    group_size: int,
) -> Score:
    """Return the Score of samples' log-probs, of which each `group_size` are one group."""
    labelled = mask = labels[:, 1:] != IGNORED
    if rows.ndim == 1:
        rows = rows[:, None].expand_as(mask)
    owners = rows[:, : mask.shape[1]]  # label t + 1 is predicted from position t
    events = log_probs
    if marginal == "sequence":
        # In fp32 a sum of thousands is rounded by more than the samples differ.
        events = log_probs.sum(-1, keepdim=True, dtype=torch.float64)
        mask, owners = mask.any(-1, keepdim=True), owners[:, :1]
    independent = estimators.of_groups(events, group_size)
    log_marginal, jackknife = _marginals(independent, mask)
    influence = (independent.softmax(0) - 1 / len(independent)).where(mask, 0.0)
    per_row = _sum_by(owners, influence.double())
    count = labelled.sum()

    def shaped(values: Tensor) -> Tensor:
        return values if marginal == "token" else values.squeeze(-1)

    return Score(
        log_marginal=shaped(log_marginal),
        jackknife=shaped(jackknife),
        standard_error=shaped(_standard_error(influence).where(mask, 0.0)),
        ess=shaped(estimators.effective_samples(events).where(mask, 0.0)),
        sum=log_marginal.sum(dtype=torch.float64),
        count=count,
        nll_standard_error=_standard_error(per_row).norm() / count,
        curve=_curve(independent, mask, count, group_size=group_size),
    )


def _marginals(samples: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return log mean exp of independent samples [m, B, T], and its jackknife (NaN for one)."""
    if len(samples) == 1:
        return samples[0], torch.full_like(samples[0], math.nan).where(mask, 0.0)
    combined = ops.combine(samples, mask, "jvi")
    return combined.log_marginal, combined.value.clamp_max(0.0)


def _standard_error(influence: Tensor) -> Tensor:
    """Return the standard error from each sample's influence [m, ...]; NaN for one sample."""
    count = len(influence)
    spread = count / (count - 1) if count > 1 else math.nan
    return (spread * influence.square().sum(0)).sqrt()


def _sum_by(owners: Tensor, values: Tensor) -> Tensor:
    """Sum values [m, B, T] over the positions of each owner [B, T]: [m, owners]."""
    numbers, index = owners.unique(return_inverse=True)
    total = values.new_zeros((len(numbers), len(values)), dtype=torch.float64)
    # Not index_add_, which adds in any order on a GPU. In fp64 a CPU adds in order too.
    total.index_put_((index.flatten(),), values.flatten(1).T.double(), accumulate=True)
    return total.T.to(values)


def _curve(samples: Tensor, mask: Tensor, count: Tensor, *, group_size: int) -> Curve:
    """Return the nll and its jackknife by groups of 1, 2, 4, ... and all samples [m, B, T]."""
    total_samples = len(samples)
    sizes = [2**k for k in range(total_samples.bit_length()) if 2**k < total_samples]
    sizes.append(total_samples)
    points = []
    for size in sizes:
        groups = total_samples // size
        grouped = samples[: groups * size].unflatten(0, (groups, size))
        estimates = _marginals(grouped.transpose(0, 1).flatten(1, 2), mask.repeat(groups, 1))
        total = torch.stack([values.sum(dtype=torch.float64) for values in estimates])
        points.append(-total / groups / count)
    nll, jackknife = torch.stack(points, dim=1)
    return Curve([group_size * size for size in sizes], nll, jackknife)
