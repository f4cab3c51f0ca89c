"""`combine` by `fastperturb.estimators` itself: on every device, in fp32 or fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb import estimators


def combine(
    log_probs: Tensor,  # [M, B, T]
    mask: Tensor,  # [B, T]
    estimator: str,
    marginal: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outcomes, labelled = log_probs, mask
    if marginal == "sequence":
        # A sum of thousands keeps in fp32 less than the samples differ by.
        outcomes = log_probs.where(mask, 0.0).sum(-1, dtype=torch.float64)
        labelled = mask.any(-1)
    value, weights = estimators.combine(outcomes, estimator, mask=labelled)
    log_marginal, _ = estimators.combine(outcomes, "iwae", mask=labelled)
    effective = estimators.effective_samples(outcomes).where(labelled, 0.0)
    value, log_marginal, effective, weights = (
        each.to(log_probs.dtype).contiguous() for each in (value, log_marginal, effective, weights)
    )
    return value, log_marginal, effective, weights
