"""`python -m bench.memory`: how much a training step's memory grows with the samples, by plan.

On a CPU, the most resident memory above the model, each step in a fresh process whose allocator
gives memory back (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 65536: otherwise most of a
reading is the heap's fragmentation). On a GPU, the allocator's peak above the model.
"""

import argparse
import contextlib
import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import wrapper
from fastperturb import PerturbConfig, runs, wrap

PLANS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"chunk_size": 2},
    "resample": {"backward_samples": 2},
}
SAMPLES = {"cpu": (4, 32), "cuda": (4, 64)}


def growth(device: torch.device) -> Iterator[dict[str, Any]]:
    """Each plan's peak in MiB at few and at many samples, None if it does not fit; their ratio."""
    for plan in PLANS:
        few, many = (_peak(plan, samples, device) for samples in SAMPLES[device.type])
        yield {
            "plan": plan,
            "extra_mib": dict(zip(map(str, SAMPLES[device.type]), (few, many), strict=True)),
            "ratio": round(many / few, 3) if few and many else None,
        }


def _peak(plan: str, samples: int, device: torch.device) -> float | None:
    if device.type != "cuda":
        return round(_in_fresh_process(plan, samples), 1)
    peak = None
    with contextlib.suppress(torch.OutOfMemoryError):
        peak = round(extra_mib(plan, samples, device), 1)
    gc.collect()  # the model, and what a step that failed still held
    torch.cuda.empty_cache()
    return peak


def _in_fresh_process(plan: str, samples: int) -> float:
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--one", plan, str(samples)],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{plan} at {samples} samples failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def extra_mib(plan: str, samples: int, device: torch.device) -> float:
    """The peak of a step above what was held before it; a small one first loads what it needs."""
    cases = wrapper.GPU_CASES if device.type == "cuda" else wrapper.CPU_CASES
    case = dataclasses.replace(cases[0], M=samples)
    base = wrapper.model_of(case, device)
    lm = wrap(base, PerturbConfig(num_samples=samples, plan=plan, **PLANS[plan]))
    ids = torch.randint(case.V, (case.B, case.T), device=device)

    def step(ids: torch.Tensor) -> None:
        lm(input_ids=ids, labels=ids, seed=5).loss.backward()

    step(ids[:1, :8])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(ids)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status("VmRSS")
    step(ids)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("PLAN", "SAMPLES"), help=argparse.SUPPRESS)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/memory"))
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.one:
        print(extra_mib(options.one[0], int(options.one[1]), device))
    else:
        folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
        rows = []
        for row in growth(device):
            rows.append(row)
            print(f"{row['plan']:10}{row['extra_mib']}  ratio {row['ratio']}")
        runs.write_json(folder / "results.json", {**runs.provenance(), "growth": rows})
