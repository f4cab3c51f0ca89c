"""`python -m bench.kernels`: predict the time of every kernel on a Hopper GPU, without a GPU.

Every launch of the calls in `bench.kernels.calls` is compiled for sm_90, as it would be launched.
docs/predictions.md shows the result. The assembler, and so the registers, are those of the Triton
that is installed.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton

from bench import ahead_of_time
from bench.compact import compact
from bench.kernels import calls, costs
from bench.kernels.costs import BANDWIDTHS, Cost
from fastperturb import runs

CAPABILITY = 90
NARROWER = 2048
RESOURCES = ("registers", "stack", "shared", "warps", "blocks_per_sm")


def predictions() -> dict[str, Any]:
    device, sizes = torch.device("meta"), calls.Sizes()
    narrower = dataclasses.replace(sizes, D=NARROWER)  # fewer flops, as many logits
    kernels, totals = [], []
    for case in calls.Calls(device, sizes).cases():
        rows, call = predicted(case)
        kernels += rows
        totals.append(call)
    for case in calls.Calls(device, narrower).head_cases():
        totals.append(predicted(case)[1] | {"call": f"{case.name}, D = {NARROWER}"})
    return {
        **runs.provenance(),
        "device": f"predicted for sm_{CAPABILITY}, {costs.MULTIPROCESSORS} multiprocessors",
        "bandwidths": BANDWIDTHS,
        "kernels": kernels,
        "calls": totals,
    }


def predicted(case: calls.Case) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a call's kernels, and that of the call."""
    with ahead_of_time.recorded(CAPABILITY) as launches, costs.TorchCosts() as torchs:
        case.run()
    rows = [row(case, group) for group in ahead_of_time.by_kernel(launches).values()]
    print(f"{case.op}: {case.name}", file=sys.stderr)
    return rows, total(case, launches, rows, torchs)


def row(case: calls.Case, launches: list[ahead_of_time.Launch]) -> dict[str, Any]:
    """Return the cost of all launches of one kernel in a call; its code is that of the first."""
    begin = time.perf_counter()
    compiled_kernel = ahead_of_time.compile_launch(launches[0], CAPABILITY)
    seconds = time.perf_counter() - begin
    cost = sum((costs.of_launch(launched, compiled_kernel) for launched in launches), Cost())
    resources = ahead_of_time.resources(compiled_kernel, CAPABILITY)
    return {
        "op": case.op,
        "call": case.name,
        "kernel": launches[0].kernel.fn.__name__,
        "launches": len(launches),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "instructions": cost.instructions,
        "milliseconds": [cost.milliseconds(bandwidth) for bandwidth in BANDWIDTHS],
        "limit": cost.limit,
        "compile_seconds": seconds,
        **{name: resources[name] for name in RESOURCES},
    }


def total(
    case: calls.Case,
    launches: list[ahead_of_time.Launch],
    rows: list[dict[str, Any]],
    torchs: costs.TorchCosts,
) -> dict[str, Any]:
    """Return the launches and the time of a whole call, torch's own kernels included."""

    def milliseconds(parts: list[Cost]) -> list[float]:
        return [sum(cost.milliseconds(bandwidth) for cost in parts) for bandwidth in BANDWIDTHS]

    ours = [sum(times) for times in zip(*(row["milliseconds"] for row in rows), strict=True)]
    products, others = milliseconds(torchs.products), milliseconds(torchs.others)
    return {
        "op": case.op,
        "call": case.name,
        "launches": sum(row["launches"] for row in rows),
        "products": len(torchs.products),
        "other_launches": len(torchs.others),
        # All products at torch's speed, also those inside our kernels: the least that can be.
        "floor": products[0] + 1e3 * sum(map(costs.head_gemm_flops, launches)) / costs.FLOPS,
        "milliseconds": {"kernels": ours, "products": products, "others": others},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results/kernels_predicted.json"))
    options = parser.parse_args()
    # An empty cache, so that compile times are those of a first call.
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        results = predictions()
    options.output.write_text(compact(json.loads(json.dumps(results))), encoding="utf-8")


if __name__ == "__main__":
    main()
