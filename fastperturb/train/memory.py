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
import gc
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastperturb import plans

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
    lm, device = loop.lm, loop.world.device
    held, count = _held(device), lm.config.num_samples
    report, step = plans.PlanReport("batched", count, ""), 0
    if count > _MORE and _may_hold_all(lm.config):
        few, more = (_peak(loop, num_samples=n, **_at_once(lm.config)) for n in (_FEW, _MORE))
        each = max(1, (more - few) // (_MORE - _FEW))
        step = few + (count - _FEW) * each
        if lm.config.plan == "auto":
            report = plans.fitting(count, each, plans.free_bytes(device))
    if report.plan == "chunked":
        step = _peak(loop, plan="chunked", chunk_size=report.chunk_size)
    elif step == 0:
        step, report = _peak(loop), lm.plan_report()
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


def _at_once(config: Any) -> dict[str, Any]:
    """Changes to a config by which all samples asked for run together."""
    telescopes = {"sumo", "mlmc"} & config.equations.keys()  # which run a random number of them
    return {"plan": "batched"} | ({"estimator": "iwae"} if telescopes else {})


def _may_hold_all(config: Any) -> bool:
    """Whether the plan may hold all samples at a time, which a trial might not survive."""
    resampled = "resample" in config.equations or config.plan == "resample"
    return not resampled and config.plan != "chunked" and config.chunk_size is None


def _peak(loop: Loop, *, num_samples: int | None = None, **changes: Any) -> int:
    """The most memory that a step's first forward and backward held, under a changed config."""
    device = loop.world.device
    part = loop.share(loop.data.next_blocks(loop.options.batch_size))[0]
    gc.collect()
    _reset_peak(device)
    with loop.lm._configured(**changes), loop.autocast():
        loop.module(**part, num_samples=num_samples).loss.backward()
    peak = _peak_since_reset(device)
    loop.optimizer.zero_grad()
    return peak


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
