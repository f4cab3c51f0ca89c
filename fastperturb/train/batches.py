"""Batches of blocks, split over processes and micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from fastperturb.data import Block, collate
from fastperturb.engine.batch import IGNORED
from fastperturb.train.distributed import World
from fastperturb.train.options import TrainOptions

ForwardArguments = dict[str, Any]  # of PerturbedLM.forward


def micro_batches(
    blocks: Sequence[Block], options: TrainOptions, world: World
) -> list[ForwardArguments]:
    """Return this process's share of a batch, in parts that go through the model one by one.

    A share that is short is filled with blocks without labels, so that all processes run the same
    number of passes.
    """
    share = -(-len(blocks) // world.dp_size)
    mine = list(blocks[share * world.dp_rank :][:share])
    batch = collate(mine + [blocks[0]] * (share - len(mine)))
    batch["labels"][len(mine) :] = IGNORED
    size = options.micro_batch_size or share
    parts = {name: value.to(world.device).split(size) for name, value in batch.items()}
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


def label_count(blocks: Sequence[Block]) -> int:
    """Return the number of labelled tokens, over which the loss is a mean."""
    return sum(int((block.labels[1:] != IGNORED).sum()) for block in blocks)


def autocast(options: TrainOptions, world: World) -> contextlib.AbstractContextManager[Any]:
    """Return the precision of a run's forward passes, as a context manager."""
    enabled = options.precision == "bf16"
    return torch.autocast(world.device.type, torch.bfloat16, enabled=enabled)
