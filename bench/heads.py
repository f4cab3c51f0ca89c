"""The vocabulary heads against naive torch, other fused heads and the GEMMs they cannot avoid.

    naive        F.linear and cross-entropy (quadratic: softmaxes and their sums), autograd
    compiled     the same under torch.compile
    torch_lce    torch's own chunked F.linear_cross_entropy; its sum only, all rows alike
    liger, liger_scaled, cce   liger-kernel's heads (the sum only; per-token losses) and
                 cut-cross-entropy's, on GPUs, where installed
    fused        on GPUs, where it can run: ours by the GEMM with a fused epilogue
    logprob      beside the quadratic op: linear_logprob on the same rows
    floor        the bare GEMMs of all rows at once, as torch.mm does them: one forward, two for a
                 frozen head's full pass, three for one that trains
    gemms        the same as our heads do them

Every implementation of the op is checked against the oracle before it is timed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Row, Variant, by, measure
from fastperturb import ops
from fastperturb.ops import dispatch, gemm, reference


@dataclass(frozen=True)
class Case:
    """One shape: rows of hidden, D wide, against V vocabulary entries.

    M > 1 is the quadratic op on rows / M tokens.
    """

    rows: int
    D: int
    V: int
    M: int
    frozen: bool
    dtype: str

    @property
    def op(self) -> str:
        return "linear_logprob" if self.M == 1 else "linear_quadratic"

    @property
    def tokens(self) -> int:
        return self.rows // self.M


CPU_CASES = (
    Case(2048, 256, 50257, 1, True, "float32"),
    Case(2048, 256, 50257, 8, True, "float32"),
    Case(2048, 256, 50257, 1, False, "float32"),
    Case(2048, 256, 50257, 1, True, "bfloat16"),
)
GPU_CASES = (
    Case(8192, 4096, 128256, 1, True, "bfloat16"),
    Case(32768, 4096, 128256, 1, True, "bfloat16"),
    Case(8192, 1024, 128256, 1, True, "bfloat16"),
    Case(8192, 4096, 128256, 8, True, "bfloat16"),
    Case(8192, 4096, 128256, 1, False, "bfloat16"),
)


def rows(device: torch.device, *, repeats: int) -> Iterator[list[Row]]:
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        size = getattr(torch, case.dtype).itemsize
        least = (case.rows + case.V) * case.D * size
        yield measure(
            case.op,
            variants(case, device),
            x=asdict(case),
            least_bytes={"forward": least, "full": least + case.rows * case.D * size},
            device=device,
            repeats=repeats,
        )


def variants(case: Case, device: torch.device) -> list[Variant]:
    torch.manual_seed(0)
    torch.compiler.reset()
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.rows, case.D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(case.V, case.D, device=device) / case.D**0.5).to(dtype)
    weight.requires_grad_(not case.frozen)
    target = torch.randint(case.V, (case.tokens,), device=device)
    upstream = torch.randn(case.tokens, device=device)
    leaves = [hidden] if case.frozen else [hidden, weight]

    def ours() -> Tensor:
        if case.M == 1:
            return ops.linear_logprob(hidden, weight, target)
        return ops.linear_quadratic(hidden.view(case.M, case.tokens, case.D), weight, target)

    def naive() -> Tensor:
        return _naive(hidden, weight, target, case.M)

    def full(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), leaves, upstream)

    forwards: dict[str, Callable[[], Tensor]] = {}
    for candidate in dispatch.explain(case.op, device):
        if candidate.usable:
            check(candidate.name, case, hidden, weight, target)
            forwards[candidate.name] = ours
    if case.M == 1 and device.type == "cuda":
        with dispatch.fuse_heads(True):
            check("triton", case, hidden, weight, target)
        forwards["fused"] = ours
    forwards["naive"] = naive
    forwards["compiled"] = torch.compile(naive)
    timed = []
    for name, forward in forwards.items():
        for mode, run in {"forward": torch.no_grad()(forward), "full": full(forward)}.items():
            chosen = by(name)(run) if name in ("triton", "cpp", "torch") else run
            if name == "fused":
                chosen = _fused(by("triton")(run))
            replay = name == "triton" and mode == "forward"
            timed.append(Variant(name, mode, chosen, opaque=True, replay=replay))
    others = {}
    if case.M == 1:
        others = _peers(hidden, weight, target, upstream, leaves)
    else:
        row_target, row_upstream = target.repeat(case.M), upstream.repeat(case.M)
        others["logprob"] = lambda: torch.autograd.grad(
            ops.linear_logprob(hidden, weight, row_target), leaves, row_upstream
        )
    timed += [Variant(name, "full", run, opaque=True) for name, run in others.items()]
    return timed + _floors(hidden.detach(), weight.detach(), case.frozen)


def _fused(run: Callable[[], Any]) -> Callable[[], Any]:
    def fused() -> Any:
        with dispatch.fuse_heads(True):
            return run()

    return fused


def _naive(hidden: Tensor, weight: Tensor, target: Tensor, M: int) -> Tensor:
    logits = F.linear(hidden, weight).float()
    if M == 1:
        return -F.cross_entropy(logits, target, reduction="none")
    p = logits.unflatten(0, (M, -1)).softmax(-1)
    hit = p.gather(2, target.expand(M, -1)[..., None])[..., 0].mean(0)
    cross = (p.sum(0).square() - p.square().sum(0)).sum(-1)
    return 2 * hit - cross / (M * (M - 1))


def _peers(
    hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, leaves: list[Tensor]
) -> dict[str, Callable[[], Any]]:
    """Return other projects' heads that run here."""
    peers: dict[str, Callable[[], Any]] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        peers["torch_lce"] = lambda: torch.autograd.grad(
            F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options), leaves
        )
    if hidden.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        def liger() -> Any:
            loss = Liger.apply(
                hidden, weight, target, None, None, -100, 0.0, 0.0, "sum", None, False
            )
            return torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, leaves)

        peers["liger"] = liger
        if importlib.util.find_spec("liger_kernel.ops.fused_linear_scaled_cross_entropy"):
            from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
                LigerFusedLinearScaledCrossEntropyFunction as LigerScaled,
            )

            peers["liger_scaled"] = lambda: torch.autograd.grad(
                LigerScaled.apply(hidden, weight, target), leaves, upstream
            )
    if hidden.device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        peers["cce"] = lambda: torch.autograd.grad(
            linear_cross_entropy(hidden, weight, target, reduction="none"), leaves, upstream
        )
    return peers


