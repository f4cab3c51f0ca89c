"""An estimate of a run's peak memory, from a few small steps.

The memory of a step (forward and backward) grows in proportion to the samples that go through the
trunk at once. So a step is run with two samples and with four, and the peaks are extrapolated to
all. A plan that holds few samples at a time is run as it is. AdamW's two moments, which come with
the first update, are added, and on a CPU the copies that a checkpoint is written from. The peak of
a GPU is that of torch's allocator; the peak of a CPU is the resident memory of the whole process.
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

from fastperturb.config import TELESCOPES
from fastperturb.engine import memory, planner, sharding
from fastperturb.engine.planner import PlanReport
from fastperturb.train.batches import autocast, micro_batches
from fastperturb.train.evaluation import evaluate

if TYPE_CHECKING:
    from fastperturb.train.loop import Loop

_FEW, _MORE = 2, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one process at its peak."""

    device: str
    plan: str
    samples_at_once: int
    before: int  # the first step: the model, and on a CPU the whole process
    step: int  # activations, workspace and gradients
    optimizer: int
    checkpoint: int

    @property
    def peak(self) -> int:
        return self.before + self.step + self.optimizer + self.checkpoint

    def __str__(self) -> str:
        parts = {"before a step": self.before, "a step": self.step, "optimizer": self.optimizer}
        if self.checkpoint:
            parts["a checkpoint"] = self.checkpoint
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
        return (
            f"plan: {self.plan}, {self.samples_at_once} samples at once\n"
            f"peak memory of a process: about {self.peak / 2**20:,.0f} MiB on {self.device} "
            f"({listed})"
        )


def estimate(loop: Loop) -> MemoryEstimate:
    """Estimate the peak memory of a run that has not begun."""
    device = loop.world.device
    before = _memory(device)
    report, peak = _largest_step(loop)
    if loop.held_out:
        peak = max(peak, _peak(loop, _evaluate))
    trained = sum(p.numel() * 4 for g in loop.optimizer.param_groups for p in g["params"])
    return MemoryEstimate(
        device=str(device),
        plan=report.plan,
        samples_at_once=report.chunk_size,
        before=before,
        step=max(0, peak - before),
        optimizer=2 * trained,
        checkpoint=3 * trained if device.type == "cpu" else 0,
    )


def _largest_step(loop: Loop) -> tuple[PlanReport, int]:
    """Return the plan that the run will take, and the peak of a forward and backward under it."""
    lm, processes = loop.lm, loop.world.mc_size
    count = -(-lm.config.num_samples // processes)
    if count <= _MORE or not _may_hold_all(lm.config):
        return _run_whole(loop)
    few, more = (
        _peak(loop, functools.partial(_step, num_samples=n * processes, **_at_once(lm.config)))
        for n in (_FEW, _MORE)
    )
    sample_bytes = max(1, (more - few) // (_MORE - _FEW))
    report = PlanReport("batched", count, "as configured")
    if lm.config.plan == "auto" and not sharding.is_sharded(lm):  # sharded ones are always batched
        report = planner.fitting(count, sample_bytes, memory.spare_bytes(lm, loop.world.device))
    if report.plan == "chunked":
        return _run_whole(loop, plan="chunked", chunk_size=report.chunk_size)
    return report, few + (count - _FEW) * sample_bytes


def _run_whole(loop: Loop, **changes: Any) -> tuple[PlanReport, int]:
    peak = _peak(loop, functools.partial(_step, **changes))
    return loop.lm.plan_report(), peak


def _at_once(config: Any) -> dict[str, Any]:
    """Return the changes to a config that make all samples run together."""
    # Telescopes run a random number of samples; with iwae's, the estimate is of the most.
    is_telescope = any(name in TELESCOPES for name in config.equations)
    return {"plan": "batched"} | ({"estimator": "iwae"} if is_telescope else {})


def _may_hold_all(config: Any) -> bool:
    """Return True for a plan that may hold all samples at once, which is not safe to try."""
    resamples = "resample" in config.equations or config.plan == "resample"
    return not resamples and config.plan != "chunked" and config.chunk_size is None


def _peak(loop: Loop, run: Callable[[Loop], None]) -> int:
    """Call `run` and return the most memory that this process held meanwhile."""
    gc.collect()
    _reset_peak(loop.world.device)
    run(loop)
    return _peak_since_reset(loop.world.device)


def _step(loop: Loop, *, num_samples: int | None = None, **changes: Any) -> None:
    """Run the first forward and backward of a step, under a changed config."""
    blocks = loop.data.next_blocks(loop.options.batch_size)
    part = micro_batches(blocks, loop.options, loop.world)[0]
    with loop.lm.overriding(**changes), autocast(loop.options, loop.world):
        loop.module(**part, num_samples=num_samples).loss.backward()
    loop.optimizer.zero_grad()


def _evaluate(loop: Loop) -> None:
    evaluate(loop.lm, loop.held_out[: loop.options.batch_size], loop.options, loop.world)


def _memory(device: torch.device) -> int:
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
    """Return a size in /proc/self/status, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
