"""The Monte-Carlo axis over processes: each runs its share of the samples, and all weigh them.

Samples meet only where their weights are formed, from log-probs [M, B, T-1]. So those are all that
processes exchange (and one [B, T] for the shift); the quadratic equation, which couples the
samples' whole distributions, needs their last hidden states [M, B, T, D] everywhere, and its head
runs on all of them in every process.

Every process then has the same loss, and sends it backward through its own samples. The gradients
add up to the whole one over the processes of the axis, but DDP and FSDP2 average over processes:
what goes backward into a process's samples is therefore multiplied by their number. What each
computes from gathered hidden states, the gradient of the quadratic equation's head, is whole
already, and an average leaves it so. There is no collective in the backward, nor inside a
checkpointed region, that FSDP2's own could come out of order with; and as FSDP2 wants it, all run
the trunk equally often, if need be on a sample that does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastperturb.engine import plans


@dataclass(frozen=True)
class Split:
    """Which of a call's samples this process runs: all, unless they are split over a group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def over(cls, group: DeviceMesh | dist.ProcessGroup) -> Split:
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

    def most(self, count: int) -> int:
        """The samples of the process that runs most of `count`."""
        return -(-count // self.size)

    def share(self, samples: Tensor) -> Tensor:
        """This process's part of what has all samples along its first dimension."""
        return samples.tensor_split(self.size)[self.rank]

    def agreed(self, value: Tensor) -> Tensor:
        """What the group's first process drew or measured, for all of them."""
        if self.group is not None:
            dist.broadcast(value, group=self.group, group_src=0)
        return value

    def run(self, run: plans.Run, samples: Tensor, size: int | None = None) -> plans.Pass:
        """What samples [M] or [M, B] yield, of which each process runs its share.

        size: how many at a time, each chunk a checkpointed region; None is all at once.
        """
        share, each = self.share(samples), run if self.group is None else _never_idle(run)
        if size is None:
            return self._joined(each(share), len(samples))
        passes = -(-self.most(len(samples)) // size)
        return self._joined(plans.chunked(each, share, passes), len(samples))

    def _joined(self, own: plans.Pass, count: int) -> plans.Pass:
        if self.group is None:
            return own
        travelled = own.travelled.clone()
        dist.all_reduce(travelled, group=self.group)

        def gathered(value: Tensor | None, count: int) -> Tensor | None:
            return None if value is None else _Gathered.apply(value, self, count)

        log_sums = gathered(own.log_sum[None], self.size) if own.log_sum is not None else None
        return plans.Pass(
            travelled,
            gathered(own.log_probs, count),
            gathered(own.hidden, count),
            None if log_sums is None else log_sums.logsumexp(0),
        )


def _never_idle(run: plans.Run) -> plans.Run:
    """For no samples, the trunk runs on one all the same, in the backward too."""

    def run_some(samples: Tensor) -> plans.Pass:
        if len(samples):
            return run(samples)
        idle = run(samples.new_zeros(1, *samples.shape[1:]))
        return plans.Pass(
            torch.zeros_like(idle.travelled),
            None if idle.log_probs is None else idle.log_probs[:0],
            None if idle.hidden is None else idle.hidden[:0],
            None if idle.log_sum is None else torch.full_like(idle.log_sum, -torch.inf),
        )

    return run_some


class _Gathered(torch.autograd.Function):
    """All processes' samples [count, ...] in order; see above for what comes back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, split: Split, count: int) -> Tensor:
        ctx.split = split
        most = split.most(count)
        padding = own.new_zeros(most - len(own), *own.shape[1:])
        parts = list(own.new_empty(split.size, most, *own.shape[1:]))
        dist.all_gather(parts, torch.cat([own, padding]), group=split.group)
        lengths = [len(numbers) for numbers in torch.arange(count).tensor_split(split.size)]
        return torch.cat([part[:length] for part, length in zip(parts, lengths)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.split.share(grad) * ctx.split.size, None, None
