"""Which implementation of an op runs: one choice, by device and availability.

An implementation is a module: for perturb_embed, one with the functions that `embed` calls; for
the heads, one with the row passes that `head_blocks` calls between its GEMMs; for combine, one
with the function of that name.
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

_TRITON = {
    "perturb_embed": "fastperturb.kernels.perturb_embed",
    "linear_logprob": "fastperturb.kernels.head_rows",
    "linear_quadratic": "fastperturb.kernels.head_rows",
    "combine": "fastperturb.kernels.combine",
}
_CPP = {
    "perturb_embed": "fastperturb.ops.cpp.embed",
    "linear_logprob": "fastperturb.ops.cpp.rows",
    "linear_quadratic": "fastperturb.ops.cpp.rows",
    "combine": "fastperturb.ops.cpp.combine",
}
_TORCH = {
    "perturb_embed": "fastperturb.ops.torch.embed",
    "linear_logprob": "fastperturb.ops.torch.rows",
    "linear_quadratic": "fastperturb.ops.torch.rows",
    "combine": "fastperturb.ops.torch.combine",
}
OPS = tuple(_TORCH)

_only: str | None = None


@dataclass(frozen=True)
class Candidate:
    """An implementation of one op, and why it can or cannot run on a device."""

    name: str
    usable: bool
    reason: str
    module: str | None = None  # None where it could never run


def explain(op: str, device: torch.device) -> list[Candidate]:
    """Every implementation of `op` in order of preference; the first usable one runs."""
    if op not in OPS:
        raise ValueError(f"op must be one of {OPS}, got {op!r}")
    return [
        _triton(op, device),
        _cpp(op, device),
        Candidate("torch", True, "runs on every device", _TORCH[op]),
    ]


def _triton(op: str, device: torch.device) -> Candidate:
    if op not in _TRITON:
        return Candidate("triton", False, "this version has no Triton kernel for it")
    if device.type != "cuda":
        return Candidate("triton", False, "runs on CUDA devices only")
    if not _has_triton():
        return Candidate("triton", False, "triton is not installed")
    return Candidate("triton", True, "fused on the GPU", _TRITON[op])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _cpp(op: str, device: torch.device) -> Candidate:
    if op not in _CPP:
        return Candidate("cpp", False, "this version has no C++ kernel for it")
    if device.type != "cpu":
        return Candidate("cpp", False, "runs on CPUs only")
    return Candidate("cpp", *build.availability(), _CPP[op])


def implementation(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that runs `op` on tensors of this dtype; fp64 is for proofs, and torch's."""
    only = "torch" if dtype == torch.float64 else _only
    candidates = [each for each in explain(op, device) if only in (None, each.name)]
    for candidate in candidates:
        if candidate.module is None:
            continue
        # The C++ kernels are built on their first use, which may warn or raise.
        usable = build.prepare() if candidate.name == "cpp" else candidate.usable
        if usable:
            return importlib.import_module(candidate.module)
    reasons = "; ".join(f"{each.name}: {each.reason}" for each in candidates)
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


def refuse_tangents(op: str, *inputs: Tensor | None) -> None:
    """To forward-mode differentiation a registered op would pass for a constant."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(f"{op} has no forward-mode derivative: differentiate it by backward()")


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside an op its own accumulation dtype holds, whatever autocast says outside."""
    return torch.autocast(device.type, enabled=False)
