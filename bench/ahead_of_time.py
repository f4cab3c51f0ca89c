"""Kernels compiled without a GPU, exactly as a call would launch them, and the resources they take.

A test of resources runs its own file as a script, by `compiled`: this process may have Triton's
interpreter loaded, which cannot compile. The script finds the launches of a call by `recorded`,
compiles them and prints one JSON object for each.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastperturb.kernels import launch

CAPABILITIES = (80, 90, 100)
# Registers, threads and shared memory of one multiprocessor, and what a block reserves.
_REGISTERS, _WARPS, _RESERVED = 65536, 64, 1024
# The assembler of Triton 3.6 spills up to this many bytes where that of 3.7 spills none.
_ASSEMBLER_SPILLS = {80: 24, 90: 0, 100: 24} if triton.__version__ < "3.7" else {}
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def compiled(script: str, *options: str) -> list[dict[str, Any]]:
    """The JSON objects that a script prints, one a line."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, script, *options],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(*rows, sep="\n")
    assert rows
    return rows


def assert_fits(rows: list[dict[str, Any]], *, warps_per_sm: int, stack: int = 0) -> None:
    """Each kernel keeps to its registers, and so many warps share a multiprocessor."""
    for row in rows:
        allowed = stack + _ASSEMBLER_SPILLS.get(row["cc"], 0)
        assert row["stack"] <= allowed and row["local"] == 0, row
        assert row["blocks_per_sm"] * row["warps"] >= warps_per_sm, row


@contextlib.contextmanager
def recorded(cc: int) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, as for a device of compute capability cc."""
    capability = launch.capability
    launch.capability = lambda device: cc // 10
    try:
        with observed(make=False) as launches:
            yield launches
    finally:
        launch.capability = capability


@contextlib.contextmanager
def observed(*, make: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches of a call; make them too, unless told not to."""
    launches: list[Launch] = []
    start = launch.start

    def observe(kernel: Any, grid: Any, arguments: dict[str, Any], **options: int) -> None:
        if all(grid):
            launches.append(Launch(kernel, grid, arguments, options))
        if make:
            start(kernel, grid, arguments, **options)

    launch.start = observe
    try:
        yield launches
    finally:
        launch.start = start


def by_kernel(launches: list[Launch]) -> dict[str, list[Launch]]:
    groups: dict[str, list[Launch]] = {}
    for launched in launches:
        groups.setdefault(launched.kernel.fn.__name__, []).append(launched)
    return groups


class _Device:
    """The device of Triton's launches, for as long as it only compiles."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_device(self) -> int:
        return self.cc  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)


def compile_launch(launched: Launch, cc: int) -> Any:
    """Make all checks of a launch and compile its kernel."""
    driver.set_active(_Device(cc))
    return launched.kernel.run(grid=(1,), warmup=True, **launched.arguments, **launched.options)


def dumped(cubin: bytes, option: str) -> str:
    """Return what Triton's cuobjdump prints of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def resources(compiled_kernel: Any, cc: int) -> dict[str, Any]:
    text = dumped(compiled_kernel.asm["cubin"], "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx, metadata = compiled_kernel.asm["ptx"], compiled_kernel.metadata
    warps, shared = metadata.num_warps, metadata.shared
    by_registers = _REGISTERS // (math.ceil(usage["REG"] / 8) * 8 * 32 * warps)
    blocks = min(by_registers, _WARPS // warps, _SHARED[cc] // (shared + _RESERVED))
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": shared,
        "warps": warps,
        "blocks_per_sm": blocks,
        "occupancy": blocks * warps / _WARPS,
        "wide_loads": len(re.findall(r"ld\.global[^;]*\.v4\.b32", ptx))
        + len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        "wide_stores": len(re.findall(r"st\.global[^;]*\.v4\.b32", ptx)),
        "narrow_stores": len(re.findall(r"st\.global[^;]*\.b16", ptx)),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor[^;]*shared::\w+\.global", ptx)),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor[^;]*global\.shared::cta", ptx)),
        "waits": [int(count) for count in re.findall(r"wgmma\.wait_group\D*(\d+)", ptx)],
        "mma": sorted(set(re.findall(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))),
    }


def print_resources(launched: Launch, cc: int, **about: Any) -> Any:
    """Compile a launch, print its resources as one JSON object, and return the compiled kernel."""
    compiled_kernel = compile_launch(launched, cc)
    row = {**about, "kernel": launched.kernel.fn.__name__, "cc": cc}
    print(json.dumps(row | resources(compiled_kernel, cc)), flush=True)
    return compiled_kernel
