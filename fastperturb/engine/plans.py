"""Plans: how the M samples of a batch go through the trunk, all within one forward.

    batched    all at once                              trunk 4MP, M samples' activations
    chunked    `size` samples at a time, each chunk a   trunk 6MP, one chunk's activations
               checkpointed region, trunk and head
    resample   all scored without gradient, then K      trunk (2M + 4K)P, K samples' activations
               drawn ones with it
    auto       batched where M samples' activations fit the free memory, else chunked by what fits;
               a forward of one sample measures them, once for each kind of batch

P is half of one sample's forward. All give the same loss for the same seed, to rounding;
resample's gradient is an unbiased estimate of iwae's. Only log-probs outlive a chunk, but the
quadratic equation couples the samples' whole distributions: under `chunked` it keeps their last
hidden states too. One ordinary backward follows, as DDP, FSDP2 and trainers expect: the regions
are torch.utils.checkpoint's, whose first pass skips the head's second GEMM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastperturb.engine import sharding
from fastperturb.ops import head_op

# What of the free memory auto plans for, and what a sample may need beyond what was measured.
_SHARE, _MARGIN = 0.7, 1.2


class Pass(NamedTuple):
    """What some samples of a batch yield."""

    travelled: Tensor  # [B, T], the sum over these samples of |T(e) - e|
    log_probs: Tensor | None = None  # [m, B, T]
    hidden: Tensor | None = None  # [m, B, T, D], for the quadratic equation
    log_sum: Tensor | None = None  # [B, T, V], log of the summed probabilities, on request


Run = Callable[[Tensor], Pass]


@dataclass(frozen=True)
class PlanReport:
    """Which plan a forward took and why."""

    plan: str
    chunk_size: int  # samples at a time
    reason: str
    bytes_per_sample: int | None = None  # of activations kept for the backward, where measured
    free_bytes: int | None = None

    def __str__(self) -> str:
        return f"plan {self.plan!r}, {self.chunk_size} samples at a time: {self.reason}"


def chunked(run: Run, samples: Tensor, passes: int) -> Pass:
    """samples [M] or [M, B] in even parts; under a gradient each part is run twice."""
    parts = samples.tensor_split(passes)
    if not torch.is_grad_enabled():
        return _joined([run(part) for part in parts])
    again = checkpoint
    if torch.compiler.is_compiling():  # the compiler takes no checkpoint with contexts like ours
        again = torch.compiler.disable(checkpoint)
    return _joined([again(run, part, use_reentrant=False, context_fn=_contexts) for part in parts])


def _contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return head_op.without_grad_hidden(), contextlib.nullcontext()


def _joined(parts: list[Pass]) -> Pass:
    def over(combine: Callable[[list[Tensor]], Tensor], name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else combine(values)

    travelled = over(lambda values: functools.reduce(torch.add, values), "travelled")
    assert travelled is not None
    return Pass(
        travelled,
        over(torch.cat, "log_probs"),
        over(torch.cat, "hidden"),
        over(lambda values: functools.reduce(torch.logaddexp, values), "log_sum"),
    )


class Planner:
    """`auto`: measures what a sample keeps for the backward, and plans for the free memory."""

    def __init__(self) -> None:
        self._measured: dict[Hashable, int] = {}  # bytes a sample
        self._chosen: dict[Hashable, PlanReport] = {}
        self._most: int | None = None  # samples at a time, once memory ran out

    def step_down(self, last: PlanReport) -> bool:
        """After memory ran out: half as many samples at a time from now on, if that is possible."""
        if last.chunk_size > 1:
            self._most = last.chunk_size // 2
        return last.chunk_size > 1

    def limited(self, size: int) -> int:
        """`size` samples at a time, or fewer where so many ran out of memory."""
        return size if self._most is None else min(size, self._most)

    def choose(
        self, run: Run, samples: Tensor, kind: Hashable, owners: nn.Module, device: torch.device
    ) -> PlanReport:
        """kind: what a sample's activations depend on; owners: whose parameters are not theirs.

        A kind of batch is measured once, by a forward of one sample, and keeps its plan: the same
        forward run again, in a checkpointed region of the caller's, must take the same.
        """
        count = len(samples)
        if count == 1:
            return PlanReport("batched", 1, "there is one sample")
        if not torch.is_grad_enabled():
            if self.limited(count) < count:
                return PlanReport("chunked", self.limited(count), "memory ran out with more")
            return PlanReport("batched", count, "nothing is kept without a gradient")
        if sharding.is_sharded(owners):
            # Ranks must gather the shards equally often, and what each could hold differs.
            return PlanReport("batched", count, "sharded parameters: set plan='chunked' if need be")
        if (kind, count) not in self._chosen:
            self._chosen[kind, count] = self._plan(run, samples, kind, owners, device)
        chosen = self._chosen[kind, count]
        size = self.limited(chosen.chunk_size)
        if size < chosen.chunk_size:
            reason = f"memory ran out with more; planned were {chosen.chunk_size}: {chosen.reason}"
            return dataclasses.replace(chosen, plan="chunked", chunk_size=size, reason=reason)
        return chosen

    def _plan(
        self, run: Run, samples: Tensor, kind: Hashable, owners: nn.Module, device: torch.device
    ) -> PlanReport:
        count = len(samples)
        if kind not in self._measured:
            self._measured[kind] = kept_bytes(run, samples[:1], owners)
        return fitting(count, self._measured[kind], spare_bytes(owners, device))


def fitting(count: int, per_sample: int, free: int) -> PlanReport:
    """All samples at once where they fit, else even chunks that do."""
    fit = int(_SHARE * free / (_MARGIN * per_sample + 1))
    known = {"bytes_per_sample": per_sample, "free_bytes": free}
    facts = f"a sample keeps {_size(per_sample)} and {_size(free)} are free"
    if fit >= count:
        return PlanReport("batched", count, f"all {count} samples fit: {facts}", **known)
    # Even chunks: the last one is no smaller than need be.
    chunks = -(-count // max(1, fit))
    size = -(-count // chunks)
    return PlanReport("chunked", size, f"{count} samples at once would not fit: {facts}", **known)


def kept_bytes(run: Run, samples: Tensor, owners: nn.Module) -> int:
    """The bytes that running these samples keeps for a backward, beyond the model's own."""
    state = [value for value in (*owners.parameters(), *owners.buffers()) if value.numel()]
    own = {value.untyped_storage().data_ptr() for value in state}
    shapes = {value.shape for value in state if value.ndim == 2}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        # Autocast keeps copies of weights, which do not multiply with the samples.
        is_copy = value.shape in shapes or value.mT.shape in shapes if value.ndim == 2 else False
        if storage.data_ptr() not in own and not is_copy:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    devices = [samples.device] if samples.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        result = run(samples)  # kept alive until all is counted: memory must not be used twice
    del result
    return sum(kept.values())


def spare_bytes(owners: nn.Module, device: torch.device) -> int:
    """Free memory, less what a first step allocates for good: gradients and AdamW's two moments."""
    trained = (each for each in owners.parameters() if each.requires_grad and each.grad is None)
    coming = sum(3 * each.numel() * each.element_size() for each in trained)
    return max(0, free_bytes(device) - coming)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the device, or of this machine and container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return min(_machine_bytes(), _container_bytes())


def _machine_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _container_bytes() -> int:
    """What is left of a control group's limit; without one, no limit."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return 2**62


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
