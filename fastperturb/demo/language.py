"""The synthetic language: its embeddings, its exact distribution (the truth) and samples from it.

V = 144 tokens lie on a 12 x 12 grid over [-1, 1]^2. A token's embedding is its position (a, b)
along two random orthonormal axes, the noisy one and the precise one, plus a small random id. A
prefix of two tokens (u, v) yields y with probability p_a(y_a) p_b(y_b), where N(c) is the softmax
over the grid of -(y - c)^2 / (2 * 0.09^2):

    p_b = N((u_b + v_b) / 2)
    p_a = E N(g((u_a + n1 + v_a + n2) / 2)),    n1, n2 ~ N(0, 0.3^2)
    g(s) = 0.9 clip(0.3 s if s < 0 else 1.2 s, -1, 1)

The truth shifts the prefix along the noisy axis before it uses it, so prefixes with a below 0.1
carry information about g beyond 0.1. Both factors depend only on the midpoint of two grid points,
and there are 2 * 12 - 1 midpoints: the truth is a pair of tables. The seed chooses the axes and
the ids.

A contextual truth has prefixes of three tokens (t, u, v), of which t decides nothing but noise: u
and v are noisy only after a t of one half of the grid. n1 = n2 = 0 unless t_b > 0. Then p_a has a
table for each half.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 12
VOCAB = SIDE * SIDE  # token = 12 * (index along the noisy axis) + (index along the precise axis)
EMBED_DIM = 16
NOISE_SD = 0.3
RESPONSE_SD = 0.09
ID_SD = 0.03

# Training prefixes have both tokens within SUPPORT along the noisy axis.
SUPPORT = (-1.0, 0.1)
REGIONS = {"in_support": SUPPORT, "band1": (0.2, 0.45), "band2": (0.45, 0.7)}


def grid() -> Tensor:
    """Return the positions along one axis: [12], fp64."""
    return torch.linspace(-1, 1, SIDE, dtype=torch.float64)


@dataclass(frozen=True)
class Language:
    """The axes and embeddings that a seed chooses; the truth does not depend on them."""

    axes: Tensor  # [2, D], orthonormal: noisy, precise
    embeddings: Tensor  # [V, D]


def make_language(generator: torch.Generator, *, id_sd: float = ID_SD) -> Language:
    """Draw the axes and the ids of a language."""
    square = torch.randn(EMBED_DIM, EMBED_DIM, dtype=torch.float64, generator=generator)
    axes = torch.linalg.qr(square).Q[:, :2].T  # (2, D)
    positions = torch.cartesian_prod(grid(), grid())  # (V, 2)
    ids = id_sd * torch.randn(VOCAB, EMBED_DIM, dtype=torch.float64, generator=generator)
    return Language(axes=axes.float(), embeddings=(positions @ axes + ids).float())


def link(position: Tensor) -> Tensor:
    """Apply g: gentle on the negative side, steep on the positive side."""
    slope = torch.where(position < 0, 0.3, 1.2)
    return 0.9 * (slope * position).clamp(-1, 1)


def respond(centre: Tensor) -> Tensor:
    """Return N(c): from centres [...] to probabilities over the grid [..., 12]."""
    return torch.softmax(-(grid() - centre[..., None]).square() / (2 * RESPONSE_SD**2), dim=-1)


@functools.cache
def truth_tables(noise_sd: float = NOISE_SD) -> tuple[Tensor, Tensor]:
    """Return p_a and p_b, [23, 12] each; the row is the sum of the two tokens' grid indices."""
    midpoints = torch.linspace(-1, 1, 2 * SIDE - 1, dtype=torch.float64)
    # The noise of a midpoint is one Gaussian; a fine sum over +-8 sd is exact to 1e-6.
    steps = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mass = torch.softmax(-0.5 * steps.square(), dim=0)
    shifted = midpoints[:, None] + noise_sd / math.sqrt(2) * steps  # (23, steps)
    noisy = (mass[:, None] * respond(link(shifted))).sum(1)
    return noisy, respond(midpoints)


def truth(prefixes: Tensor, noise_sd: float = NOISE_SD, *, contextual: bool = False) -> Tensor:
    """Return the exact distribution of y after each prefix: [N, 2] to [N, V], fp64.

    contextual: of the truth by that name, after prefixes [N, 3].
    """
    noisy, precise = _factors(prefixes, noise_sd, contextual)
    return (noisy[:, :, None] * precise[:, None, :]).flatten(1)


def sample(
    prefixes: Tensor,
    generator: torch.Generator,
    *,
    noise_sd: float = NOISE_SD,
    contextual: bool = False,
) -> Tensor:
    """Draw one y after each prefix: [N, 2] to [N], or [N, 3] under a contextual truth."""
    noisy, precise = (
        torch.multinomial(distribution, 1, generator=generator)[:, 0]
        for distribution in _factors(prefixes, noise_sd, contextual)
    )
    return noisy * SIDE + precise


def _factors(prefixes: Tensor, noise_sd: float, contextual: bool) -> tuple[Tensor, Tensor]:
    midpoint = (prefixes[:, -2:] // SIDE).sum(1)
    noisy, precise = truth_tables(noise_sd)
    factor = noisy[midpoint]
    if contextual:
        exact, _ = truth_tables(0.0)
        factor = torch.where(is_loud(prefixes[:, 0])[:, None], factor, exact[midpoint])
    return factor, precise[(prefixes[:, -2:] % SIDE).sum(1)]


def is_loud(tokens: Tensor) -> Tensor:
    """Return which tokens make those after them noisy under a contextual truth."""
    return tokens % SIDE >= SIDE // 2


def tokens_between(low: float, high: float) -> Tensor:
    """Return the tokens whose position along the noisy axis lies in [low, high]."""
    position = grid().repeat_interleave(SIDE)
    return ((position >= low) & (position <= high)).nonzero()[:, 0]


def draw_prefixes(
    tokens: Tensor, count: int, generator: torch.Generator, *, length: int = 2
) -> Tensor:
    """Draw `count` random prefixes [N, length] of these tokens."""
    return tokens[torch.randint(len(tokens), (count, length), generator=generator)]


def some_prefixes(
    tokens: Tensor, at_most: int, generator: torch.Generator, *, length: int = 2
) -> Tensor:
    """Return every prefix [N, length] of these tokens, or a random choice of `at_most` of them."""
    prefixes = torch.cartesian_prod(*[tokens] * length)
    return prefixes[torch.randperm(len(prefixes), generator=generator)[:at_most]]
