"""The choice of an op's implementation, by device and availability.

An implementation is a module: for perturb_embed, one with the functions that `embed` calls; for
the heads, one with the row passes that `head_blocks` calls between its GEMMs; for combine and
context_scan, one with the functions of that name.

Implementations import `calls` and never this module, so that `dispatch` may ask `cpp.build` whether
the C++ kernels can run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastperturb.ops.cpp import build

_MODULES = {
    "triton": {
        "perturb_embed": "fastperturb.kernels.perturb_embed",
        "linear_logprob": "fastperturb.kernels.head_rows",
        "linear_quadratic": "fastperturb.kernels.head_rows",
        "combine": "fastperturb.kernels.combine",
        "context_scan": "fastperturb.kernels.context_scan",
    },
    "cpp": {
        "perturb_embed": "fastperturb.ops.cpp.embed",
        "linear_logprob": "fastperturb.ops.cpp.rows",
        "linear_quadratic": "fastperturb.ops.cpp.rows",
        "combine": "fastperturb.ops.cpp.combine",
        "context_scan": "fastperturb.ops.cpp.context_scan",
    },
    "torch": {
        "perturb_embed": "fastperturb.ops.torch.embed",
        "linear_logprob": "fastperturb.ops.torch.rows",
        "linear_quadratic": "fastperturb.ops.torch.rows",
        "combine": "fastperturb.ops.torch.combine",
        "context_scan": "fastperturb.ops.torch.context_scan",
    },
}
OPS = tuple(_MODULES["torch"])

_only: str | None = None
# Names of devices on which bench/heads.py has shown the heads' fused GEMM to be faster than a GEMM
# and a row pass. None has been measured yet.
_FUSED_HEAD_DEVICES: frozenset[str] = frozenset()
_fused_head: bool | None = None


@dataclass(frozen=True)
class Candidate:
    """An implementation of one op, and why it can or cannot run on a device."""

    name: str
    usable: bool
    reason: str
    module: str | None = None  # None where it could never run


def explain(op: str, device: torch.device) -> list[Candidate]:
    """Return every implementation of `op` in order of preference; the first usable one runs."""
    if op not in OPS:
        raise ValueError(f"op must be one of {OPS}, got {op!r}")
    return [
        _triton(op, device),
        _cpp(op, device),
        Candidate("torch", True, "runs on every device", _MODULES["torch"][op]),
    ]


def _triton(op: str, device: torch.device) -> Candidate:
    if device.type != "cuda":
        return Candidate("triton", False, "runs on CUDA devices only")
    if not _has_triton():
        return Candidate("triton", False, "triton is not installed")
    return Candidate("triton", True, "fused on the GPU", _MODULES["triton"][op])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _cpp(op: str, device: torch.device) -> Candidate:
    if device.type != "cpu":
        return Candidate("cpp", False, "runs on CPUs only")
    return Candidate("cpp", *build.availability(), _MODULES["cpp"][op])


def implementation(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the module that runs `op` on tensors of this dtype; fp64, for proofs, is torch's."""
    only = "torch" if dtype == torch.float64 else _only
    candidates = [candidate for candidate in explain(op, device) if only in (None, candidate.name)]
    for candidate in candidates:
        if candidate.module is None:
            continue
        # The C++ kernels are built on their first use, which may warn or raise.
        usable = build.prepare() if candidate.name == "cpp" else candidate.usable
        if usable:
            return importlib.import_module(candidate.module)
    reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates)
    raise RuntimeError(f"no implementation of {op} is usable on {device} ({reasons})")


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Run every op by this implementation, forward and backward: for tests and benchmarks.

    Process-wide, because a GPU's backward runs in threads of its own.
    """
    global _only
    before, _only = _only, name
    try:
        yield
    finally:
        _only = before


def fused_head(device: torch.device) -> ModuleType | None:
    """Return the module of the heads' fused GEMM, on devices where it is faster."""
    if device.type != "cuda" or _only not in (None, "triton") or not _has_triton():
        return None
    measured = torch.cuda.get_device_name(device) in _FUSED_HEAD_DEVICES
    if not (measured if _fused_head is None else _fused_head):
        return None
    return importlib.import_module("fastperturb.kernels.head_gemm")


@contextlib.contextmanager
def fuse_heads(fuse: bool) -> Iterator[None]:
    """Let the heads use their fused GEMM, or not, whatever the device: for tests and benchmarks."""
    global _fused_head
    before, _fused_head = _fused_head, fuse
    try:
        yield
    finally:
        _fused_head = before


def reject_forward_mode(op: str, *inputs: Tensor | None) -> None:
    """Raise for forward-mode differentiation, which would take a registered op for a constant."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(f"{op} has no forward-mode derivative: differentiate it by backward()")


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Let an op's own accumulation dtype hold inside it, whatever autocast says outside."""
    return torch.autocast(device.type, enabled=False)
