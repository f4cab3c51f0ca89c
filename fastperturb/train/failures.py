"""Errors that stop a run: each names the cause, the remedy and the checkpoint to continue from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastperturb.data import Block
from fastperturb.model import PerturbedLM
from fastperturb.train.distributed import World


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(step: int, lm: PerturbedLM, world: World, checkpoint: Path | None) -> MemoryError:
    config = lm.config
    advice = ["lower micro_batch_size or block_size", "set gradient_checkpointing"]
    if config.plan == "batched":
        advice.insert(0, "set perturb.plan to auto or chunked")
    elif (config.chunk_size or 1) > 1:
        advice.insert(0, f"lower perturb.chunk_size ({config.chunk_size}), or leave it unset")
    elif world.size > 1:
        advice.insert(0, "set perturb.plan to chunked")
    return MemoryError(
        f"step {step} does not fit the memory of {world.device}: {'; or '.join(advice)}. "
        f"{_last_good(checkpoint)}"
    )


def non_finite_step(
    step: int, loss: float, norm: float, blocks: Sequence[Block], checkpoint: Path | None
) -> FloatingPointError:
    rows = ", ".join(str(int(block.rows[0])) for block in blocks[:8])
    return FloatingPointError(
        f"step {step}: the loss is {loss} and its gradient's norm {norm}, on the batch whose "
        f"blocks begin at rows {rows}{', ...' if len(blocks) > 8 else ''}; nothing was updated. "
        f"{_last_good(checkpoint)} Lower learning_rate or transform_learning_rate, raise warmup, "
        "or look at that batch"
    )


def non_finite_evaluation(step: int, nll: float, checkpoint: Path | None) -> FloatingPointError:
    return FloatingPointError(
        f"step {step}: the held-out nll is {nll}. {_last_good(checkpoint)} Lower learning_rate or "
        "transform_learning_rate, or look at eval_data"
    )


def _last_good(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {checkpoint}; resume=auto continues from it."
