"""perturb_embed against naive torch and against the memory traffic that it cannot avoid.

    stratified our own version with its M samples in one stratified group
    naive      noise of size [M, B, T, R], the transform as its formula, autograd
    compiled   the same under torch.compile
    floor      write the output once, read its upstream gradient once: no version is faster
    copy       a plain copy of the output

Modes: forward; shift, a forward that returns each embedding's shift |T(e) - e| too; full, a forward
and its backward.

Every implementation of the op is checked against the oracle before it is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import Row, Variant, by, measure
from fastperturb import PerturbConfig, ops
from fastperturb.config import TRANSFORMS
from fastperturb.ops import dispatch, reference
from fastperturb.transforms import Transform, make_transform


@dataclass(frozen=True)
class Case:
    """One shape: B sequences of T tokens, D wide, M samples of an R-dimensional latent."""

    family: str
    M: int
    B: int
    T: int
    D: int
    R: int
    dtype: str


GROWING = ("lowrank", "context")
# 16 MiB of output is memory that the allocator hands out again and again; 64 MiB come fresh from
# the system every time, page by page, as large outputs do in training.
CPU_CASES = (
    *(Case(family, 8, 1, 512, 1024, 16, "float32") for family in TRANSFORMS),
    Case("lowrank", 8, 4, 512, 1024, 16, "float32"),
    # How cost grows with the latent and with the prefix.
    *(Case(family, 8, 1, 512, 1024, R, "float32") for family in GROWING for R in (64, 256)),
    *(Case(family, 8, 1, 8192, 1024, 16, "float32") for family in GROWING),
)
GPU_CASES = (
    *(Case(family, 8, 4, 2048, 4096, 16, "bfloat16") for family in TRANSFORMS),
    Case("lowrank", 8, 4, 2048, 4096, 16, "float32"),
    *(Case(family, 8, 4, 2048, 4096, R, "bfloat16") for family in GROWING for R in (64, 256)),
    *(Case(family, 8, 1, 8192, 4096, 16, "bfloat16") for family in GROWING),
)


def rows(device: torch.device, *, repeats: int) -> Iterator[list[Row]]:
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        row = case.B * case.T * case.D * getattr(torch, case.dtype).itemsize
        forward = (1 + case.M) * row  # the embeddings in, the output out
        yield measure(
            "perturb_embed",
            variants(case, device),
            x=vars(case),
            least_bytes={
                "forward": forward,
                "shift": forward + 4 * case.M * case.B * case.T,
                "full": forward + case.M * row,
            },
            device=device,
            repeats=repeats,
        )


def variants(case: Case, device: torch.device) -> list[Variant]:
    torch.manual_seed(0)
    torch.compiler.reset()  # each case compiles anew instead of adding to the last one's guards
    dtype = getattr(torch, case.dtype)
    config = PerturbConfig(transform=case.family, latent_dim=case.R, num_samples=case.M)
    transform = make_transform(config, case.D).to(device)
    embeddings = torch.randn(case.B, case.T, case.D, device=device).to(dtype)
    upstream = torch.randn(case.M, case.B, case.T, case.D, device=device).to(dtype)
    leaves = list(transform.parameters())
    seed = torch.tensor(7, device=device)

    def ours(strata: int = 1) -> Tensor:
        return ops.perturb_embed(embeddings, None, transform, seed, case.M, strata=strata)

    def ours_with_shift() -> tuple[Tensor, Tensor]:
        return ops.perturb_embed(embeddings, None, transform, seed, case.M, return_shift=True)

    plain = make_transform(config, case.D).to(device, dtype)

    def naive() -> Tensor:
        shape = (case.M, case.B, case.T, plain.latent_dim)
        return plain(embeddings, torch.randn(shape, device=device, dtype=dtype))

    def naive_with_shift() -> tuple[Tensor, Tensor]:
        perturbed = naive()
        return perturbed, (perturbed - embeddings).float().norm(dim=-1)

    providers: dict[str, tuple[Callable[[], Tensor], Callable[[], Any], list[Any]]] = {}
    for candidate in dispatch.explain("perturb_embed", device):
        if candidate.usable:
            check(candidate.name, case, transform, embeddings, upstream, seed)
            providers[candidate.name] = (ours, ours_with_shift, leaves)
    parameters = list(plain.parameters())
    providers["naive"] = (naive, naive_with_shift, parameters)
    providers["compiled"] = (torch.compile(naive), torch.compile(naive_with_shift), parameters)

    timed = []
    for name, (forward, with_shift, parameters) in providers.items():
        calls = {
            "forward": torch.no_grad()(forward),
            "shift": torch.no_grad()(with_shift),
            "full": _full(forward, parameters, upstream),
        }
        for mode, run in calls.items():
            chosen = by(name)(run) if name in ("triton", "cpp", "torch") else run
            opaque, replay = name in ("torch", "compiled"), name == "triton" and mode == "forward"
            timed.append(Variant(name, mode, chosen, opaque=opaque, replay=replay))

    def stratified() -> Tensor:
        return ours(strata=case.M)

    timed.append(Variant("stratified", "forward", torch.no_grad()(stratified)))
    timed.append(Variant("stratified", "full", _full(stratified, leaves, upstream)))
    out = torch.empty_like(upstream)
    for mode in ("forward", "shift"):
        timed.append(Variant("floor", mode, lambda: torch.empty_like(upstream).fill_(1.0)))
    timed.append(
        Variant("floor", "full", lambda: (torch.empty_like(upstream).fill_(1.0), upstream.sum()))
    )
    timed.append(Variant("copy", "forward", lambda: out.copy_(upstream)))
    return timed


def _full(
    forward: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor
) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


def check(
    name: str,
    case: Case,
    transform: Transform,
    embeddings: Tensor,
    upstream: Tensor,
    seed: Tensor,
) -> None:
    """Raise for an implementation whose numbers are wrong, before it is timed."""
    leaves = list(transform.parameters())
    with torch.no_grad():  # away from the start, where some gradients vanish
        for leaf in leaves:
            leaf += 0.1 * leaf.square().mean().sqrt().clamp_min(0.01) * torch.randn_like(leaf)
    few = slice(0, 32)  # of the tokens: the oracle keeps everything
    part, part_upstream = embeddings[:1, few], upstream[:, :1, few]
    with dispatch.only(name):
        ours, shift = ops.perturb_embed(part, None, transform, seed, case.M, return_shift=True)
        gradients = torch.autograd.grad(ours, leaves, part_upstream)
    right = reference.perturb_embed(part.float(), None, transform, seed, case.M)
    expected = torch.autograd.grad(right, leaves, part_upstream.float())
    expected = [(right - part.float()).norm(dim=-1), right, *expected]
    tolerance = 1e-4 if embeddings.dtype == torch.float32 else 1e-2
    names = ("shift", "value", *transform.parameter_names)
    for result, value, exact in zip(names, (shift, ours, *gradients), expected, strict=True):
        error = ((value.float() - exact).norm() / exact.norm()).item()
        if not error <= tolerance:
            raise AssertionError(f"{name} {case}: {result} is off by {error:.2e}, not timed")
