"""The calls whose kernels are predicted and measured: those of a step of an 8B-class model.

They call the Triton implementations themselves, so that on the device "meta" their launches can be
recorded.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.config import MARGINALS, TRANSFORMS, PerturbConfig
from fastperturb.kernels import combine, context_scan, head_gemm, head_rows, perturb_embed
from fastperturb.ops import head_blocks, head_gradients
from fastperturb.ops.calls import EmbedCall
from fastperturb.ops.combine import COMBINABLE
from fastperturb.ops.head_blocks import Head
from fastperturb.ops.head_geometry import Geometry
from fastperturb.ops.head_gradients import Wanted
from fastperturb.ops.head_labels import Labels
from fastperturb.transforms import make_transform

PROCESSORS, MEMORY = 132, 80 * 2**30  # of an H100, where there is no device to ask


@dataclass(frozen=True)
class Sizes:
    """M samples of B rows of T tokens; the heads take B T hidden states in all."""

    M: int = 8
    B: int = 8
    T: int = 1024
    D: int = 4096
    V: int = 128256
    R: int = 16
    H: int = 64
    dtype: torch.dtype = torch.bfloat16


class Case(NamedTuple):
    op: str
    name: str
    run: Callable[[], Any]


class Calls:
    """Every call on one device."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes

    def cases(self) -> Iterator[Case]:
        """Yield the calls; the inputs of each are allocated when it is reached."""
        yield from self._embed_cases()
        yield from self.head_cases()
        yield from self._combine_cases()
        yield from self._scan_cases()

    def _embed_cases(self) -> Iterator[Case]:
        size, device = self.sizes, self.device
        grad = self._normal(size.M, size.B, size.T, size.D)
        for family in TRANSFORMS:
            call, projected = self._embed_call(family), None
            if call.projection_width is not None:
                projected = torch.zeros(size.B * size.T, size.H, device=device)

            def forward(call: EmbedCall = call) -> Any:
                return perturb_embed.perturb_embed(call, True)

            def backward(call: EmbedCall = call, projected: Tensor | None = projected) -> Any:
                return perturb_embed.perturb_embed_backward(grad, call, projected, False)

            yield Case("perturb_embed", f"{family} forward", forward)
            yield Case("perturb_embed", f"{family} backward", backward)

    def _embed_call(self, family: str) -> EmbedCall:
        size, device, vocab = self.sizes, self.device, 32000
        config = PerturbConfig(transform=family, latent_dim=size.R, hidden_dim=size.H)
        parameters = make_transform(config, size.D).to(device).op_parameters()
        shape = size.B, size.T
        numbers = noise.counters(size.M, None, None, shape, antithetic=False, device=device)
        return EmbedCall(
            ids=torch.zeros(shape, dtype=torch.int64, device=device).random_(vocab),
            table=self._normal(vocab, size.D),
            parameters=[value.detach() for value in parameters],
            embed_rms=torch.ones((), device=device),
            seed=torch.zeros((), dtype=torch.int64, device=device),
            samples=numbers[0],
            rows=numbers[1],
            positions=numbers[2],
            mask=None,
            latent_mean=None,
            latent_scale=torch.ones(*shape, size.R, device=device) if family == "context" else None,
            family=family,
            latent="gaussian",
            scope="token",
            antithetic=False,
            strata=1,
            latent_std=1.0,
        )

    def head_cases(self) -> Iterator[Case]:
        size, device = self.sizes, self.device
        rows = size.B * size.T
        weight, hidden = self._normal(size.V, size.D), self._normal(rows, size.D)
        target = torch.zeros(rows, dtype=torch.int64, device=device).random_(size.V)
        labels = Labels.of(target, -100, None)
        lse, upstream = torch.full((2, rows), 12.0, device=device), torch.ones(rows, device=device)

        def head(fused: ModuleType | None) -> Head:
            geometry = Geometry.of_gpu(PROCESSORS, MEMORY, size.D)
            if device.type == "cuda":
                geometry = Geometry.of(device, size.D)
            return Head(head_rows, weight, None, 1.0, None, size.V, size.dtype, geometry, fused)

        def logprob(fused: ModuleType | None, want_grad_hidden: bool) -> Any:
            # Without a device the fused head cannot read its flag, which it does at its end.
            unread = contextlib.suppress(NotImplementedError)
            with unread if device.type == "meta" else contextlib.nullcontext():
                want = {"want_grad_hidden": want_grad_hidden, "want_entropy": False}
                return head_blocks.linear_logprob(head(fused), hidden, labels, **want)

        def backward(fused: ModuleType | None) -> Any:
            inputs = head(fused), upstream, hidden, labels, lse
            return head_gradients.linear_logprob_backward(*inputs, Wanted(True, True, False))

        def quadratic() -> Any:
            samples = hidden.view(size.M, -1, size.D)
            tokens = Labels.of(target[: samples.shape[1]], -100, None)
            return head_blocks.linear_quadratic(
                head(None), samples, tokens, None, want_grad_hidden=True
            )

        for suffix, fused in (("", None), (", fused", head_gemm)):
            yield Case("linear_logprob", f"frozen head{suffix}", partial(logprob, fused, True))
            yield Case("linear_logprob", f"scoring{suffix}", partial(logprob, fused, False))
            yield Case("linear_logprob", f"trained, backward{suffix}", partial(backward, fused))
        yield Case("linear_quadratic", "frozen head", quadratic)

    def _combine_cases(self) -> Iterator[Case]:
        size, device = self.sizes, self.device
        log_probs = -torch.ones(size.M, size.B, size.T, device=device).exponential_()
        mask = torch.ones(size.B, size.T, dtype=torch.bool, device=device)
        for marginal, estimator in itertools.product(MARGINALS, COMBINABLE):
            run = partial(combine.combine, log_probs, mask, estimator, marginal)
            yield Case("combine", f"{estimator}, {marginal}", run)

    def _scan_cases(self) -> Iterator[Case]:
        size, device = self.sizes, self.device
        inputs = torch.zeros(size.B, size.T, size.H, device=device)
        retain, starts = torch.full((size.H,), 0.9, device=device), inputs[..., 0] > 0
        marks = (starts, ~starts, None)
        yield Case(
            "context_scan",
            "forward",
            partial(context_scan.context_scan, inputs, retain, *marks),
        )
        yield Case(
            "context_scan",
            "backward",
            partial(context_scan.context_scan_backward, inputs, inputs, inputs, retain, *marks),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.sizes.dtype, device=self.device).normal_()
