"""The loss of a batch, and statistics of its samples, from their log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperturb import estimators, ops
from fastperturb.engine.batch import Batch
from fastperturb.engine.passes import Pass
from fastperturb.engine.plans import Rerun
from fastperturb.ops.combine import COMBINABLE


def estimate(
    batch: Batch,
    scored: Pass,
    rerun: Rerun | None,
    config: Any,
) -> dict[str, Tensor]:
    """Return the loss and the statistics of the samples, by their names in `PerturbedOutput`."""
    sampling, mask = batch.sampling, batch.token_mask()
    values = {}
    log_probs = scored.log_probs
    if scored.hidden is not None:
        assert batch.head is not None
        values["quadratic"], quadratic_log_probs = batch.head.quadratic(
            scored.hidden, sampling.strata
        )
        if log_probs is None:
            log_probs = quadratic_log_probs
    assert log_probs is not None
    raw_log_probs, reported = log_probs, {}
    if batch.latent_mean is not None:
        log_probs = scored.weighted_log_probs()
        assert scored.log_weights is not None
        reported["log_weights"] = scored.log_weights
    elif scored.log_weights is not None:
        # 0, with the gradient of a score, whose mean over samples is a baseline: its own mean is 0.
        log_probs = log_probs + (scored.log_weights - scored.log_weights.mean(0))
    combined = {
        name: ops.combine(log_probs, mask, name, marginal=batch.marginal)
        for name in sampling.equations
        if name in COMBINABLE and not sampling.takes_groups(name)
    }
    values |= {name: result.value for name, result in combined.items()}
    labelled, event_log_probs = batch.marginal_mask(), batch.marginal_log_probs(log_probs)
    if rerun is not None:
        assert rerun.result.log_probs is not None
        drawn = rerun.result.log_probs
        if batch.latent_mean is None:
            drawn = rerun.result.weighted_log_probs()
        value = rerun.resampled.estimate(batch.marginal_log_probs(drawn))
        values = dict.fromkeys(sampling.equations, value)
    elif "resample" in sampling.equations or sampling.telescope is not None:
        (name,) = sampling.equations
        values[name] = sampling.combine(event_log_probs, labelled, config)
    else:
        for name in sampling.equations.keys() - values.keys():  # those without a kernel
            values[name], _ = estimators.combine(
                event_log_probs, name, mask=labelled, strata=sampling.strata
            )
    terms = [weight * values[name].sum() for name, weight in sampling.equations.items()]
    total = torch.stack(terms).sum()
    assert batch.label_count is not None
    iwae = combined.get("iwae") or ops.combine(
        log_probs.detach(), mask, "iwae", marginal=batch.marginal
    )
    return {
        "loss": -total.to(log_probs.dtype) / batch.label_count,
        "log_marginal": iwae.log_marginal,
        "log_probs": raw_log_probs,
        **reported,
        "log_prob_variance": _variance(batch.marginal_log_probs(raw_log_probs), labelled),
        "ess": iwae.effective_samples.sum() / labelled.sum().clamp_min(1),
    }


@torch.no_grad()
def _variance(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the variance over samples [M, ...], averaged where the mask is set."""
    # Not var, which warns where rows of one token have no labels.
    deviation = log_probs.float() - log_probs.float().mean(0)
    variance = deviation.square().sum(0) / max(1, len(log_probs) - 1)
    return variance.where(mask, 0.0).sum() / mask.sum().clamp_min(1)
