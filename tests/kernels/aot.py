"""Compile, without a GPU, exactly what `perturb_embed` would launch, and read the resources.

Run as a script, in a process without TRITON_INTERPRET, it prints one JSON object a launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastperturb import noise
from fastperturb.config import PerturbConfig
from fastperturb.kernels import perturb_embed
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.ops.embed import EmbedCall
from fastperturb.transforms import FAMILIES, make_transform

# Registers, threads and shared memory of one multiprocessor, and what a block reserves.
_REGISTERS, _WARPS = 65536, 64
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Device:
    """Where Triton would launch, for as long as it only compiles."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_device(self) -> int:
        return self.cc  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)


def compile_launch(kernel: Any, arguments: dict[str, Any], options: dict[str, int], cc: int) -> Any:
    """What a launch compiles, and all that it checks first."""
    driver.set_active(Device(cc))
    return kernel.run(grid=(1,), warmup=True, **arguments, **options)


def resources(compiled: Any, cc: int) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx, warps, shared = compiled.asm["ptx"], compiled.metadata.num_warps, compiled.metadata.shared
    by_registers = _REGISTERS // (math.ceil(usage["REG"] / 8) * 8 * 32 * warps)
    blocks = min(by_registers, _WARPS // warps, _SHARED[cc] // (shared + 1024))
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
        "mma": sorted(set(re.findall(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))),
    }


def call_of(family: str, dtype: torch.dtype, shape: dict[str, int]) -> EmbedCall:
    """The call with the sizes of `shape` and no memory behind them."""
    M, B, T, D = (shape[name] for name in "MBTD")
    config = PerturbConfig(transform=family, latent_dim=shape["R"], hidden_dim=shape["H"])
    stand_in = shape["R"] + shape["H"]  # for D, and neither R nor H
    small = make_transform(config, stand_in)
    sizes = {stand_in: D}
    parameters = [
        torch.empty([sizes.get(n, n) for n in value.shape], device="meta")
        for value in small.effective_parameters()
    ]
    meta = torch.device("meta")
    numbers = noise.counters(M, None, None, (B, T), antithetic=False, device=meta)
    table = torch.empty(shape.get("vocab", 32000), D, dtype=dtype, device=meta)
    ids = torch.empty(B, T, dtype=torch.int64, device=meta)
    seed = torch.empty((), dtype=torch.int64, device=meta)
    rms = torch.empty((), device=meta)
    mask = torch.empty(B, T, dtype=torch.bool, device=meta)
    law = (family, "gaussian", "token", False)
    return EmbedCall(ids, table, parameters, rms, seed, *numbers, mask, *law)


def launches(
    family: str, dtype: torch.dtype, shape: dict[str, int], want_table: bool, cc: int
) -> list:
    """(direction, kernel, arguments, options) of every launch, forward then backward."""
    recorded = []
    direction = "forward"

    def record(kernel, grid, arguments, **options):
        recorded.append((direction, kernel, arguments, options))

    launch, capability = tiles.launch, tiles.capability
    tiles.launch, tiles.capability = record, lambda device: cc // 10
    try:
        call = call_of(family, dtype, shape)
        out = perturb_embed.perturb_embed(call)
        direction = "backward"
        perturb_embed.perturb_embed_backward(torch.empty_like(out), call, want_table)
    finally:
        tiles.launch, tiles.capability = launch, capability
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--cc", nargs="+", type=int, default=[90])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--want-table", action="store_true")
    parser.add_argument("--directions", nargs="+", default=["forward", "backward"])
    parser.add_argument("--sizes", nargs="+", default=["16x64"], help="RxH")
    parser.add_argument("--dump", type=Path, help="folder for ttgir, ptx and cubin")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for family, cc, size in itertools.product(options.families, options.cc, options.sizes):
        R, H = map(int, size.split("x"))
        shape = {"M": 8, "B": 8, "T": 1024, "D": 4096, "R": R, "H": H}
        for launched in launches(family, dtype, shape, options.want_table, cc):
            direction, kernel, arguments, launch_options = launched
            if direction not in options.directions:
                continue
            compiled = compile_launch(kernel, arguments, launch_options, cc)
            name = kernel.fn.__name__
            if options.dump:
                options.dump.mkdir(exist_ok=True, parents=True)
                for kind in ("ttgir", "ptx", "cubin"):
                    data = compiled.asm[kind]
                    data = data if isinstance(data, bytes) else data.encode()
                    (options.dump / f"{family}-{name}-{cc}-{size}.{kind}").write_bytes(data)
            row = {"family": family, "direction": direction, "kernel": name, "cc": cc}
            row |= {"size": size, "tile": [arguments["BT"], arguments["BD"]]}
            print(json.dumps(row | resources(compiled, cc)), flush=True)


if __name__ == "__main__":
    main()
