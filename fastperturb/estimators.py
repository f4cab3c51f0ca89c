"""Estimating equations: from M log-probs l[m] = log pi(y | z_m) to a value and its weights.

Every estimator but `quadratic` reduces to one scalar weight for each (sample, label): the
gradient of the value is sum_m weights[m] grad l[m]. With L_M = log mean exp l:

    jensen     mean l                                 1/M               bias does not vanish
    iwae       L_M                                    softmax(l)        bias ~ -Var(p)/(2 M p^2)
    jvi        M L_M - (M-1) mean_j L_{M-1}^(-j)      may be negative   O(1/M^2)
    jvi_clip   the same value                         clipped at 0 and renormalised
    resample   L_M                                    softmax(l), on K samples only, reweighted
    sumo       M L_M - sum_{k<M} L_k, M random        a randomised telescope (`Telescope`)
    mlmc       one random level of a telescope        antithetic halves     (`Telescope`)

jensen, iwae, sumo (Luo et al., 2020), mlmc (Ishikawa and Goda, 2021) and jvi (Nowozin, 2018) are
standard literature; jvi_clip and this resample are our constructions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastperturb.config import (
    ESTIMATORS,
    INDEPENDENT_SAMPLES,
    TELESCOPES,
    check_backward_samples,
    check_groups,
    check_num_samples,
)

# Stands for the log-prob of an impossible label, so that weights stay finite.
_LOWEST = -1e30
# Resampling mixes in this much of the uniform distribution, which bounds its weights.
_UNIFORM_SHARE = 0.1


def combine(
    log_probs: Tensor,
    estimator: str,
    *,
    mask: Tensor | None = None,
    strata: int = 1,
    backward_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Combine M samples' log-probs: the value, and the weights that are its gradient.

    log_probs: [M, B, T] for the token marginal, [M, B] for the sequence marginal.
    mask: bool, [B, T] or [B], true where there is a label; elsewhere value and weights are 0.
    strata: the number of samples in a stratified group. jensen, iwae and resample ignore it; the
        others take groups, of which they need two, as their units.
    backward_samples: K of `resample`. generator: the randomness of resample, sumo and mlmc,
        whose rows each draw their own samples or level.

    Returns value [B, T] or [B], differentiable, and detached weights shaped like log_probs.
    """
    if estimator == "quadratic":
        raise ValueError(
            "estimator='quadratic' needs whole distributions, not log-probs: "
            "use ops.linear_quadratic"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    mask = _check_log_probs(log_probs, mask)
    num_samples, batch = log_probs.shape[:2]
    check_num_samples(estimator, num_samples)
    if estimator in TELESCOPES:
        telescope = Telescope(estimator, num_samples, strata)
        uniforms = torch.rand(batch, generator=generator, device=log_probs.device)
        return telescope.combine(log_probs, telescope.sample(uniforms), mask=mask)
    if estimator == "resample":
        kept = default_backward_samples(num_samples, backward_samples)
        uniforms = torch.rand(kept, batch, generator=generator, device=log_probs.device)
        return resample(log_probs, uniforms, mask=mask)
    equation = _EQUATIONS[estimator]
    if strata > 1 and estimator in INDEPENDENT_SAMPLES:
        check_groups(estimator, num_samples, strata)
        equation = functools.partial(_over_groups, equation, strata)
    return _finish(log_probs, *_at_peak(equation, _lowered(log_probs)), mask)


def resample(
    log_probs: Tensor, uniforms: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`combine` for resample, with the uniforms [K, B] on (0, 1) that choose its K samples."""
    resampled = Resampled.of(log_probs, uniforms, mask=mask)
    drawn = resampled.drawn
    index = drawn.view(*drawn.shape, *[1] * (log_probs.ndim - 2)).expand_as(resampled.weights)
    weights = resampled.weights.new_zeros(log_probs.shape)
    # One by one: a GPU adds to a sample drawn twice in any order.
    for one_index, one_weight in zip(index.split(1), resampled.weights.split(1), strict=True):
        weights.scatter_add_(0, one_index, one_weight)
    return _WithGradient.apply(log_probs, resampled.value, weights), weights


@dataclass(frozen=True)
class Resampled:
    """The K samples, drawn from M that were scored, to run again with a gradient.

    drawn: their indices [K, B]. value: iwae's. weights: of the drawn samples' log-probs, shaped
    like those of K samples.
    """

    drawn: Tensor
    value: Tensor
    weights: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, uniforms: Tensor, *, mask: Tensor | None = None) -> Resampled:
        """Draw K samples, by all M samples' log-probs and the uniforms [K, B] that choose."""
        mask = _check_log_probs(log_probs, mask)
        value, weights = _iwae(_lowered(log_probs))
        drawn, chances = draw_samples(weights, uniforms, mask=mask)
        share = 1 / (len(drawn) * chances.gather(0, drawn))  # (K, B)
        ends = [1] * (weights.ndim - 2)
        index = drawn.view(*drawn.shape, *ends).expand(-1, *weights.shape[1:])
        weights = weights.gather(0, index) * share.view(*share.shape, *ends)
        return cls(drawn, value.where(mask, 0.0), weights.where(mask, 0.0))

    def estimate(self, log_probs: Tensor) -> Tensor:
        """Return the value; its gradient flows through the drawn samples' log-probs, run again."""
        return _WithGradient.apply(log_probs, self.value, self.weights)


def draw_samples(weights: Tensor, uniforms: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Draw K whole samples for each batch row, with replacement.

    Sample m of a row is drawn with the mean of its iwae weights over the row's labels, mixed with
    a tenth of the uniform distribution. Returns the indices [K, B] and the probabilities [M, B].
    """
    num_samples = weights.shape[0]
    chances = weights
    if weights.ndim == 3:
        labelled = mask.sum(-1)
        chances = (weights * mask).sum(-1) / labelled.clamp_min(1)
        chances = chances.where(labelled > 0, 1 / num_samples)
    chances = (1 - _UNIFORM_SHARE) * chances + _UNIFORM_SHARE / num_samples
    edges = _running_sums(chances).T.contiguous()  # (B, M)
    drawn = torch.searchsorted(edges, uniforms.to(edges).T.contiguous(), right=True)
    return drawn.clamp_max(num_samples - 1).T, chances


def _running_sums(values: Tensor) -> Tensor:
    """Return the sums of the first 1, 2, ... rows of [M, B], added in fp64.

    cumsum does the same on a CPU. On a GPU it adds in an order that varies from run to run.
    """
    size = len(values)
    ones = torch.ones(size, size, dtype=torch.float64, device=values.device)
    return (ones.tril() @ values.double()).to(values)


def default_backward_samples(
    num_samples: int, backward_samples: int | None, draw_noise: float = 1.0
) -> int:
    """Return `backward_samples`, or K = sqrt(c M / 2), which balances the cost of K and its noise.

    A step costs (2M + 4K)P and its gradient's noise is 1 + c / K, c = draw_noise.
    """
    check_backward_samples(backward_samples, num_samples)
    if backward_samples is None:
        return min(num_samples, max(1, round(math.sqrt(draw_noise * num_samples / 2))))
    return backward_samples


@dataclass(frozen=True)
class Telescope:
    """Randomised telescopes of iwae: a few samples each, unbiased for iwae at `max_samples`.

    `sample` turns uniforms into levels (one for a batch, or one for each row), `draws` says how
    many samples a level needs, and `combine` takes those samples' log-probs. The telescope is cut
    at `max_samples` (mlmc: at the largest power of two within it), so E[value] = E[L_max] and the
    bias of iwae with that many samples, about -Var(p) / (2 max_samples p^2), remains.

    sumo: K units with P(K >= k) = 1/k; value = sum_k (L_k - L_{k-1}) / P(K >= k).
    mlmc: level n takes 2^n units with P(n) ~ 2^(-3n/2);
        value = mean l + (L(all) - (L(first half) + L(second half)) / 2) / P(n).

    A unit is a sample, or a stratified group of `strata` samples, whose l is the log of their mean
    probability: groups are independent of each other, and their samples are not.
    """

    estimator: str
    max_samples: int
    strata: int = 1

    def __post_init__(self) -> None:
        if self.estimator not in TELESCOPES:
            raise ValueError(f"estimator must be one of {TELESCOPES}, got {self.estimator!r}")
        check_num_samples(self.estimator, self.max_samples)
        if self.strata > 1:
            check_groups(self.estimator, self.max_samples, self.strata)

    @property
    def max_units(self) -> int:
        """The number of units that there can be at most."""
        return self.max_samples // self.strata

    @property
    def level_units(self) -> list[int]:
        """The number of units of each level, in rising order."""
        if self.estimator == "sumo":
            return list(range(1, self.max_units + 1))
        return [2**level for level in range(self.max_units.bit_length())]

    @property
    def level_draws(self) -> list[int]:
        """The number of samples of each level, in rising order."""
        return [self.strata * units for units in self.level_units]

    @property
    def probabilities(self) -> list[float]:
        """The probability of each level."""
        if self.estimator == "sumo":
            cap = self.max_units
            return [1 / (k * (k + 1)) for k in range(1, cap)] + [1 / cap]
        shares = [2 ** (-1.5 * level) for level in range(len(self.level_units))]
        return [share / sum(shares) for share in shares]

    @property
    def expected_draws(self) -> float:
        """The mean number of samples, to which a step's cost is proportional."""
        return sum(p * n for p, n in zip(self.probabilities, self.level_draws, strict=True))

    def sample(self, uniforms: Tensor) -> Tensor:
        """Draw levels by uniforms on [0, 1): int64 of their shape."""
        probabilities = torch.tensor(self.probabilities, device=uniforms.device)
        edges = _running_sums(probabilities[:, None])[:-1, 0].contiguous()
        return torch.bucketize(uniforms, edges, right=True)

    def draws(self, level: Tensor) -> Tensor:
        """Return the number of samples that each level needs."""
        return torch.tensor(self.level_draws, device=level.device)[level]

    def combine(
        self, log_probs: Tensor, level: Tensor | int, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Combine as `estimators.combine` does; each row uses its level's first samples.

        level: one for the whole batch, an int or [], or one a row, [B]; log_probs need only reach
            the deepest one. An int spares a GPU a wait.
        """
        mask = _check_log_probs(log_probs, mask)
        needed = self._needed(log_probs, level)
        lowered = _lowered(log_probs)
        weights = torch.zeros_like(lowered)
        if isinstance(level, int):
            value, weights[:needed] = self._at_level(lowered[:needed], level)
            return _finish(log_probs, value, weights, mask)
        value = torch.zeros_like(lowered[0])
        level = level.expand(mask.shape[0]).reshape(-1, *[1] * (mask.ndim - 1))
        for index, draws in enumerate(self.level_draws):
            if draws > needed:
                break
            level_value, level_weights = self._at_level(lowered[:draws], index)
            chosen = level == index
            value = torch.where(chosen, level_value, value)
            weights[:draws] = torch.where(chosen, level_weights, weights[:draws])
        return _finish(log_probs, value, weights, mask)

    def _needed(self, log_probs: Tensor, level: Tensor | int) -> int:
        """Return the number of samples of the deepest level; raise if log_probs hold fewer."""
        if isinstance(level, int):
            needed = self.level_draws[level]
        elif level.shape in (torch.Size(()), log_probs.shape[1:2]):
            needed = int(self.draws(level).max()) if level.numel() else 0
        else:
            raise ValueError(
                f"level must be one int64 or one a row, [] or {list(log_probs.shape[1:2])}, "
                f"got {list(level.shape)}"
            )
        if log_probs.shape[0] < needed:
            raise ValueError(
                f"log_probs must hold the {needed} samples of the deepest level, "
                f"got {log_probs.shape[0]}"
            )
        return needed

    def _at_level(self, log_probs: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the value and weights of a level's samples."""
        term = _sumo
        if self.estimator == "mlmc":
            term = functools.partial(_mlmc, probability=self.probabilities[level])
        return _at_peak(functools.partial(_over_groups, term, self.strata), log_probs)


def telescope_of(config: Any, num_samples: int | None = None) -> Telescope | None:
    """Return the telescope of a PerturbConfig whose estimator is one, for `num_samples` at most."""
    count = config.num_samples if num_samples is None else num_samples
    name = next(iter(config.equations))
    return Telescope(name, count, config.strata(count)) if name in TELESCOPES else None


def expected_samples(config: Any, num_samples: int | None = None) -> float:
    """Return the mean number of samples of a batch row, to which the cost of training is due.

    A step of a proposal costs what a sample costs, and counts as one.
    """
    telescope = telescope_of(config, num_samples)
    count = config.num_samples if num_samples is None else num_samples
    return (telescope.expected_draws if telescope else count) + proposal_steps(config)


def proposal_steps(config: Any) -> int:
    """Return the number of passes of one sample before those of a call, for its proposal."""
    return 0 if config.proposal == "prior" else config.proposal_steps


def effective_samples(log_probs: Tensor) -> Tensor:
    """Return 1 / sum_m w[m]^2 of the iwae weights w: from 1 (one sample has it all) to M."""
    return 1 / torch.softmax(_lowered(log_probs), dim=0).square().sum(0)


def _check_log_probs(log_probs: Tensor, mask: Tensor | None) -> Tensor:
    if not log_probs.is_floating_point() or log_probs.ndim not in (2, 3) or not len(log_probs):
        raise ValueError(
            "log_probs must be floating point [M, B, T] (token marginal) or [M, B] (sequence "
            f"marginal) with M >= 1, got {log_probs.dtype} {list(log_probs.shape)}"
        )
    if mask is None:
        return torch.ones(log_probs.shape[1:], dtype=torch.bool, device=log_probs.device)
    if mask.dtype != torch.bool or mask.shape != log_probs.shape[1:]:
        raise ValueError(
            f"mask must be bool {list(log_probs.shape[1:])}, got {mask.dtype} {list(mask.shape)}"
        )
    return mask


def _lowered(log_probs: Tensor) -> Tensor:
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    return log_probs.detach().to(dtype).clamp_min(_LOWEST)


class _WithGradient(torch.autograd.Function):
    """The value, with the weights for its gradient, whether or not they are its derivative."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.dtype = log_probs.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        return (grad * weights).to(ctx.dtype), None, None


def _finish(
    log_probs: Tensor, value: Tensor, weights: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    value, weights = value.where(mask, 0.0), weights.where(mask, 0.0)
    return _WithGradient.apply(log_probs, value, weights), weights


def _at_peak(
    equation: Callable[[Tensor], tuple[Tensor, Tensor]], log_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """An equation's value and weights, from differences to the largest log-prob.

    A constant added to all l is added to every value and leaves every weight. Sequences have
    log-probs in the thousands: in fp32 their products with M round off the samples' differences.
    """
    peak = log_probs.amax(0)
    value, weights = equation(log_probs - peak)
    return value + peak, weights


def _over_groups(
    equation: Callable[[Tensor], tuple[Tensor, Tensor]], strata: int, log_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return an equation's value and weights with stratified groups as its units.

    Groups are independent; their samples are not.
    """
    value, weights = equation(of_groups(log_probs, strata))
    shares = log_probs.unflatten(0, (-1, strata)).softmax(1)  # (units, G, ...)
    return value, (weights.unsqueeze(1) * shares).flatten(0, 1)


def of_groups(log_probs: Tensor, size: int) -> Tensor:
    """Return log mean exp of each group of `size` consecutive samples' log-probs [M, ...]."""
    if size == 1:
        return log_probs
    return log_probs.unflatten(0, (-1, size)).logsumexp(1) - math.log(size)


def _log_mean_exp(log_probs: Tensor) -> Tensor:
    return log_probs.logsumexp(0) - math.log(log_probs.shape[0])


def _jensen(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    return log_probs.mean(0), torch.full_like(log_probs, 1 / log_probs.shape[0])


def _iwae(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    return _log_mean_exp(log_probs), torch.softmax(log_probs, dim=0)


def _jvi(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    num_samples = log_probs.shape[0]
    others = _log_sum_exp_of_others(log_probs)
    value = num_samples * _log_mean_exp(log_probs) - (num_samples - 1) * (
        others - math.log(num_samples - 1)
    ).mean(0)
    # l[i] enters each L^(-j), j != i, with weight exp(l[i] - others[j]) <= 1.
    finite = _finite(log_probs)
    others = _log_sum_exp_of_others(finite)
    weights_of_others = torch.exp(finite + _log_sum_exp_of_others(-others))
    weights = num_samples * torch.softmax(log_probs, dim=0)
    return value, weights - (num_samples - 1) / num_samples * weights_of_others


def _finite(log_probs: Tensor) -> Tensor:
    """Return log-probs below the peak with impossible ones far below all others, not at -1e30.

    There log 2 rounds away, and several samples beside one that has it all would count once each.
    """
    is_possible = log_probs > _LOWEST / 2
    lowest = log_probs.where(is_possible, torch.inf).amin(0)
    return log_probs.where(is_possible, lowest - 200.0)


def _jvi_clip(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    value, weights = _jvi(log_probs)
    weights = weights.clamp_min(0.0)
    return value, weights / weights.sum(0)


def _log_sum_exp_of_others(values: Tensor) -> Tensor:
    """log sum_{i != j} exp values[i] for every j, from running sums: nothing cancels."""
    edge = torch.full_like(values[:1], -torch.inf)
    before = torch.cat([edge, values.logcumsumexp(0)[:-1]])
    after = torch.cat([values.flip(0).logcumsumexp(0).flip(0)[1:], edge])
    return torch.logaddexp(before, after)


def _sumo(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """M L_M - sum_{k<M} L_k: the telescope summed by parts, with P(K >= k) = 1/k."""
    draws = log_probs.shape[0]
    running = log_probs.logcumsumexp(0)  # log sum exp of the first k
    sizes = torch.arange(1, draws, device=log_probs.device, dtype=log_probs.dtype).log()
    shorter = running[:-1] - sizes.reshape(-1, *[1] * (log_probs.ndim - 1))
    value = draws * _log_mean_exp(log_probs) - shorter.sum(0)
    weights = draws * torch.softmax(log_probs, dim=0)
    later = (-running[:-1]).flip(0).logcumsumexp(0).flip(0)  # log sum_{k >= m, k < M} 1/sum_k
    weights[:-1] -= torch.exp(log_probs[:-1] + later)
    return value, weights


def _mlmc(log_probs: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    value, weights = _jensen(log_probs)
    if log_probs.shape[0] == 1:
        return value, weights
    whole, whole_weights = _iwae(log_probs)
    halves = [_iwae(half) for half in log_probs.chunk(2)]
    correction = whole - (halves[0][0] + halves[1][0]) / 2
    correction_weights = whole_weights - torch.cat([half[1] for half in halves]) / 2
    return value + correction / probability, weights + correction_weights / probability


_EQUATIONS = {"jensen": _jensen, "iwae": _iwae, "jvi": _jvi, "jvi_clip": _jvi_clip}
