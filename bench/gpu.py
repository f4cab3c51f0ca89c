"""`make gpu`: everything that needs CUDA, in one run, into one results.json.

The doctor's checks, the tests marked `gpu`, compute-sanitizer over the kernels, then the
benchmarks. A stage that fails is recorded and the others still run; the exit status tells.
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import harness, heads, perturb_embed, wrapper
from fastperturb import doctor, runs

TESTS = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
# Most of the tests' time is compiling kernels, which the machine's cores can share.
if importlib.util.find_spec("xdist"):
    TESTS += ["-n", "8"]
SANITIZERS = ("memcheck", "racecheck")


def run(output_dir: Path, *, overwrite: bool) -> int:
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device and a torch built for it", file=sys.stderr)
        return 2
    folder = runs.open_output_dir(output_dir, overwrite=overwrite)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "doctor": doctor.examine,
        "tests": lambda: command([*TESTS, "tests"], limit=240),
        **{f"sanitizer {tool}": lambda tool=tool: sanitize(tool) for tool in SANITIZERS},
        "benchmarks": benchmarks,
    }
    report: dict[str, Any] = {**runs.provenance(), "stages": {}}
    for name, stage in stages.items():
        begin = time.perf_counter()
        try:
            result = stage()
        except Exception as error:  # the other stages must still have their turn on the device
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.perf_counter() - begin, 1)
        report["stages"][name] = result
        print(f"{name}: {'ok' if result['ok'] else 'FAILED'} in {result['seconds']} s", flush=True)
        runs.write_json(folder / "results.json", report)
    return 0 if all(result["ok"] for result in report["stages"].values()) else 1


def command(arguments: list[str], *, limit: int) -> dict[str, Any]:
    """Run a program; its exit status and the end of what it printed."""
    environment = {**os.environ, "PYTHONPATH": "."}
    try:
        done = subprocess.run(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"took longer than {limit} s"}
    lines = done.stdout.splitlines()
    print("\n".join(lines[-15:]), flush=True)
    return {"ok": done.returncode == 0, "output": lines[-40:]}


def sanitize(tool: str) -> dict[str, Any]:
    """compute-sanitizer over the doctor's checks: every kernel once, on small inputs."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"ok": False, "error": "compute-sanitizer is not on the PATH"}
    checks = (
        "import torch; from fastperturb import doctor; from fastperturb.ops import dispatch; "
        "found = [doctor.check(op, torch.device('cuda')) for op in dispatch.OPS]; "
        "print(found); raise SystemExit(not all(each['ok'] for each in found))"
    )
    program = [sys.executable, "-c", checks]
    return command([sanitizer, "--tool", tool, "--error-exitcode", "1", *program], limit=150)


def benchmarks() -> dict[str, Any]:
    rows: list[harness.Row] = []
    device = torch.device("cuda")
    for measured in itertools.chain(
        perturb_embed.rows(device, repeats=50),
        heads.rows(device, repeats=10),
        wrapper.rows(device, repeats=5),
    ):
        harness.show(measured, baseline="naive", floor="floor")
        rows += measured
    return {"ok": True, "rows": harness.as_json(rows)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    sys.exit(run(options.output_dir, overwrite=options.overwrite))
