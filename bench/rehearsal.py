"""`python -m bench.rehearsal`: all of `make gpu` without a GPU, to find what would fail there.

The CPU stands in for the card: everything of torch.cuda is faked here, devices named "cuda" are the
CPU, sizes are tiny, and packages that a GPU machine need not have cannot be imported.

    stages   every stage of bench.gpu; benchmarks of ops take the Triton kernels' interpreter
    tests    the bodies of the tests marked `gpu`, on torch's implementations
    kernels  the kernels' own tests in the interpreter

--short runs the stages alone, in half a minute: torch takes the place of Triton, and a few tests
run in theirs.

A typo, a wrong argument, a missing import or a changed signature shows here. What only a card can
show does not: its compilers, its results, its speed. NOT_REHEARSED names tests that need one.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What a machine with torch, triton, transformers, peft, accelerate and pytest need not have.
MISSING = (
    *("tyro", "rich", "datasets", "matplotlib", "scipy", "rouge_score", "hypothesis", "xdist"),
    *(
        "lightning",
        "trl",
        "liger_kernel",
        "cut_cross_entropy",
        "flash_attn",
        "tensorboard",
        "wandb",
    ),
)
# Names of tests, and what they need that a CPU has not.
_MORE_THAN_TORCH = "the kernels, whose promises are not torch's"
NOT_REHEARSED = {
    "test_attention_over_all_samples_takes_the_flash_kernel": "the card's attention kernels",
    "test_memory_does_not_grow_with_the_samples": "the card's allocator",
    "test_an_out_of_range_target_gives_nan_and_no_error": "a device that must not be waited for",
    "test_under_autocast_the_heads_multiply_in_16_bits_and_return_fp32": "products in 16 bits",
    "test_rows_without_upstream_gradients_give_zeros_whatever_their_logits": _MORE_THAN_TORCH,
    "test_fp32_heads_have_the_error_of_fp32_where_the_model_may_use_tf32": "TF32",
    "test_under_autocast_one_cast_serves_many_calls_and_the_gradient_is_fp32": "CUDA's autocast",
    "test_a_projection_made_again_gives_the_same_gradients": _MORE_THAN_TORCH,
    "test_an_fp64_table_is_rejected_by_name": _MORE_THAN_TORCH,
    "test_an_id_out_of_range_gives_nan_and_its_gradient_to_no_row": _MORE_THAN_TORCH,
    "test_the_jackknife_gives_all_impossible_samples_the_same_negative_weight": _MORE_THAN_TORCH,
}
INTERPRETER_ONLY = ("tests/kernels/test_noise.py",)  # kernels of the tests' own
CARD_ONLY = ("tests/test_gpu_capture.py",)  # graphs, streams and what waits for them
# One test or two of each kind, for pytest's -k.
SHORT = "philox or frequent or (wrapped and auto) or temperature or doctor"
GIB = 2**30


class _CpuForCuda(TorchFunctionMode):
    """Sends whatever is made on, or moved to, a CUDA device to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.device:  # keeps its name, by which benchmarks choose their sizes
            return func(*args, **(kwargs or {}))
        args = tuple(map(_on_cpu, args))
        return func(*args, **{key: _on_cpu(value) for key, value in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "_Event") -> float:
        assert self.enable_timing and end.enable_timing
        return 1e3 * (end.time - self.time) or 1e-3


class _Stream:
    def wait_stream(self, stream: "_Stream") -> None: ...

    def synchronize(self) -> None: ...


class _Graph:
    def replay(self) -> None: ...


def _sleep(cycles: int) -> None:
    assert isinstance(cycles, int) and 0 < cycles < 2**40


PROPERTIES = SimpleNamespace(
    name="a CPU in place of a card",
    major=9,
    minor=0,
    total_memory=80 * GIB,
    L2_cache_size=2**20,
    multi_processor_count=132,
)
FAKES: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: GIB,
    "max_memory_allocated": lambda device=None: 2 * GIB,
    "mem_get_info": lambda device=None: (8 * GIB, 80 * GIB),  # too little for the largest tests
    "Event": _Event,
    "Stream": _Stream,
    "CUDAGraph": _Graph,
    "current_stream": lambda device=None: _Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "graph": lambda graph, stream=None: contextlib.nullcontext(),
    "device_of": lambda tensor: contextlib.nullcontext(),
    "_sleep": _sleep,
}


def install() -> None:
    """Put the CPU in the place of a card for the rest of this process."""
    for name, fake in FAKES.items():
        assert hasattr(torch.cuda, name), f"torch.cuda.{name} is gone"
        setattr(torch.cuda, name, fake)
    torch.backends.cuda.can_use_flash_attention = lambda params, debug=False: True
    autocast, which = torch.autocast, shutil.which
    torch.autocast = lambda device_type, *a, **o: autocast(_on_cpu(device_type), *a, **o)
    torch.compile = lambda function, **options: function  # its compiler makes code for a card
    shutil.which = lambda cmd, *a, **o: cmd if cmd == "compute-sanitizer" else which(cmd, *a, **o)
    _CpuForCuda().__enter__()
    _hide_missing()


def _hide_missing() -> None:
    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname.split(".")[0] in MISSING:
                return None
            return super().find_spec(fullname, path, target)

    index = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[index] = Finder


