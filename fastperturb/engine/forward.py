"""One call of a wrapped model: embed -> perturb -> trunk -> head op -> estimator -> loss.

Everything happens inside one forward of one nn.Module, with one ordinary backward after it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fastperturb import ops
from fastperturb.engine import loss, plans
from fastperturb.engine.batch import Batch
from fastperturb.engine.inputs import lay_out
from fastperturb.engine.passes import Pass
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.trunk import TrunkInputs, repeated
from fastperturb.ops import reference


@dataclass
class PerturbedOutput(ModelOutput):
    """The result of a perturbed forward; entry t of a [.., T-1] tensor is about label t + 1.

    loss: minus the sum of the estimator's value over the number of labelled tokens.
    log_marginal: log mean_m of the samples' probabilities, [B, T-1] (token marginal) or [B].
    log_probs: each sample's log-prob of each label, [M, B, T-1], 0 where there is no label.
    ess: effective samples, the mean over labelled tokens (or rows) of 1 / sum_m w[m]^2.
    shift: mean of |T(e) - e| / |e| over samples and perturbed positions.
    log_prob_variance: variance over samples, averaged over labelled tokens (or rows).
    logits: log of the mean probability over samples, [B, T, V], on request.
    """

    loss: Tensor | None = None
    log_marginal: Tensor | None = None
    log_probs: Tensor | None = None
    ess: Tensor | None = None
    shift: Tensor | None = None
    log_prob_variance: Tensor | None = None
    logits: Tensor | None = None


def run(
    lm: WrappedModel, *, num_items_in_batch: int | Tensor | None, **arguments: Any
) -> PerturbedOutput:
    """Run M perturbed samples; `PerturbedLM.forward` describes the arguments."""
    batch = lay_out(lm, **arguments)
    scored, rerun = plans.execute(lm, batch, functools.partial(run_samples, lm, batch))
    output: dict[str, Tensor] = {}
    if batch.labels is not None:
        output = loss.estimate(batch, scored, rerun, lm.config, num_items_in_batch)
    if scored.log_sum is not None:
        output["logits"] = scored.log_sum - math.log(batch.sampling.count)
    shift = batch.shift(scored.shift_norms)
    lm.perturbation.watch(lm, shift)
    return PerturbedOutput(**output, shift=shift)


def run_samples(lm: WrappedModel, batch: Batch, samples: Tensor) -> Pass:
    """Run the samples with these numbers, [m] or [m, B], through perturbation, trunk and head."""
    if batch.exact:
        inputs = _exact(batch, samples)
    else:
        inputs = lm.perturbation.trunk_inputs(lm, batch, samples)
    hidden = inputs.hidden_states(batch.parts.trunk, batch.prefix)  # (m, B, T, D)
    equations, log_probs, log_sum = batch.sampling.equations, None, None
    weight, options = batch.parts.head.weight, batch.parts.head_options
    if batch.labels is not None and set(equations) != {"quadratic"}:
        target = batch.target().repeat(len(samples))
        log_probs = ops.linear_logprob(hidden.flatten(0, 2), weight, target, **options)
        # A copy: FSDP2 puts hooks on the outputs of a module, which must not be views.
        log_probs = log_probs.view(hidden.shape[:-1])[:, :, :-1].contiguous()
    if batch.return_logits:
        log_sum = _log_sum(hidden, weight, options)
    kept = hidden if "quadratic" in equations else None
    return Pass(inputs.shift_norms(batch.embeddings), log_probs, kept, log_sum)


def _exact(batch: Batch, samples: Tensor) -> TrunkInputs:
    count, embeddings = len(samples), batch.embeddings
    return TrunkInputs(
        embeddings[None],
        repeated(batch.attention_mask, count),
        repeated(batch.positions, count),
        shift=embeddings.new_zeros((1, *embeddings.shape[:2]), dtype=torch.float32),
    )


@torch.no_grad()
def _log_sum(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """Return log sum_m softmax(logits of sample m), one sample's logits at a time."""
    log_probs = (reference.logits(sample, weight, **options).log_softmax(-1) for sample in hidden)
    return functools.reduce(torch.logaddexp, log_probs)
