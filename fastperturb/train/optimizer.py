"""The optimizer of a run, its learning rates and the norm of its gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
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


def clip_gradients(lm: PerturbedLM, max_norm: float | None) -> Tensor:
    """Scale two gradients down to a norm of at most `max_norm` each; None only measures.

    One is the transform's, the other that of all else: under a norm of both together, the larger
    one would decide how far the other is scaled down. Returns the norm that both together had.
    """
    transform_ids = {id(parameter) for parameter in lm.transform.parameters()}
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in lm.parameters():
        if parameter.grad is not None:
            parts[id(parameter) in transform_ids].append(parameter)
    limit = math.inf if max_norm is None else max_norm
    norms = [nn.utils.clip_grad_norm_(part, limit) for part in parts.values() if part]
    return torch.stack([sharding.whole(norm) for norm in norms]).norm()
