"""A model so small that everything about it is known: a vocabulary of 12 and one random sign.

It is a Llama without layers. Its hidden state is the normalised embedding, shifted by z U with
z = +1 or -1 with equal probability. So log p(y | x, z) is a table of 2 x 12 x 12, the marginal is a
mean of two numbers, and the expectation of an estimator over M samples is a finite sum: over the
number of samples with +1, or over all sequences of signs where their order matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from fastperturb import ops
from fastperturb.config import PerturbConfig
from fastperturb.estimators import Telescope, combine
from fastperturb.model import PerturbedLM, wrap

VOCAB, DIM = 12, 3
TRUTH = torch.tensor([0.4, 0.84, -0.72], dtype=torch.float64)


def small_model(estimator: str, num_samples: int, *, antithetic: bool = False) -> PerturbedLM:
    """Return the model as users of the library have it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB,
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
        estimator=estimator,
        num_samples=num_samples,
        antithetic=antithetic,
    )
    return wrap(base.eval().requires_grad_(False), config)


@dataclass(frozen=True)
class ClosedForm:
    """A small model in closed form: tables in fp64 over x and y.

    Each (x, y) has a U of its own, so that gradients with respect to U are those of each value.
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
        """Return the hidden states for z = +1, -1: U [..., 12, 12, D] to [2, ..., 12, 12, D]."""
        perturbed = self.table[:, None] + self.rho * torch.stack([U, -U])
        return perturbed * torch.rsqrt(perturbed.square().mean(-1, keepdim=True) + self.eps)

    def log_probs(self, U: Tensor) -> Tensor:
        """Return log p(y | x, z) for z = +1, -1: [..., 12, 12, D] to [2, ..., 12, 12]."""
        return (self.hidden(U) @ self.head.T).log_softmax(-1).diagonal(dim1=-2, dim2=-1)

    def log_marginal(self, U: Tensor) -> Tensor:
        """Return log p(y | x): [..., 12, 12, D] to [..., 12, 12]."""
        return self.log_probs(U).logsumexp(0) - math.log(2)

    def values(self, estimator: str, signs: Tensor, U: Tensor) -> Tensor:
        """Return the estimator's value at each (x, y) for each sequence of signs: [..., 12, 12, S].

        signs: int64 [M, S], the sign of each sample: 0 for +1, 1 for -1.
        """
        if estimator == "quadratic":
            hidden = self.hidden(U)[signs]  # (M, S, ..., 12, 12, D)
            target = torch.arange(VOCAB).expand(hidden.shape[1:-1])
            flat = ops.linear_quadratic(hidden.flatten(1, -2), self.head, target.flatten())
            return flat.view(target.shape).movedim(0, -1)
        return self._combined(lambda log_probs: combine(log_probs, estimator)[0], signs, U)

    def level_values(self, telescope: Telescope, level: int, signs: Tensor, U: Tensor) -> Tensor:
        """Return the value of a telescope that drew this level, for each sequence of signs."""
        return self._combined(
            lambda log_probs: telescope.combine(log_probs, torch.tensor(level))[0], signs, U
        )

    def _combined(self, value: Callable[[Tensor], Tensor], signs: Tensor, U: Tensor) -> Tensor:
        log_probs = self.log_probs(U)[signs].movedim(1, -1)  # (M, ..., 12, 12, S)
        return value(log_probs.flatten(1)).view(log_probs.shape[1:])


def numbers_of_plus(num_samples: int) -> tuple[Tensor, Tensor]:
    """Return signs [M, M + 1] with 0, 1, ... M times +1, and their probabilities [M + 1]."""
    signs = (torch.arange(num_samples)[:, None] >= torch.arange(num_samples + 1)).long()
    ways = [math.comb(num_samples, plus) for plus in range(num_samples + 1)]
    return signs, torch.tensor(ways, dtype=torch.float64) / 2**num_samples


def every_sequence(num_samples: int) -> tuple[Tensor, Tensor]:
    """Return all sequences of signs [M, 2^M], and their probabilities [2^M]."""
    bits = torch.arange(2**num_samples) >> torch.arange(num_samples)[:, None]
    return bits % 2, torch.full((2**num_samples,), 0.5**num_samples, dtype=torch.float64)


def everywhere(U: Tensor) -> Tensor:
    """Copy U for every (x, y), to differentiate at each: [..., D] to [..., 12, 12, D]."""
    return U[..., None, None, :].expand(*U.shape[:-1], VOCAB, VOCAB, DIM).clone().requires_grad_()
