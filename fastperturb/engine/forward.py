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

from fastperturb.engine import label_weights, levels, loss, plans, proposal
from fastperturb.engine.batch import Batch
from fastperturb.engine.inputs import lay_out
from fastperturb.engine.passes import Pass
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.trunk import TrunkInputs, repeated, shift_norms
from fastperturb.ops import reference


@dataclass
class PerturbedOutput(ModelOutput):
    """The result of a perturbed forward; entry t of a [.., T-1] tensor is about label t + 1.

    loss: minus the sum of the estimator's value over the number of labelled tokens.
    log_marginal: log mean_m of the samples' probabilities, [B, T-1] (token marginal) or [B].
    log_weights: of samples that a proposal drew, to be added to log_probs before they are combined.
    log_probs: each sample's log-prob of each label, [M, B, T-1], 0 where there is no label; of sumo
        and mlmc M is the most samples that a row ran, and NaN those that another did not run.
    ess: effective samples, the mean over labelled tokens (or rows) of 1 / sum_m w[m]^2.
    shift: mean of |T(e) - e| / |e| over samples and perturbed positions.
    log_prob_variance: variance over samples, averaged over labelled tokens (or rows).
    logits: log of the mean probability over samples, [B, T, V], on request.
    """

    loss: Tensor | None = None
    log_marginal: Tensor | None = None
    log_probs: Tensor | None = None
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    shift: Tensor | None = None
    log_prob_variance: Tensor | None = None
    logits: Tensor | None = None


def run(lm: WrappedModel, **arguments: Any) -> PerturbedOutput:
    """Run M perturbed samples; `PerturbedLM.forward` describes the arguments."""
    if torch.compiler.is_compiling():
        torch._dynamo.skip_frame()
    batches = lay_out(lm, **arguments)
    output = PerturbedOutput(**levels.joined(batches, [_compute(lm, part) for part in batches]))
    assert output.shift is not None
    lm.perturbation.watch(lm, output.shift)
    return output


def _compute(lm: WrappedModel, batch: Batch) -> dict[str, Tensor]:
    """Run the samples and estimate the loss: the part of a call that is compiled, if any is."""
    scored, rerun = plans.execute(lm, batch, functools.partial(run_samples, lm, batch))
    output: dict[str, Tensor] = {}
    if batch.labels is not None:
        output = loss.estimate(batch, scored, rerun, lm.config)
    if scored.log_sum is not None:
        output["logits"] = scored.log_sum - math.log(batch.sampling.count)
    return {**output, "shift": batch.shift(scored.shift_norms)}


def run_samples(lm: WrappedModel, batch: Batch, samples: Tensor) -> Pass:
    """Run the samples with these numbers, [m] or [m, B], through perturbation, trunk and head."""
    if batch.exact:
        inputs = _exact(batch, samples)
    else:
        inputs = lm.perturbation.trunk_inputs(lm, batch, samples)
    hidden = inputs.hidden_states(batch.parts.trunk, batch.prefix, batch.documents)  # (m, B, T, D)
    equations, log_probs, log_sum = batch.sampling.equations, None, None
    if batch.head is not None and set(equations) != {"quadratic"}:
        log_probs = batch.head.log_probs(hidden)
    if batch.return_logits:
        log_sum = _log_sum(hidden, batch.parts.head.weight, batch.parts.head_options)
    kept = hidden if "quadratic" in equations else None
    weights = None
    if batch.latent_mean is not None:
        weights = proposal.log_weights(lm, batch, samples)
    elif inputs.log_weights is not None and batch.labels is not None:
        weights = label_weights.of_labels(batch, inputs.log_weights)
    return Pass(shift_norms(inputs, batch.embeddings), log_probs, kept, weights, log_sum)


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
