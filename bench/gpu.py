"""`make gpu`: all checks and measurements that need CUDA, stage by stage, into one results.json.

    doctor         the implementation of each op, checked against the oracle
    checks         the tests marked `gpu`, and compute-sanitizer over every kernel, side by side
    step           a training step of a 1B-class Llama, by plan and by naive code
    memory         that step's memory beside the model, at few samples and at many
    heads, perturb_embed   the ops against naive code and the device's limits

A stage that fails is recorded, the others still run, and the exit status is 1. Measurements are
written as they come, so that an interrupted run keeps them. All stages take more than ten minutes;
`make gpu STAGES="heads perturb_embed"` runs some.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import harness, heads, memory, perturb_embed, wrapper
from fastperturb import runs
from fastperturb.cli import doctor

Result = dict[str, Any]
Keep = Callable[[Result], None]  # writes a stage's result so far
Stage = Callable[[Path, Keep], Result]

# The files with tests marked `gpu`: the others import packages that a GPU machine need not have.
# Its torch and transformers may give warnings of their own, which fail nothing here.
TESTS = ["tests/test_gpu.py", "tests/kernels", "-m", "gpu", "-q", "-W", "default"]
SANITIZERS = ("memcheck", "racecheck")
SANITIZED = """
import torch
from fastperturb.cli import doctor
from fastperturb.ops import dispatch

checks = [doctor.check(op, torch.device("cuda")) for op in dispatch.OPS]
print(*checks, sep="\\n")
raise SystemExit(not all(check["ok"] for check in checks))
"""
LIMIT = 300  # seconds for each check


def run(output_dir: Path, *, overwrite: bool, stages: list[str]) -> int:
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device and a torch built for it", file=sys.stderr)
        return 2
    folder = runs.open_output_dir(output_dir, overwrite=overwrite)
    results: dict[str, Result] = {}
    report = {**runs.provenance(), "stages": results}
    for name in stages:

        def keep(result: Result, name: str = name) -> None:
            results[name] = result
            runs.write_json(folder / "results.json", report)

        begin = time.perf_counter()
        try:
            result = STAGES[name](folder, keep)
        except Exception as error:  # the other stages must still run on the device
            reason = f"{type(error).__name__}: {error}"
            result = {**results.get(name, {}), "ok": False, "error": reason}
        result["seconds"] = round(time.perf_counter() - begin, 1)
        keep(result)
        verdict = "ok" if result["ok"] else f"FAILED {result.get('error', '')}"
        print(f"{name}: {verdict} in {result['seconds']} s", flush=True)
    return 0 if all(result["ok"] for result in results.values()) else 1


def examine(folder: Path, keep: Keep) -> Result:
    return doctor.examine()


def check(folder: Path, keep: Keep) -> Result:
    """Run the tests and sanitizers at once: they wait for compilers more than for the device."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    if importlib.util.find_spec("xdist"):
        tests += [
            "-n",
            "8",
            "--dist",
            "worksteal",
        ]  # neighbours take equally long, and some take minutes
    commands = {"tests": tests}
    for tool in SANITIZERS:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        commands[tool] = [*sanitizer, sys.executable, "-c", SANITIZED]
    logs = [folder / f"{name}.log" for name in commands]
    with ThreadPoolExecutor() as pool:
        results = dict(zip(commands, pool.map(command, commands.values(), logs), strict=True))
    # racecheck takes lanes that store the same value, as Triton's reductions do, for a race: read
    # its log.
    return {"ok": results["tests"]["ok"] and results["memcheck"]["ok"], **results}


def command(arguments: list[str], log: Path) -> Result:
    """Run a program with its output in `log`; return whether it succeeded and its last lines."""
    if shutil.which(arguments[0]) is None:
        return {"ok": False, "error": f"{arguments[0]} is not on the PATH"}
    environment = {**os.environ, "PYTHONPATH": "."}
    if arguments[0] == "compute-sanitizer":
        # In torch's pool of memory a read beyond a tensor's end lands in another allocation.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                arguments, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT, env=environment
            )
            result: Result = {"ok": done.returncode == 0}
        except subprocess.TimeoutExpired:
            result = {"ok": False, "error": f"took longer than {LIMIT} s"}
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join([f"{log.stem}:", *lines[-15:]]), flush=True)
    return {**result, "output": lines[-40:]}


def benchmark(measure: Callable[..., Iterator[list[harness.Row]]], *, repeats: int) -> Stage:
    def stage(folder: Path, keep: Keep) -> Result:
        rows: list[Result] = []
        for measured in measure(torch.device("cuda"), repeats=repeats):
            harness.show(measured)
            sys.stdout.flush()
            rows += harness.as_json(measured)
            keep({"ok": False, "error": "cut off", "rows": rows})
        return {"ok": True, "rows": rows}

    return stage


def grow(folder: Path, keep: Keep) -> Result:
    growth: list[Result] = []
    for row in memory.growth(torch.device("cuda")):
        print(row, flush=True)
        growth.append(row)
        keep({"ok": False, "error": "cut off", "growth": growth})
    return {"ok": True, "growth": growth}


STAGES: dict[str, Stage] = {
    "doctor": examine,
    "checks": check,
    "step": benchmark(wrapper.rows, repeats=5),
    "memory": grow,
    "heads": benchmark(heads.rows, repeats=10),
    "perturb_embed": benchmark(perturb_embed.rows, repeats=50),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    sys.exit(run(options.output_dir, overwrite=options.overwrite, stages=options.stages))
