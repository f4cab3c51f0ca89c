"""`fastperturb doctor`: the implementation of every op on this machine, and its errors."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastperturb import ops, runs
from fastperturb.config import MARGINALS, PerturbConfig
from fastperturb.ops import dispatch, reference
from fastperturb.ops.combine import COMBINABLE
from fastperturb.ops.cpp import build
from fastperturb.transforms import FAMILIES, make_transform

# The largest error over the largest true value. fp32 against fp64 on sums of a few hundred terms:
# rounding stays far below, a bug far above. 16-bit results are rounded once (2^-8 in bf16, 2^-11 in
# fp16), and so are the numbers that go into a GPU's second GEMM of a head.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# The instruction sets that a CPU kernel may be compiled for.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")

# Attention implementations of transformers: the module that each needs.
ATTENTION = {
    "sdpa": "torch",
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}

# The number of query heads and of key heads.
HEADS = {"equal heads": (8, 8), "grouped heads": (8, 2)}


@dataclass(frozen=True)
class DoctorOptions:
    """Report which implementation of every op runs on this machine, and check its results."""

    json: bool = False
    """Print the report as one JSON object instead of tables."""

    output_dir: Path | None = None
    """Folder to write the report to, as results.json; default: print it only."""

    overwrite: bool = False
    """Allow an output_dir that already holds files, and replace its results.json."""


def run(options: DoctorOptions) -> int:
    """Run `fastperturb doctor`; the exit status is 1 if an op is wrong."""
    folder = None
    if options.output_dir is not None:
        folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    report = examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console  # here, so that `examine` needs torch alone

        show(report, Console())
    if folder is not None:
        runs.write_json(folder / "results.json", report)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Return the report: versions, devices, implementations and checks, as JSON holds them."""
    devices = present_devices()
    checked = [entry for device in devices for entry in checks(device)]
    return {
        **runs.provenance(),
        "devices": [describe(device) for device in devices],
        "compiler": compiler(),
        "extension": os.environ.get("FASTPERTURB_EXT"),
        "attention": {
            name: importlib.util.find_spec(module) is not None for name, module in ATTENTION.items()
        },
        "ops": [choice(op, device) for device in devices for op in dispatch.OPS],
        "checks": checked,
        "ok": all(entry["ok"] for entry in checked),
    }


def present_devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {
            "device": "cpu",
            "name": runs.cpu_model(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "flags": [flag for flag in FLAGS if flag in runs.cpu_flags()],
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "sdpa": sdpa_kernel(device),
    }


def sdpa_kernel(device: torch.device) -> str:
    """Describe when torch's attention takes its flash kernel for the samples of a batch."""
    without_flash = [name for name, heads in HEADS.items() if not _takes_flash(device, *heads)]
    if len(without_flash) == len(HEADS):
        return "no flash kernel: use attn_implementation='flash_attention_2', or expect less speed"
    others = ", ".join(["padded batches", "fp32", *without_flash])
    return f"flash in 16 bits without padding; a slower kernel for {others}"


def _takes_flash(device: torch.device, heads: int, kv_heads: int) -> bool:
    query, key = (
        torch.empty(8, count, 128, 64, device=device, dtype=torch.bfloat16)
        for count in (heads, kv_heads)
    )
    # Query, key, value, mask, dropout, causal, grouped heads.
    params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, heads != kv_heads)
    return torch.backends.cuda.can_use_flash_attention(params)


def compiler() -> dict[str, str | None]:
    """Return the first line of each build tool's --version, None for a tool that is missing."""
    return {
        "c++": _version(build.compiler_command),
        "ninja": _version(lambda: [build.ninja_command()]),
    }


def _version(find: Callable[[], list[str]]) -> str | None:
    try:
        command = [*find(), "--version"]
    except RuntimeError:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return next(iter(done.stdout.splitlines()), None)


def choice(op: str, device: torch.device) -> dict[str, Any]:
    """Return the implementation of `op` that runs on `device`, and why the others do not."""
    candidates = dispatch.explain(op, device)
    return {
        "op": op,
        "device": str(device),
        "runs": next((candidate.name for candidate in candidates if candidate.usable), None),
        "candidates": [
            {"name": candidate.name, "usable": candidate.usable, "reason": candidate.reason}
            for candidate in candidates
        ],
    }


def checks(device: torch.device) -> list[dict[str, Any]]:
    """Compare every op as it runs on `device`, in each dtype, with the reference in fp64."""
    return [check(op, device, dtype) for op in dispatch.OPS for dtype in TOLERANCES]


