"""The Monte-Carlo axis over processes: each runs its share of the samples, and all weigh them.

Samples meet only where their weights are formed, from log-probs [M, B, T-1]. So log-probs are all
that processes exchange (and one [B, T] for the shift). The quadratic estimator couples the samples'
whole distributions: it needs their last hidden states [M, B, T, D] everywhere, and its head runs on
all of them in every process.

Every process then has the same loss, and sends it backward through its own samples. The gradients
add up to the whole one over the processes of the axis, but DDP and FSDP2 average over processes:
the gradient that enters a process's samples is therefore multiplied by the number of processes. The
gradient
of the quadratic estimator's head, computed from gathered hidden states, is whole in each process
already, and an average leaves it so. There is no collective in the backward, nor inside a
checkpointed region, that FSDP2's own could come out of order with. FSDP2 also wants all processes
to run the trunk equally often: a process without samples runs one that does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastperturb.engine.passes import Pass, Run


@dataclass(frozen=True)
class SampleSplit:
    """The samples that this process runs: all, unless they are split over a group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def over(cls, group: DeviceMesh | dist.ProcessGroup) -> SampleSplit:
        """Split samples over the processes of a one-dimensional mesh, or of a group."""
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be a mesh of one dimension, as mesh['mc'], got {group}"
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a DeviceMesh or a ProcessGroup that this process belongs to, "
                f"got {group!r}"
            )
        return cls(group.rank(), group.size(), group)

    def largest_share(self, count: int) -> int:
        """Return the samples of the process that runs most of `count`."""
        return -(-count // self.size)

    def share(self, samples: Tensor) -> Tensor:
        """Return this process's part of a tensor with all samples along its first dimension."""
        return samples.tensor_split(self.size)[self.rank]

    def from_first(self, value: Tensor) -> Tensor:
        """Return the value of the group's first process in all of them."""
        if self.group is not None:
            dist.broadcast(value, group=self.group, group_src=0)
        return value

    def never_idle(self, run: Run) -> Run:
        """Return `run`, which without samples runs the trunk on one all the same, backward too."""
        if self.group is None:
            return run

        def run_some(samples: Tensor) -> Pass:
            if len(samples):
                return run(samples)
            idle = run(samples.new_zeros(1, *samples.shape[1:]))
            return Pass(
                torch.zeros_like(idle.shift_norms),
                None if idle.log_probs is None else idle.log_probs[:0],
                None if idle.hidden is None else idle.hidden[:0],
                None if idle.log_weights is None else idle.log_weights[:0],
                None if idle.log_sum is None else torch.full_like(idle.log_sum, -torch.inf),
            )

        return run_some

    def gathered(self, own: Pass, count: int) -> Pass:
        """Return the pass of all `count` samples from each process's own."""
        if self.group is None:
            return own
        shift_norms = own.shift_norms.clone()
        dist.all_reduce(shift_norms, group=self.group)

        def gather(value: Tensor | None, count: int) -> Tensor | None:
            return None if value is None else _Gathered.apply(value, self, count)

        log_sums = gather(own.log_sum[None], self.size) if own.log_sum is not None else None
        return Pass(
            shift_norms,
            gather(own.log_probs, count),
            gather(own.hidden, count),
            gather(own.log_weights, count),
            None if log_sums is None else log_sums.logsumexp(0),
        )


class _Gathered(torch.autograd.Function):
    """All processes' samples [count, ...] in order; the module docstring states the backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, split: SampleSplit, count: int) -> Tensor:
        ctx.split = split
        padding = own.new_zeros(split.largest_share(count) - len(own), *own.shape[1:])
        parts = list(own.new_empty(split.size, split.largest_share(count), *own.shape[1:]))
        dist.all_gather(parts, torch.cat([own, padding]), group=split.group)
        lengths = [len(numbers) for numbers in torch.arange(count).tensor_split(split.size)]
        return torch.cat([part[:length] for part, length in zip(parts, lengths)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.split.share(grad) * ctx.split.size, None, None
