"""Telescopes: each batch row has a level, and the rows of one level run as a batch of their own.

A level needs its own number of samples, so a row runs as many as its own level does, and the levels
of a batch average out. A row's level depends on the seed and its row id alone: it does not matter
how rows are split into micro-batches and over processes.

Where FSDP2 shards parameters, all processes must run the trunk equally often. There all rows of a
step have one level, and the first process draws it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb import noise
from fastperturb.engine import sharding
from fastperturb.engine.batch import Batch
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.tracing import untraced


def split(lm: WrappedModel, batch: Batch) -> list[Batch]:
    """Cut a batch into the rows of each level, in rising order; without a telescope it is whole."""
    telescope = batch.sampling.telescope
    if telescope is None:
        return [batch]
    level = _drawn(lm, batch)
    levels = level.tolist()  # one wait for a GPU
    pairs = sum(telescope.level_draws[number] for number in levels) * len(batch) // len(levels)
    batch = dataclasses.replace(batch, pairs=pairs)
    distinct = sorted(set(levels))
    if len(distinct) == 1:
        return [batch.at_level(distinct[0])]
    rows = level.argsort(stable=True).split([levels.count(number) for number in distinct])
    return [batch.of_rows(part).at_level(number) for part, number in zip(rows, distinct)]


def _drawn(lm: WrappedModel, batch: Batch) -> Tensor:
    """Return a level for each row [B], or one for all of them [1]."""
    sampling = batch.sampling
    assert sampling.telescope is not None
    seed, rows = sampling.seed, sampling.first_rows()
    if sharding.is_sharded(lm):
        seed, rows = sharding.from_first(lm, seed), rows.new_zeros(1)
    return sampling.telescope.sample(noise.auxiliary_uniforms(seed, 1, rows)[0])


@untraced  # the numbers of rows vary
def joined(parts: list[Batch], outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the outputs of a whole batch from those of its parts.

    Samples that a row did not run have log-probs of NaN.
    """
    if len(parts) == 1:
        return outputs[0]
    result = {"shift": _mean("shift", outputs, [part.shift_count() for part in parts])}
    if parts[0].labels is not None:
        labelled = [part.marginal_mask().sum() for part in parts]
        result |= {name: _mean(name, outputs, labelled) for name in ("ess", "log_prob_variance")}
        result["loss"] = torch.stack([output["loss"] for output in outputs]).sum()
    order = torch.cat([part.numbers for part in parts if part.numbers is not None]).argsort()
    for name in outputs[0].keys() - result.keys():
        values = [output[name] for output in outputs]
        dim = 0
        if name in ("log_probs", "log_weights"):
            dim, most = 1, max(len(value) for value in values)
            values = [_extended(value, most) for value in values]
        result[name] = torch.cat(values, dim).index_select(dim, order)
    return result


def _mean(name: str, outputs: list[dict[str, Tensor]], counts: list[Tensor]) -> Tensor:
    """Return the mean of the parts' means, each of so many values."""
    count = torch.stack(counts)
    total = (torch.stack([output[name] for output in outputs]) * count).sum()
    return total / count.sum().clamp_min(1)


def _extended(log_probs: Tensor, samples: int) -> Tensor:  # [m, B, T-1] to [samples, B, T-1]
    padding = (0, 0, 0, 0, 0, samples - len(log_probs))
    return F.pad(log_probs, padding, value=torch.nan)