def _floors(hidden: Tensor, weight: Tensor, frozen: bool) -> list[Variant]:
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    torch.mm(hidden, weight.T, out=logits)
    floors = []
    for name, multiply in (("floor", torch.mm), ("gemms", gemm.product)):
        # torch.mm can write to memory that is there already.
        into = {"out": logits} if name == "floor" else {}

        def forward(multiply: Any = multiply, into: Any = into) -> None:
            multiply(hidden, weight.T, **into)

        def full(forward: Any = forward, multiply: Any = multiply) -> None:
            forward()
            multiply(logits, weight)
            if not frozen:
                multiply(logits.T, hidden)

        floors += [Variant(name, "forward", forward), Variant(name, "full", full)]
    return floors


def check(name: str, case: Case, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Raise for an implementation whose numbers are wrong, before it is timed."""
    few = 16
    part = hidden.detach().view(case.M, case.tokens, case.D)[:, :few].contiguous()
    part = (part[0] if case.M == 1 else part).requires_grad_()
    upstream = torch.randn(few, device=hidden.device)
    fixed = weight.detach()
    with dispatch.only(name):
        ours = getattr(ops, case.op)(part, fixed, target[:few])
        (gradient,) = torch.autograd.grad(ours, part, upstream)
    leaf = part.detach().float().requires_grad_()
    right = getattr(reference, case.op)(leaf, fixed.float(), target[:few])
    (expected,) = torch.autograd.grad(right, leaf, upstream)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 1e-2
    for result, value, exact in (("value", ours, right), ("gradient", gradient, expected)):
        error = ((value.float() - exact).norm() / exact.norm()).item()
        if not error <= tolerance:
            raise AssertionError(f"{name} {case}: {result} is off by {error:.2e}, not timed")
