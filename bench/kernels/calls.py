"""The calls whose kernels are predicted and measured, at the size of an 8B-class model's step.

8 samples of 1024 tokens of width 4096, a vocabulary of 128,256, R = 16, H = 64, in bf16. They call
the Triton implementations themselves, so that on the device "meta" their launches can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.config import TRANSFORMS, PerturbConfig
from fastperturb.kernels import combine, head_rows, perturb_embed
from fastperturb.ops import head_blocks
from fastperturb.ops.calls import EmbedCall
from fastperturb.ops.combine import COMBINABLE
from fastperturb.ops.head_blocks import Head, Wanted
from fastperturb.transforms import make_transform

M, B, T, D, V = 8, 8, 1024, 4096, 128256
R, H = 16, 64
DTYPE = torch.bfloat16


class Case(NamedTuple):
    op: str
    name: str
    run: Callable[[], Any]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield every call; its inputs are allocated when it is reached."""
    yield from _embed_cases(device)
    yield from _head_cases(device)
    yield from _combine_cases(device)


def _embed_cases(device: torch.device) -> Iterator[Case]:
    for family in TRANSFORMS:
        call = embed_call(family, device)
        grad = _normal(device, M, B, T, D)
        yield Case("perturb_embed", f"{family} forward", lambda: perturb_embed.perturb_embed(call))
        yield Case(
            "perturb_embed",
            f"{family} backward",
            lambda: perturb_embed.perturb_embed_backward(grad, call, False),
        )


def embed_call(family: str, device: torch.device) -> EmbedCall:
    config = PerturbConfig(transform=family, latent_dim=R, hidden_dim=H)
    with device:
        parameters = make_transform(config, D).effective_parameters()
    numbers = noise.counters(M, None, None, (B, T), antithetic=False, device=device)
    return EmbedCall(
        ids=torch.zeros(B, T, dtype=torch.int64, device=device).random_(32000),
        table=_normal(device, 32000, D),
        parameters=[value.detach() for value in parameters],
        embed_rms=torch.ones((), device=device),
        seed=torch.zeros((), dtype=torch.int64, device=device),
        samples=numbers[0],
        rows=numbers[1],
        positions=numbers[2],
        mask=None,
        family=family,
        latent="gaussian",
        scope="token",
        antithetic=False,
    )


def _head_cases(device: torch.device) -> Iterator[Case]:
    head = Head(head_rows, _normal(device, V, D), None, 1.0, None, V, -100)
    hidden = _normal(device, B * T, D)
    target = torch.zeros(B * T, dtype=torch.int64, device=device).random_(V)
    samples, tokens = hidden.view(M, -1, D), target[: B * T // M]

    def logprob(want_grad_hidden: bool) -> Any:
        return head_blocks.linear_logprob(
            head, hidden, target, want_grad_hidden=want_grad_hidden, want_entropy=False
        )

    def logprob_backward() -> Any:
        lse = torch.full((2, B * T), 12.0, device=device)
        upstream = torch.ones(B * T, device=device)
        return head_blocks.linear_logprob_backward(
            head, upstream, hidden, target, lse, Wanted(True, True, False)
        )

    def quadratic() -> Any:
        return head_blocks.linear_quadratic(head, samples, tokens, None, want_grad_hidden=True)

    yield Case("linear_logprob", "frozen head", lambda: logprob(True))
    yield Case("linear_logprob", "scoring", lambda: logprob(False))
    yield Case("linear_logprob", "trained head, backward", logprob_backward)
    yield Case("linear_quadratic", "frozen head", quadratic)


def _combine_cases(device: torch.device) -> Iterator[Case]:
    log_probs = -torch.ones(M, B, T, device=device).exponential_()
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    for marginal in ("token", "sequence"):
        for estimator in COMBINABLE:
            yield Case(
                "combine",
                f"{estimator}, {marginal}",
                lambda estimator=estimator, marginal=marginal: combine.combine(
                    log_probs, mask, estimator, marginal
                ),
            )


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=device).normal_()
