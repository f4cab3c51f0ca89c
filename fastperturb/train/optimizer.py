"""The optimizer of a run, its learning rates and the norm of its gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from fastperturb.engine import sharding
from fastperturb.model import PerturbedLM
from fastperturb.train.options import TrainOptions

# The transform's parameters are in relative units, in which five times the base's learning rate
# was stable.
TRANSFORM_RATE = 5.0


def adamw(lm: PerturbedLM, options: TrainOptions) -> torch.optim.AdamW:
    """Return AdamW, in which the transform has a learning rate and weight decay of its own.

    Vectors (norms and biases) have no weight decay.
    """
    transform_ids = {id(parameter) for parameter in lm.transform.parameters()}
    trainable = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    transform = [parameter for parameter in trainable if id(parameter) in transform_ids]
    others = [parameter for parameter in trainable if id(parameter) not in transform_ids]
    rate, transform_rate = options.learning_rate, options.transform_learning_rate
    if transform_rate is None:
        transform_rate = TRANSFORM_RATE * rate
    groups = [
        ("base", [p for p in others if p.ndim > 1], rate, options.weight_decay),
        ("vectors", [p for p in others if p.ndim <= 1], rate, 0.0),
        ("transform", transform, transform_rate, options.transform_weight_decay),
    ]
    return torch.optim.AdamW(
        [
            {"name": name, "params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for name, params, lr, decay in groups
            if params
        ]
    )


def cosine_schedule(
    optimizer: torch.optim.Optimizer, *, warmup: float, total_steps: int, step: int
) -> Any:
    """Return the learning rates from `step` on: a linear warmup, then a cosine to 0.

    warmup: a fraction of the steps.
    """
    return get_cosine_schedule_with_warmup(
        optimizer, int(warmup * total_steps), total_steps, last_epoch=step - 1
    )


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
    """Scale gradients down to a norm of at most `max_norm`; return the norm that they had."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm: Any = nn.utils.clip_grad_norm_(trained, math.inf if max_norm is None else max_norm)
    return float(sharding.whole(norm))
