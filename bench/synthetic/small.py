"""A model so small that everything about it is known: 12 words and one random sign.

A Llama without layers, whose hidden state is the normalised embedding, moved by z U with z = +1
or -1 evenly. So log p(y | x, z) is a table of 2 x 12 x 12, the marginal a mean of two numbers, and
what an equation expects of M draws a finite sum: over the number of +1 among them, or over all
sequences where their order counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from fastperturb import PerturbConfig, ops, wrap
from fastperturb.estimators import Telescope, combine
from fastperturb.model import PerturbedLM

WORDS, DIM = 12, 3
TRUTH = torch.tensor([0.4, 0.84, -0.72], dtype=torch.float64)


def small_model(equation: str, num_samples: int, *, antithetic: bool = False) -> PerturbedLM:
    """The model as the library's users have it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=WORDS,
                hidden_size=DIM,
                intermediate_size=DIM,
                num_hidden_layers=0,
                num_attention_heads=1,
                initializer_range=1.0,
                tie_word_embeddings=False,
            )
        )
    config = PerturbConfig(
        latent="rademacher",
        latent_dim=1,
        estimator=equation,
        num_samples=num_samples,
        antithetic=antithetic,
    )
    return wrap(base.eval().requires_grad_(False), config)


@dataclass(frozen=True)
class ClosedForm:
    """The same model as tables in fp64, by x and y, each (x, y) with a U of its own.

    Gradients with respect to U are then those of each (x, y)'s own value.
    """

    table: Tensor  # [12, D]
    head: Tensor  # [12, D]
    rho: Tensor
    eps: float

    @classmethod
    def of(cls, lm: PerturbedLM) -> ClosedForm:
        base: Any = lm.base
        return cls(
            base.model.embed_tokens.weight.detach().double(),
            base.lm_head.weight.detach().double(),
            lm.transform.embed_rms.double(),
            base.config.rms_norm_eps,
        )

    def hidden(self, U: Tensor) -> Tensor:
        """The two hidden states of each x: U [..., 12, 12, D], of each (x, y), to [2, ...]."""
        moved = self.table[:, None] + self.rho * torch.stack([U, -U])
        return moved * torch.rsqrt(moved.square().mean(-1, keepdim=True) + self.eps)

    def log_probs(self, U: Tensor) -> Tensor:
        """log p(y | x, z) for z = +1, -1 at each (x, y): [..., 12, 12, D] to [2, ..., 12, 12]."""
        return (self.hidden(U) @ self.head.T).log_softmax(-1).diagonal(dim1=-2, dim2=-1)

    def log_marginal(self, U: Tensor) -> Tensor:
        """log p(y | x): [..., 12, 12, D] to [..., 12, 12]."""
        return self.log_probs(U).logsumexp(0) - math.log(2)

    def values(self, equation: str, signs: Tensor, U: Tensor) -> Tensor:
        """The equation's value at each (x, y) for each sequence of signs: [..., 12, 12, S].

        signs: int64 [M, S], which of the two signs each draw has.
        """
        if equation == "quadratic":
            hidden = self.hidden(U)[signs]  # (M, S, ..., 12, 12, D)
            target = torch.arange(WORDS).expand(hidden.shape[1:-1])
            flat = ops.linear_quadratic(hidden.flatten(1, -2), self.head, target.flatten())
            return flat.view(target.shape).movedim(0, -1)
        return self._combined(lambda log_probs: combine(log_probs, equation)[0], signs, U)

    def level_values(self, telescope: Telescope, level: int, signs: Tensor, U: Tensor) -> Tensor:
        """`values` where a telescope drew this level, whose draws the signs are."""
        return self._combined(
            lambda log_probs: telescope.combine(log_probs, torch.tensor(level))[0], signs, U
        )

    def _combined(self, equation: Callable[[Tensor], Tensor], signs: Tensor, U: Tensor) -> Tensor:
        log_probs = self.log_probs(U)[signs].movedim(1, -1)  # (M, ..., 12, 12, S)
        return equation(log_probs.flatten(1)).view(log_probs.shape[1:])


def numbers_of_plus(num_samples: int) -> tuple[Tensor, Tensor]:
    """Signs [M, M + 1] with 0, 1, ... M times +1, and the probability of each number [M + 1]."""
    signs = (torch.arange(num_samples)[:, None] >= torch.arange(num_samples + 1)).long()
    ways = [math.comb(num_samples, plus) for plus in range(num_samples + 1)]
    return signs, torch.tensor(ways, dtype=torch.float64) / 2**num_samples


def every_sequence(num_samples: int) -> tuple[Tensor, Tensor]:
    """All signs [M, 2^M] in all orders, and their equal probability."""
    bits = torch.arange(2**num_samples) >> torch.arange(num_samples)[:, None]
    return bits % 2, torch.full((2**num_samples,), 0.5**num_samples, dtype=torch.float64)


def everywhere(U: Tensor) -> Tensor:
    """One U for every (x, y): [..., D] to [..., 12, 12, D], to differentiate at each."""
    return U[..., None, None, :].expand(*U.shape[:-1], WORDS, WORDS, DIM).clone().requires_grad_()
