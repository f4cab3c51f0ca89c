"""The types that the ops pass to their implementations.

A registered op takes its arguments one by one, in the order of a schema. `EmbedCall` and `HeadCall`
list them once for each family of ops: they make the schema and carry the arguments from there on.

This module imports nothing else of `ops`. Implementations (`ops.torch`, `ops.cpp`, `kernels`)
import it, `dispatch` imports the implementations, and the ops import `dispatch`.
"""

from __future__ import annotations

import typing
from typing import NamedTuple

import torch
from torch import Tensor

from fastperturb.transforms import FAMILIES

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    str: "str",
}


class EmbedCall(NamedTuple):
    """The arguments of perturb_embed."""

    ids: Tensor | None  # [B, T]
    table: Tensor  # [V, D], or the embeddings [B, T, D] where there are no ids
    parameters: list[Tensor]  # in the family's order
    embed_rms: Tensor  # []
    seed: Tensor  # [] int64
    samples: Tensor  # [M, B] int64, maybe an expanded view; so are rows and positions
    rows: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    mask: Tensor | None  # [B, T] bool
    latent_mean: Tensor | None  # [B, T, R] fp32, maybe an expanded view; None: 0
    latent_scale: Tensor | None  # context: [B, T, R], dense rows, which multiplies the latents
    family: str
    latent: str
    scope: str
    antithetic: bool
    strata: int  # samples in a stratified group; 1: independent samples
    latent_std: float  # z is latent_mean + latent_std times the noise

    @property
    def projection_width(self) -> int | None:
        """Return H of the projection (e / rho) A [N, H], or None for a family without A."""
        return self.parameters[-1].shape[0] if self.family in ("gated", "mlp") else None

    @property
    def latent_dim(self) -> int:
        """Return R, the number of entries of a latent."""
        return self.parameters[FAMILIES[self.family].latent_parameter].shape[0]

    def dense_mean(self) -> Tensor | None:
        """Return the means [B, T, R] with dense rows for kernels; None where z is the noise."""
        mean = self.latent_mean
        if mean is not None:
            return mean if mean.stride(-1) == 1 else mean.contiguous()
        if self.latent_std == 1.0:
            return None
        zeros = torch.zeros(self.latent_dim, device=self.table.device)
        return zeros.expand(*self.positions.shape, -1)


class Embedded(NamedTuple):
    """The results of perturb_embed. All but `out` are in fp32, or in fp64 for an fp64 table."""

    out: Tensor  # [M, B, T, D]
    squared_shift: Tensor | None  # [M, B, T], |T(e, z) - e|^2 before `out` is rounded, if wanted
    projected: Tensor | None  # [N, H], the projection (e / rho) A of gated and mlp, for mlp + b


class HeadCall(NamedTuple):
    """The arguments that linear_logprob and linear_quadratic share."""

    hidden: Tensor  # [N, D]; linear_quadratic: [M, N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64
    bias: Tensor | None  # [V]
    cast_weight: Tensor | None  # [V, D], which the GEMMs take for weight
    labelled: Tensor | None  # [n] int64, the numbers of the tokens with labels, rising
    logit_scale: float
    softcap: float | None
    valid_vocab: int
    ignore_index: int


def schema(call: type[EmbedCall] | type[HeadCall]) -> str:
    """Return the fields of a call as the arguments in an op's schema."""
    hints = typing.get_type_hints(call)
    return ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items())


class LogitOptions(NamedTuple):
    """The options that turn a block's products hidden W^T into logits."""

    start: int  # the number of the block's first vocabulary entry
    bias: Tensor | None  # [v]
    scale: float
    softcap: float | None
    padding: int = 0  # columns at the block's end that are no entries


def empty_grad_hidden(hidden: Tensor) -> Tensor:
    """Return memory for a gradient without its upstream factor.

    It is in hidden's dtype, but in fp32 for fp16, which would flush to 0 what the factor of a
    scaled loss makes large again.
    """
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return hidden.new_empty(hidden.shape, dtype=dtype)


class LogProbs(NamedTuple):
    """The results of one pass over the vocabulary, row by row; 0 (False) where ignored."""

    log_probs: Tensor
    lse: Tensor  # [2, N], log sum exp of the logits, and its rounding error
    hit: Tensor  # no entry has a higher logit than the target
    entropy: Tensor | None  # of the softmax
    grad_hidden: Tensor | None  # [N, D], the gradient of log_probs[i] with respect to hidden[i]

    @classmethod
    def empty(
        cls, hidden: Tensor, dtype: torch.dtype, *, entropy: bool, grad_hidden: bool
    ) -> LogProbs:
        """Return memory for the results of hidden [N, D], of which statistics are in `dtype`."""
        lse = hidden.new_empty((2, len(hidden)), dtype=dtype)
        log_probs, hit = torch.empty_like(lse[0]), torch.empty_like(lse[0], dtype=torch.bool)
        return cls(
            log_probs,
            lse,
            hit,
            torch.empty_like(log_probs) if entropy else None,
            empty_grad_hidden(hidden) if grad_hidden else None,
        )

    def rows(self, part: slice) -> LogProbs:
        """Return views of some rows."""
        if part == slice(0, self.hit.shape[0]):
            return self
        log_probs, lse, hit, *others = self
        entropy, grad_hidden = (None if value is None else value[part] for value in others)
        return LogProbs(log_probs[part], lse[:, part], hit[part], entropy, grad_hidden)


class RunningSoftmax(NamedTuple):
    """The softmax statistics of rows [n] after some vocabulary blocks, with q = exp(l - peak)."""

    peak: Tensor  # the largest logit
    other_sum: Tensor  # the sum of q over all entries but the target
    target_logit: Tensor  # NaN until the target's block: to the end for a target out of range
    entropy_sum: Tensor | None  # the sum of q (l - peak), where the entropy is wanted

    @classmethod
    def start(cls, rows: int, like: Tensor, *, entropy: bool = False) -> RunningSoftmax:
        zeros = like.new_zeros(rows)
        peak = torch.full_like(zeros, torch.finfo(like.dtype).min)
        nan = torch.full_like(zeros, torch.nan)
        return cls(peak, zeros, nan, torch.zeros_like(zeros) if entropy else None)

    def rows(self, part: slice) -> RunningSoftmax:
        """Return views of some rows."""
        if part == slice(0, self.peak.shape[0]):
            return self
        entropy_sum = None if self.entropy_sum is None else self.entropy_sum[part]
        peak, other_sum, target_logit = (value[part] for value in self[:3])
        return RunningSoftmax(peak, other_sum, target_logit, entropy_sum)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probs, the log of sum q, and sum q."""
        offset = self.target_logit - self.peak
        sums = self.other_sum + offset.exp()
        log_sums = sums.log()
        return (offset - log_sums).clamp_max(0.0), log_sums, sums

    @staticmethod
    def lse(peak: Tensor, log_sums: Tensor) -> Tensor:
        """Return log sum exp of the logits and its rounding error, [2, ...]."""
        total = peak + log_sums
        return torch.stack([total, peak - total + log_sums])
