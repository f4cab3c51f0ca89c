"""The choice between `batched` and `chunked`: as the config says, or by what fits the memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn

from fastperturb.engine import memory, sharding
from fastperturb.engine.passes import Run
from fastperturb.engine.tracing import untraced

# auto uses this share of the free memory, and takes a sample to need this many times its measure.
_SHARE, _MARGIN = 0.7, 1.2


@dataclass(frozen=True)
class Size:
    """The size of a batch, and of the call that it is a part of."""

    rows: int
    samples: int
    pairs: int  # of a row and a sample, in the whole call

    @property
    def alive(self) -> float:
        """The samples of this many rows whose activations are alive by the end of the call."""
        return self.pairs / self.rows


@dataclass(frozen=True)
class PlanReport:
    """The plan that a forward took, and why."""

    plan: str
    chunk_size: int  # samples at a time
    reason: str
    bytes_per_sample: int | None = None  # of activations kept for the backward, where measured
    free_bytes: int | None = None
    proposal_steps: int = 0  # forward and backward passes of one sample before, for the proposal

    def __str__(self) -> str:
        text = f"plan {self.plan!r}, {self.chunk_size} samples at a time: {self.reason}"
        if self.proposal_steps:
            text += f"; {self.proposal_steps} passes of one sample before, for the proposal"
        return text


class Planner:
    """Plan `auto`: measures the bytes a sample keeps for the backward, and fits the free memory."""

    def __init__(self) -> None:
        self._measured: dict[Hashable, float] = {}  # bytes a sample of one row
        self._chosen: dict[Hashable, PlanReport] = {}
        self._most: int | None = None  # samples at a time, once memory ran out

    def step_down(self, last: PlanReport) -> bool:
        """Halve the samples at a time after memory ran out; return False at one sample."""
        if last.chunk_size > 1:
            self._most = last.chunk_size // 2
        return last.chunk_size > 1

    def limited(self, size: int) -> int:
        """Return `size`, or fewer samples at a time where `step_down` has set a limit."""
        return size if self._most is None else min(size, self._most)

    @untraced  # what it measures changes the next call's choice
    def choose(
        self, run: Run, size: Size, kind: Hashable, owner: nn.Module, device: torch.device
    ) -> PlanReport:
        """Return `batched` if all samples fit, else `chunked` with the largest chunk that does.

        kind: everything that the activations of a sample of one row depend on.
        owner: the module whose weights are not activations.

        A kind of batch is measured once, by a forward of one sample, and keeps its plan: the same
        forward run again, in a checkpointed region of the caller's, must take the same.
        """
        count = size.samples
        if size.pairs == size.rows:
            return PlanReport("batched", 1, "there is one sample")
        if not torch.is_grad_enabled():
            if self.limited(count) < count:
                return PlanReport("chunked", self.limited(count), "memory ran out with more")
            return PlanReport("batched", count, "nothing is kept without a gradient")
        if sharding.is_sharded(owner):
            # Ranks must gather the shards equally often, and their free memory may differ.
            return PlanReport("batched", count, "sharded parameters: set plan='chunked' if need be")
        if (kind, size) not in self._chosen:
            if kind not in self._measured:
                first = torch.zeros(1, dtype=torch.int64, device=device)
                self._measured[kind] = memory.kept_bytes(run, first, owner) / size.rows
            free = memory.spare_bytes(owner, device)
            per_sample = math.ceil(size.rows * self._measured[kind])
            self._chosen[kind, size] = fitting(count, per_sample, free, alive=size.alive)
        chosen = self._chosen[kind, size]
        limit = self.limited(chosen.chunk_size)
        if limit < chosen.chunk_size:
            reason = f"memory ran out with more; planned were {chosen.chunk_size}: {chosen.reason}"
            return dataclasses.replace(chosen, plan="chunked", chunk_size=limit, reason=reason)
        return chosen


def fitting(count: int, per_sample: int, free: int, *, alive: float | None = None) -> PlanReport:
    """Return `batched` where `count` samples fit into `free` bytes, else even chunks that do.

    alive: how many samples' activations there are with those of other batches; default `count`.
    """
    fit = int(_SHARE * free / (_MARGIN * per_sample + 1))
    sizes = {"bytes_per_sample": per_sample, "free_bytes": free}
    facts = f"a sample keeps {memory.as_text(per_sample)} and {memory.as_text(free)} are free"
    if alive is not None and alive > count:
        facts += f" for {alive:.3g} of them, with those of other levels"
    if fit >= (alive or count):
        return PlanReport("batched", count, f"all {count} samples fit: {facts}", **sizes)
    # Even chunks: the last one is no smaller than need be.
    chunks = -(-count // max(1, fit))
    size = -(-count // chunks)
    return PlanReport("chunked", size, f"{count} samples at once would not fit: {facts}", **sizes)
