"""Memory: the bytes that samples keep for a backward, and the bytes that are free."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fastperturb.engine.passes import Run


def kept_bytes(run: Run, samples: Tensor, owner: nn.Module) -> int:
    """Return the bytes that running these samples keeps for a backward, beyond owner's weights."""
    state = [value for value in (*owner.parameters(), *owner.buffers()) if value.numel()]
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


def spare_bytes(owner: nn.Module, device: torch.device) -> int:
    """Return the free bytes, less the gradients and AdamW's moments that a first step allocates."""
    trained = (value for value in owner.parameters() if value.requires_grad and value.grad is None)
    coming = sum(3 * value.numel() * value.element_size() for value in trained)
    return max(0, free_bytes(device) - coming)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a GPU, or on this machine and container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return min(_machine_bytes(), _container_bytes())


def as_text(count: int) -> str:
    """Return a number of bytes as MiB or GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def _machine_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _container_bytes() -> int:
    """Return the bytes left under a control group's limit; without a limit, a huge number."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return 2**62
