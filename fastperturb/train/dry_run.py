"""What a run's largest step will take, from small ones.

Samples that go through the trunk at once need memory in proportion. So a step (forward and
backward) is run with two of them and with four, and their peaks, extended to all, say what the
whole step would need. A plan that holds few samples at a time is simply run. AdamW's two moments,
which come with the first update, are added, and on a CPU the copies that a checkpoint is written
from. On a GPU the peak is the allocator's, on a CPU the process's resident memory, libraries and
all.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastperturb.engine import memory, planner, sharding
from fastperturb.engine.planner import PlanReport

if TYPE_CHECKING:
    from fastperturb.train.loop import Loop

_FEW, _MORE = 2, 4


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at its peak."""

    device: str
    plan: str
    samples_at_once: int
    held: int  # before the first step: the model, and on a CPU the whole process
    step: int  # activations, workspace and gradients on top of it
    optimizer: int
    checkpoint: int

    @property
    def peak(self) -> int:
        return self.held + self.step + self.optimizer + self.checkpoint

    def __str__(self) -> str:
        parts = {"held before": self.held, "a step": self.step, "optimizer": self.optimizer}
        if self.checkpoint:
            parts["a checkpoint"] = self.checkpoint
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
        return (
            f"plan: {self.plan}, {self.samples_at_once} samples at once\n"
            f"peak memory of a process: about {self.peak / 2**20:,.0f} MiB on {self.device} "
            f"({listed})"
        )


def estimate(loop: Loop) -> Estimate:
    """The peak of a run that has not begun."""
    device = loop.world.device
    held = _held(device)
    report, step = _largest_step(loop)
    if loop.held_out:
        step = max(step, _peak(loop, _judge))
    trained = sum(p.numel() * 4 for g in loop.optimizer.param_groups for p in g["params"])
    copies = 3 * trained if device.type == "cpu" else 0
    return Estimate(
        device=str(device),
        plan=report.plan,
        samples_at_once=report.chunk_size,
        held=held,
        step=max(0, step - held),
        optimizer=2 * trained,
        checkpoint=copies,
    )


def _largest_step(loop: Loop) -> tuple[PlanReport, int]:
    """The plan that the run will take, and the peak of a forward and backward under it."""
    lm, processes = loop.lm, loop.world.mc_size
    count = -(-lm.config.num_samples // processes)
    if count <= _MORE or not _may_hold_all(lm.config):
        return _run_whole(loop)
    few, more = (
        _peak(loop, functools.partial(_step, num_samples=n * processes, **_at_once(lm.config)))
        for n in (_FEW, _MORE)
    )
    each = max(1, (more - few) // (_MORE - _FEW))
    report = PlanReport("batched", count, "as configured")
    if lm.config.plan == "auto" and not sharding.is_sharded(lm):  # which are always batched
        report = planner.fitting(count, each, memory.spare_bytes(lm, loop.world.device))
    if report.plan == "chunked":
        return _run_whole(loop, plan="chunked", chunk_size=report.chunk_size)
    return report, few + (count - _FEW) * each


def _run_whole(loop: Loop, **changes: Any) -> tuple[PlanReport, int]:
    peak = _peak(loop, functools.partial(_step, **changes))
    return loop.lm.plan_report(), peak


def _at_once(config: Any) -> dict[str, Any]:
    """Changes to a config by which all samples asked for run together."""
    telescopes = {"sumo", "mlmc"} & config.equations.keys()  # which run a random number of them
    return {"plan": "batched"} | ({"estimator": "iwae"} if telescopes else {})


def _may_hold_all(config: Any) -> bool:
    """Whether the plan may hold all samples at a time, which a trial might not survive."""
    resampled = "resample" in config.equations or config.plan == "resample"
    return not resampled and config.plan != "chunked" and config.chunk_size is None


def _peak(loop: Loop, run: Callable[[Loop], None]) -> int:
    """The most memory that this process held while something ran."""
    gc.collect()
    _reset_peak(loop.world.device)
    run(loop)
    return _peak_since_reset(loop.world.device)


def _step(loop: Loop, *, num_samples: int | None = None, **changes: Any) -> None:
    """The first forward and backward of a step, under a changed config."""
    part = loop.share(loop.data.next_blocks(loop.options.batch_size))[0]
    with loop.lm.overriding(**changes), loop.autocast():
        loop.module(**part, num_samples=num_samples).loss.backward()
    loop.optimizer.zero_grad()


def _judge(loop: Loop) -> None:
    loop.evaluate(loop.held_out[: loop.options.batch_size])


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where the kernel does not allow it, the peak of the process so far stands in.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_since_reset(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    """Of this process, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