def stages(folder: Path, *, short: bool) -> int:
    """Run every stage of `make gpu`; return its exit status."""
    from bench import gpu, heads, memory, perturb_embed, wrapper
    from bench.kernels import measured
    from bench.kernels.calls import Sizes

    def start(arguments: list[str], log: Path) -> Any:
        if arguments[0] == "compute-sanitizer":
            arguments = [*arguments[arguments.index(sys.executable) : -1], _FAKED + arguments[-1]]
        else:  # another part of the rehearsal runs all of the tests
            some = ["-k", SHORT] if short else ["--collect-only"]
            arguments = [*arguments, "-p", "bench.rehearsal", *some]
        return real_start(arguments, log)

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    real_start, gpu._start = gpu._start, start
    gpu.SHARDS = 1
    if short:
        gpu.SANITIZERS = gpu.SANITIZERS[:1]
        gpu.TESTS.remove("tests/kernels")
    # The interpreter multiplies bf16 as if it were integers.
    heads.GPU_CASES = _small(heads.GPU_CASES, rows=128, D=32, V=300, dtype="float16")
    sizes = {"M": 2, "B": 1, "T": 5, "D": 32, "R": 4, "dtype": "float16"}
    perturb_embed.GPU_CASES = _small(perturb_embed.GPU_CASES, **sizes)
    wrapper.GPU_CASES = _small(wrapper.GPU_CASES, layers=1, D=512, V=300, M=4, B=1, T=8)
    memory.SAMPLES["cuda"] = (2, 4)
    measured.SIZES = Sizes(M=2, B=2, T=20, D=64, V=300, R=4, H=16, dtype=torch.float16)
    if short:  # there is no interpreter to launch kernels
        del gpu.STAGES["kernels"]
    gpu.STAGES["step"] = gpu.benchmark(wrapper.rows, repeats=2)
    for name, module in {"heads": heads, "perturb_embed": perturb_embed}.items():
        stage = gpu.benchmark(module.rows, repeats=2)
        gpu.STAGES[name] = _with_triton_on_a_cpu(stage, by="torch" if short else "triton")
    return gpu.run(folder, overwrite=True, stages=None)


_FAKED = """
from bench import rehearsal
rehearsal.install()
"""


def _with_triton_on_a_cpu(stage: Any, *, by: str) -> Any:
    """Run a stage with a candidate called triton that runs here."""
    from fastperturb.ops import dispatch

    def triton(op: str, device: torch.device) -> Any:
        return dispatch.Candidate("triton", True, "in rehearsal", dispatch._MODULES[by][op])

    def run(*arguments: Any) -> Any:
        before, dispatch._triton = dispatch._triton, triton
        try:
            return stage(*arguments)
        finally:
            dispatch._triton = before

    return run


def _small(cases: tuple[Any, ...], **sizes: Any) -> tuple[Any, ...]:
    return tuple(dataclasses.replace(case, **sizes) for case in cases)


# As a plugin of pytest (-p bench.rehearsal).


def pytest_configure(config: Any) -> None:
    """Fake the card before the tests are imported; run their kernels by torch."""
    install()
    if os.environ.get("TRITON_INTERPRET") != "1":
        _torch_for_kernels()


def _torch_for_kernels() -> None:
    """Put torch's functions in the place of those that launch kernels; skip the tests of others."""
    import pytest

    from fastperturb.kernels import launch
    from fastperturb.ops import dispatch

    def start(kernel: Any, *arguments: Any, **options: Any) -> None:
        pytest.skip(f"not rehearsed here, but by the interpreter: it launches {kernel}")

    launch.start = start
    for op in dispatch.OPS:
        kernels, functions = (
            importlib.import_module(dispatch._MODULES[name][op]) for name in ("triton", "torch")
        )
        for name, function in vars(functions).items():
            if getattr(function, "__module__", None) == functions.__name__ and name[0] != "_":
                assert hasattr(kernels, name), f"{kernels.__name__} has no {name}"
                setattr(kernels, name, function)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import pytest

    for item in items:
        reason = NOT_REHEARSED.get(getattr(item, "originalname", item.name))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not rehearsed: it needs {reason}"))


def part_in_a_process(part: str, folder: Path) -> int:
    """Run a part in a process of its own: Triton chooses its interpreter when it is imported."""
    from bench import gpu

    module, options = "pytest", ["-p", "bench.rehearsal", "-p", "no:cacheprovider"]
    if part == "stages":
        module, options = "bench.rehearsal", ["--part", part, "--output-dir", str(folder)]
    elif part == "tests":
        options += [
            *(test for test in gpu.TESTS if test not in CARD_ONLY),
            *(f"--ignore={file}" for file in INTERPRETER_ONLY),
        ]
    else:
        options += ["tests/kernels", "-q", "-m", "not gpu and not slow", "-W", "default"]
        options += ["--ignore=tests/kernels/test_interpreter.py"]
    environment = {
        **os.environ,
        "PYTHONPATH": ".",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TRITON_INTERPRET": str(int(part != "tests")),
    }
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, env=environment).returncode


PARTS = ("stages", "tests", "kernels")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short or options.part:
        install()
        return stages(options.output_dir, short=options.short)
    failed = [part for part in options.parts if part_in_a_process(part, options.output_dir) != 0]
    print(f"failures in the rehearsal: {len(failed)} {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
