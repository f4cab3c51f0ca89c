"""Scoring: how likely a batch is under the marginal, and how far M draws can be trusted on it.

With w[m] = p[m] / sum p the share of draw m in an outcome's mean probability, draw m's influence
on log mean p is w[m] - 1/M (the delta method), and the standard error of any sum of outcomes is

    sqrt(M / (M - 1) * sum_m (the sum over those outcomes of w[m] - 1/M)^2).

Outcomes of one row share their draws, so influences add before they are squared; rows are
independent, since their numbers key the noise, and their squares add. All of it, the jackknife
and the M-curve too, comes from one set of log-probs [M, B, T-1], 4 bytes a token and draw: seven
times that, or one chunk's activations, is all the memory it takes.

Antithetic draws are independent by pairs, so there errors, jackknife and M-curve take a pair's
mean probability for one draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastperturb import estimators, ops
from fastperturb.engine import architectures, validate
from fastperturb.engine.batch import IGNORED
from fastperturb.engine.positions import document_starts

if TYPE_CHECKING:
    from fastperturb.model import PerturbedLM


class Curve(NamedTuple):
    """What fewer draws would have said, by the mean over disjoint groups of the same draws."""

    num_samples: list[int]  # 1, 2, 4, ... and M (antithetic: 2, 4, ... and M)
    nll: Tensor  # [len(num_samples)] fp64, a token
    jackknife: Tensor  # the same, corrected; NaN where a group is one draw


@dataclass(frozen=True, eq=False)
class Score:
    """The marginal log-likelihood of a batch; entry t of a [B, T-1] tensor is about label t + 1.

    Outcomes are labels [B, T-1] (token marginal) or rows [B] (sequence marginal); those without a
    label are 0 everywhere. One draw, as under `lm.exact()`, has no jackknife and no error: NaN.

    log_marginal: log mean_m p[m], of bias about -standard_error^2 / 2.
    jackknife: the same without that bias, up to O(1/M^2).
    standard_error: Monte-Carlo standard error of either; too small where ess is below ten or so.
    ess: effective samples 1 / sum_m w[m]^2, from 1 to M.
    sum, count: of log_marginal and of labels over the batch. Over batches both add, and so do
        the squares of `nll_standard_error * count` if each batch has its own seed or rows.
    nll_standard_error: Monte-Carlo standard error of `nll`.
    curve: the nll at 1, 2, 4, ..., M draws: where it still falls, M is too small.
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
        """-log_marginal a labelled token."""
        return -self.sum / self.count

    @property
    def perplexity(self) -> Tensor:
        return self.nll.exp()


@torch.no_grad()
def score(
    lm: PerturbedLM,
    inputs: dict[str, Any],
    draws: dict[str, Any],
    chunk_size: int | None,
    temperature: float,
) -> Score:
    """`PerturbedLM.score`: inputs are what is scored, draws the number, rows and seed of draws."""
    dropout = architectures.dropout_sources(lm.base)
    if dropout:
        raise ValueError(f"dropout is active in {', '.join(dropout[:3])}: call lm.eval() to score")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
    labels = inputs["labels"]
    if labels is None:
        labels = _own_labels(*(inputs[k] for k in ("input_ids", "attention_mask", "position_ids")))
    if chunk_size is None:
        chunk_size = lm.samples_at_once()
    with lm._at_temperature(temperature):
        log_probs = _log_probs(lm, chunk_size, {**inputs, "labels": labels, **draws})
    rows = draws["rows"]
    if rows is None:
        rows = torch.arange(len(labels), device=labels.device)
    paired = lm.config.antithetic and not lm.has_one_draw
    return summarise(log_probs, labels, rows, marginal=lm.config.marginal, paired=paired)


def _log_probs(lm: PerturbedLM, chunk_size: int, call: dict[str, Any]) -> Tensor:
    """Each draw's log-prob of each label [M, B, T-1], `chunk_size` draws at a time."""
    with lm._configured(estimator="iwae", plan="chunked", chunk_size=chunk_size):
        return lm(**call).log_probs


def _own_labels(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Every token that follows another one of its document."""
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
    rows: Tensor,  # [B] or [B, T], whose equal numbers share draws
    *,
    marginal: str,
    paired: bool,
) -> Score:
    """A Score from the draws' log-probs."""
    labelled = mask = labels[:, 1:] != IGNORED
    if rows.ndim == 1:
        rows = rows[:, None].expand_as(mask)
    owners = rows[:, : mask.shape[1]]  # label t + 1 is predicted from position t
    outcomes = log_probs
    if marginal == "sequence":
        # A sum of thousands keeps in fp32 less than the samples differ by.
        outcomes = log_probs.sum(-1, keepdim=True, dtype=torch.float64)
        mask, owners = mask.any(-1, keepdim=True), owners[:, :1]
    draws = outcomes
    if paired:
        draws = torch.logaddexp(outcomes[0::2], outcomes[1::2]) - math.log(2)
    log_marginal, jackknife = _marginals(draws, mask)
    influence = (draws.softmax(0) - 1 / len(draws)).where(mask, 0.0)
    per_row = _sum_by(owners, influence.double())
    count = labelled.sum()

    def shaped(each: Tensor) -> Tensor:
        return each if marginal == "token" else each.squeeze(-1)

    return Score(
        log_marginal=shaped(log_marginal),
        jackknife=shaped(jackknife),
        standard_error=shaped(_standard_error(influence).where(mask, 0.0)),
        ess=shaped(estimators.effective_samples(outcomes).where(mask, 0.0)),
        sum=log_marginal.sum(dtype=torch.float64),
        count=count,
        nll_standard_error=_standard_error(per_row).norm() / count,
        curve=_curve(draws, mask, count, per_draw=2 if paired else 1),
    )


def _marginals(draws: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log mean exp of independent draws [m, B, T], and its jackknife: one draw has none."""
    if len(draws) == 1:
        return draws[0], torch.full_like(draws[0], math.nan).where(mask, 0.0)
    combined = ops.combine(draws, mask, "jvi")
    return combined.log_marginal, combined.value


def _standard_error(influence: Tensor) -> Tensor:
    """From each draw's influence [m, ...]; NaN for one draw."""
    draws = len(influence)
    spread = draws / (draws - 1) if draws > 1 else math.nan
    return (spread * influence.square().sum(0)).sqrt()


def _sum_by(owners: Tensor, values: Tensor) -> Tensor:
    """Values [m, B, T] summed over the positions of each owner [B, T]: [m, owners]."""
    numbers, index = owners.unique(return_inverse=True)
    return values.new_zeros(len(values), len(numbers)).index_add_(
        1, index.flatten(), values.flatten(1)
    )


def _curve(draws: Tensor, mask: Tensor, count: Tensor, *, per_draw: int) -> Curve:
    """The nll and its jackknife by groups of 1, 2, 4, ... and all draws [m, B, T]."""
    sizes = [2**k for k in range(len(draws).bit_length()) if 2**k < len(draws)] + [len(draws)]
    points = []
    for size in sizes:
        groups = len(draws) // size
        grouped = draws[: groups * size].unflatten(0, (groups, size))
        estimates = _marginals(grouped.transpose(0, 1).flatten(1, 2), mask.repeat(groups, 1))
        total = torch.stack([each.sum(dtype=torch.float64) for each in estimates])
        points.append(-total / groups / count)
    nll, jackknife = torch.stack(points, dim=1)
    return Curve([per_draw * size for size in sizes], nll, jackknife)
