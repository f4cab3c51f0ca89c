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
    dtype, labelled = log_probs.dtype, mask
    if marginal == "sequence":
        # In fp32 a sum of thousands is rounded by more than the samples differ.
        log_probs = log_probs.where(mask, 0.0).sum(-1, dtype=torch.float64)
        labelled = mask.any(-1)
    value, weights = estimators.combine(log_probs, estimator, mask=labelled)
    log_marginal, _ = estimators.combine(log_probs, "iwae", mask=labelled)
    effective = estimators.effective_samples(log_probs).where(labelled, 0.0)
    return (
        value.to(dtype).contiguous(),
        log_marginal.to(dtype).contiguous(),
        effective.to(dtype).contiguous(),
        weights.to(dtype).contiguous(),
    )
