"""Versions, device and commit: what a number needs beside it to be repeatable."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperturb.version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("triton", "transformers", "peft", "accelerate", "safetensors", "numpy")


def provenance() -> dict[str, Any]:
    """Versions, device and commit: what a number needs beside it to be repeatable."""
    return {"versions": versions(), "device": device(), "commit": commit()}


def versions() -> dict[str, str]:
    import torch

    found = {
        "fastperturb": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # names its build, which the package's metadata may not
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def torch_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU where there is one."""
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def device() -> str:
    """The device that work runs on by default, in words."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        name = torch.cuda.get_device_name(0)
        return name if count == 1 else f"{count} x {name}"
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown CPU"


def cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def commit() -> str | None:
    """The commit of the checkout this package runs from, or None outside of one."""
    root = Path(__file__).resolve().parents[2]
    # A package installed inside somebody else's repository must not report their commit.
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpuinfo(field: str) -> str:
    """The first processor's entry in /proc/cpuinfo, empty where there is none."""
    if sys.platform != "linux":
        return ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