def check(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Compare `op` as it runs here, on inputs of this dtype, with the reference in fp64."""
    entry: dict[str, Any] = {
        "op": op,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "ok": False,
    }
    try:
        ours = values_and_gradients(ops, op, Inputs(device, dtype, dtype))
        truth = values_and_gradients(reference, op, Inputs(device, torch.float64, dtype))
    except Exception as error:  # a broken installation is a finding, not a reason to stop
        return {**entry, "error": f"{type(error).__name__}: {error}"}
    for name in ("value", "gradient"):
        errors = [relative_error(*pair) for pair in zip(ours[name], truth[name], strict=True)]
        if not all(map(math.isfinite, errors)):
            return {**entry, "error": f"the {name} is not finite"}
        entry[f"{name}_error"] = max(errors)
    entry["ok"] = max(entry["value_error"], entry["gradient_error"]) <= TOLERANCES[dtype]
    return entry


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the largest true value."""
    return ((ours.double() - truth).abs().max() / truth.abs().max()).item()


class Inputs:
    """Random inputs in `dtype`: the same numbers, rounded to `rounded`, on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounded: torch.dtype) -> None:
        self.device, self.dtype, self.rounded = device, dtype, rounded
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = mean + std * torch.randn(shape, generator=self.generator)
        return values.to(self.rounded).to(self.device, self.dtype)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def values_and_gradients(module: ModuleType, op: str, inputs: Inputs) -> dict[str, list[Tensor]]:
    """Return values of `module`'s op, and gradients under a random upstream gradient."""
    if op == "perturb_embed":
        cases = _embed_cases(module, inputs)
    elif op == "combine":
        cases = _combine_cases(inputs)
    elif op == "context_scan":
        cases = _scan_cases(inputs)
    else:
        cases = _head_cases(module, op, inputs)
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    for value, leaves in cases:
        values.append(value.detach())
        gradients += torch.autograd.grad(value, leaves, inputs.normal(*value.shape).to(value))
    return {"value": values, "gradient": gradients}


def _embed_cases(module: ModuleType, inputs: Inputs) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield a value and its leaves for each transform, with random parameters.

    At the initial parameters some gradients vanish. The parameters are in at least fp32, as a
    wrapped model's are. A kernel takes several tiles of the tokens and of the columns.
    """
    D, vocab = 264, 50
    ids = inputs.below(vocab, 2, 35)
    seed = torch.tensor(1234, device=inputs.device)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    for family in FAMILIES:
        config = PerturbConfig(transform=family, latent_dim=5, hidden_dim=7)
        transform = make_transform(config, D).to(inputs.device, wide)
        for parameter in transform.parameters():
            parameter.data = inputs.normal(*parameter.shape, std=0.25).to(wide)
        table = inputs.normal(vocab, D).requires_grad_()
        perturbed = module.perturb_embed(ids, table, transform, seed, 4)
        yield perturbed, [table, *transform.parameters()]


def _head_cases(
    module: ModuleType, op: str, inputs: Inputs
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield a value and its leaves for a head with every option on, and one ignored label.

    Frozen and trained heads run different passes. A row takes a kernel several tiles.
    """
    M, N, D, V = 4, 37, 72, 5000
    for frozen in (True, False):
        hidden = inputs.normal(*((M, N, D) if op == "linear_quadratic" else (N, D)))
        weight, bias = inputs.normal(V, D, std=0.2), inputs.normal(V)
        target = inputs.below(V - 10, N)
        target[3] = -100
        leaves = [
            leaf.requires_grad_() for leaf in ([hidden] if frozen else [hidden, weight, bias])
        ]
        value = getattr(module, op)(
            hidden, weight, target, bias=bias, logit_scale=0.8, softcap=20.0, valid_vocab=V - 10
        )
        yield value, leaves


def _combine_cases(inputs: Inputs) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield a value and its leaf for each estimator and marginal.

    In fp64 the op is its own reference: it runs the torch code of `estimators`.
    """
    M, B, T = 8, 3, 600  # several programs, and several tiles of a sequence
    mask = inputs.below(4, B, T) > 0
    for estimator, marginal in itertools.product(COMBINABLE, MARGINALS):
        log_probs = inputs.normal(M, B, T, mean=-6.0, std=2.0).requires_grad_()
        combined = ops.combine(log_probs, mask, estimator, marginal=marginal)
        yield torch.stack(combined[:3]), [log_probs]


def _scan_cases(inputs: Inputs) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield a value and its leaves for rows with document starts and padding; in at least fp32.

    In fp64 the op is its own reference, as `combine` is. A row takes a kernel several chunks.
    """
    B, T, H = 2, 200, 20
    wide = torch.promote_types(inputs.dtype, torch.float32)
    leaves = [inputs.normal(B, T, H).to(wide), inputs.normal(H).to(wide).sigmoid()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    starts, real = inputs.below(10, B, T) == 0, inputs.below(4, B, T) > 0
    yield ops.context_scan(*leaves, starts=starts, real=real), leaves


def show(report: dict[str, Any], console: Any) -> None:
    """Print the report as tables."""
    console.print(_facts(report))
    console.print(_implementations(report))
    for chosen in report["ops"]:
        for other in chosen["candidates"]:
            if other["name"] != chosen["runs"]:
                reason = f"{chosen['runs']} comes first" if other["usable"] else other["reason"]
                text = f"{chosen['op']} on {chosen['device']}: not {other['name']}: {reason}"
                console.print(text, markup=False)


def _facts(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("", "", title="FastPerturb doctor", show_header=False)
    for name, version in report["versions"].items():
        table.add_row(name, version)
    table.add_row("commit", report["commit"] or "not a checkout")
    for device in report["devices"]:
        details = [
            f"{name}: {', '.join(value) if isinstance(value, list) else value}"
            for name, value in device.items()
            if name != "device"
        ]
        table.add_row(device["device"], "\n".join(details))
    for tool, version in report["compiler"].items():
        table.add_row(tool, version or "not found")
    table.add_row("FASTPERTURB_EXT", report["extension"] or "not set")
    for name, installed in report["attention"].items():
        table.add_row(name, "available" if installed else "not installed")
    return table


def _implementations(report: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("device", "op", "runs", "dtype", "value error", "gradient error", "check")
    runs_by = {(entry["device"], entry["op"]): entry["runs"] for entry in report["ops"]}
    for checked in report["checks"]:
        device, op = checked["device"], checked["op"]
        errors = [
            f"{checked[name]:.1e}" if name in checked else ""
            for name in ("value_error", "gradient_error")
        ]
        verdict = "[green]ok" if checked["ok"] else f"[red]FAIL {escape(checked.get('error', ''))}"
        name = runs_by[device, op] or "nothing"
        table.add_row(device, op, name, checked["dtype"], *errors, verdict)
    return table
