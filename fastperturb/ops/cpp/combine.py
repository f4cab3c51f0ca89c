"""`combine` by the C++ kernel of `csrc/combine.cpp`, for CPUs: many tokens side by side in SIMD."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(
    log_probs: Tensor,  # [M, B, T] fp32
    mask: Tensor,  # [B, T]
    estimator: str,
    marginal: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if log_probs.stride(-1) != 1:
        log_probs = log_probs.contiguous()
    sequence = marginal == "sequence"
    shape = log_probs.shape[:2] if sequence else log_probs.shape
    value, log_marginal, effective = (log_probs.new_empty(shape[1:]) for _ in range(3))
    weights = log_probs.new_empty(shape)
    torch.ops.fastperturb_cpp.combine(
        *(value, log_marginal, effective, weights),
        *(log_probs, mask.contiguous(), estimator, sequence),
    )
    return value, log_marginal, effective, weights
