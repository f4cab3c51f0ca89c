"""`make gpu`: all checks and measurements that need CUDA, stage by stage, into one results.json.

    doctor         the implementation of each op, checked against the oracle
    checks         the tests marked `gpu`, and compute-sanitizer over every kernel, side by side
    step           a training step of a 1B-class Llama, by plan and by naive code
    memory         that step's memory beside the model, at few samples and at many
    kernels        each kernel by itself, beside its prediction in docs/predictions.md
    heads, perturb_embed   the ops against naive code and the device's limits

A stage that fails is recorded, the others still run, and the exit status is 1. Measurements are
written as they come, so that an interrupted run keeps them. All stages take more than ten minutes:
the same command again runs those that have not succeeded, `make gpu STAGES="heads perturb_embed"`
runs some, and results.json keeps the stages of every call.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import harness, heads, memory, perturb_embed, wrapper
from bench.kernels import measured as kernels
from fastperturb import runs
from fastperturb.cli import doctor

Result = dict[str, Any]
Keep = Callable[[Result], None]  # writes a stage's result so far
Stage = Callable[[Path, Keep], Result]

# The files with tests marked `gpu`: the others import packages that a GPU machine need not have.
# Its torch and transformers may give warnings of their own, which fail nothing here.
TESTS = [
    "tests/test_gpu.py",
    "tests/test_gpu_capture.py",
    "tests/kernels",
    "-m",
    "gpu",
    "-q",
    "-ra",
    "-W",
    "default",
]
SHARDS = 8  # processes that share the tests; a GPU machine need not have pytest-xdist
SANITIZERS = ("memcheck", "racecheck")
SANITIZED = """
import torch
from fastperturb.cli import doctor

checks = doctor.checks(torch.device("cuda"))
print(*checks, sep="\\n")
raise SystemExit(not all(check["ok"] for check in checks))
"""
# Seconds for the checks, which run side by side, and for a program to end when asked to. A device
# that is lent for ten minutes a command has time for this stage.
LIMIT, GRACE = 540.0, 10.0


def run(output_dir: Path, *, overwrite: bool, stages: Sequence[str] | None) -> int:
    """Run the stages, by default those without success in the folder; return the exit status."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device and a torch built for it", file=sys.stderr)
        return 2
    report = open_report(output_dir, overwrite=overwrite)
    results: dict[str, Result] = report["stages"]
    if stages is None:
        stages = [name for name in STAGES if not results.get(name, {}).get("ok")]
    if not stages:
        print(f"all stages in {output_dir} succeeded: name some, or pass --overwrite")
    for name in stages:

        def keep(result: Result, name: str = name) -> None:
            results[name] = result
            runs.write_json(output_dir / "results.json", report)

        begin = time.perf_counter()
        keep({"ok": False, "error": "cut off"})
        try:
            result = STAGES[name](output_dir, keep)
        except Exception as error:  # the other stages must still run on the device
            reason = f"{type(error).__name__}: {error}"
            result = {**results[name], "ok": False, "error": reason}
        result["seconds"] = round(time.perf_counter() - begin, 1)
        keep(result)
        verdict = "ok" if result["ok"] else f"FAILED {result.get('error', '')}"
        print(f"{name}: {verdict} in {result['seconds']} s", flush=True)
    return 0 if all(results[name]["ok"] for name in stages) else 1


def open_report(folder: Path, *, overwrite: bool) -> dict[str, Any]:
    """Return the report in the folder to add stages to, or a new one; raise for another run's."""
    report = {**runs.provenance(), "stages": {}}
    file = folder / "results.json"
    if overwrite or not file.exists():
        runs.open_output_dir(folder, overwrite=overwrite)
        return report
    earlier: dict[str, Any] = json.loads(file.read_text())
    differing = [key for key in report if key != "stages" and earlier.get(key) != report[key]]
    if differing or "stages" not in earlier:
        raise FileExistsError(
            f"output_dir {folder} holds the results of another {', '.join(differing) or 'command'}"
            ": name another, or pass --overwrite"
        )
    return earlier


def examine(folder: Path, keep: Keep) -> Result:
    return doctor.examine()


def check(folder: Path, keep: Keep) -> Result:
    """Run the tests and sanitizers at once: they wait for compilers more than for the device."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    programs = {
        f"tests{shard}": [*tests, "--shard", f"{shard}/{SHARDS}"] for shard in range(SHARDS)
    }
    for tool in SANITIZERS:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        programs[tool] = [*sanitizer, sys.executable, "-c", SANITIZED]
    results = side_by_side(programs, folder, limit=LIMIT)
    # racecheck takes lanes that store the same value, as Triton's reductions do, for a race: read
    # its log.
    ok = all(result["ok"] for name, result in results.items() if name != "racecheck")
    return {"ok": ok, **results}


def side_by_side(
    programs: dict[str, list[str]], folder: Path, *, limit: float
) -> dict[str, Result]:
    """Run programs at once, each with its output in a log; return success and last lines of each.

    All that they started has ended on return, also of those that took longer than `limit` seconds.
    """
    logs = {name: folder / f"{name}.log" for name in programs}
    results: dict[str, Result] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    deadline = time.monotonic() + limit
    try:
        for name, arguments in programs.items():
            logs[name].write_bytes(b"")
            if shutil.which(arguments[0]) is None:
                results[name] = {"ok": False, "error": f"{arguments[0]} is not on the PATH"}
            else:
                running[name] = _start(arguments, logs[name])
        for name, process in running.items():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
                results[name] = {"ok": code == 0}
            except subprocess.TimeoutExpired:
                results[name] = {"ok": False, "error": f"took longer than {limit:g} s"}
    finally:
        _end(list(running.values()))
    for name, log in logs.items():
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join([f"{name}:", *lines[-15:]]), flush=True)
        results[name]["output"] = lines[-40:]
    return results


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": ".",
        "PYTHONUNBUFFERED": "1",  # so that a log is whole when its program is killed
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // SHARDS)),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # older versions of torch ask for it in some tests
    }
    if arguments[0] == "compute-sanitizer":
        # In torch's pool of memory a read beyond a tensor's end lands in another allocation.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("wb") as file:
        return subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, process_group=0
        )


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End programs with all their children: ask those that still run, then kill every group."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    # A group lives on, and keeps its number, while any of its processes does.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


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
    "kernels": benchmark(kernels.rows, repeats=20),
    "heads": benchmark(heads.rows, repeats=10),
    "perturb_embed": benchmark(perturb_embed.rows, repeats=50),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--overwrite", action="store_true", help="Start a new results.json.")
    parser.add_argument("--stages", nargs="+", choices=STAGES)
    options = parser.parse_args()
    # An exception, so that the programs of a stage end with this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return run(options.output_dir, overwrite=options.overwrite, stages=options.stages)


if __name__ == "__main__":
    sys.exit(main())
