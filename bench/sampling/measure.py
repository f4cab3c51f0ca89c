"""One unit of work: every variant on one batch of pieces, against a shared reference.

For each variant, over the repeats:

    bias                    mean error of the value, nats a token
    mse_token, mse_piece    mean squared error of a token's value, and of a piece's mean value
    variance_piece          variance of a piece's mean value about its own expectation
    variance_U, variance_W  trace of the covariance of the gradient of the values' sum, for the
                            transform and for the base's weights
    signal_U, _W            squared length of the gradient's expectation
    squared_bias_U, _W      squared distance of that expectation from the reference's gradient; the
                            repeats' own noise is subtracted from both

The expected value of quadratic is 2 p(y) - |p|^2, that of the others log p(y).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.sampling import texts
from bench.sampling.texts import Model
from fastperturb import ops
from fastperturb.config import PerturbConfig
from fastperturb.estimators import combine

SAMPLES = (4, 8, 16, 32)
# Equations that one stratified group suffices for, and those that compare groups.
ONE_GROUP = ("iwae", "jensen")
UNITS_COMPARED = ("jvi_clip", "quadratic")
# The reference: samples in groups of the largest size, with seeds that no variant has.
REFERENCE, REFERENCE_STRATA, REFERENCE_SEED = 4096, 256, 1 << 40
GRADIENT_REFERENCE = 512
AT_ONCE = 64
# The values take more repeats than the gradients, which cost five times as much.
REPEATS, GRADIENT_REPEATS = 25, 5


@dataclass(frozen=True)
class Unit:
    """A batch of pieces of a text, and the transform that perturbs them. Keys of results."""

    text: str
    scope: str
    transform: str  # initial or trained
    number: int


@dataclass(frozen=True)
class Variant:
    """An equation with M samples under one joint law. Field names are keys of results."""

    equation: str
    sampling: str
    num_samples: int


@dataclass(frozen=True)
class Draw:
    """Samples that several equations share: one pass of the model."""

    sampling: str
    num_samples: int
    equations: tuple[str, ...]

    @property
    def strata(self) -> int:
        config = PerturbConfig(
            sampling=self.sampling, num_samples=self.num_samples, estimator=self.equations[0]
        )
        return config.strata()

    def variant(self, equation: str) -> Variant:
        return Variant(equation, self.sampling, self.num_samples)


def draws(repeat: int) -> list[Draw]:
    """Return the draws of one repeat. The most samples cost half the time: every second repeat."""
    chosen = []
    for M in SAMPLES[:-1] if repeat % 2 else SAMPLES:
        compared = UNITS_COMPARED if M in (8, 16) else ()
        chosen += [
            Draw("independent", M, ONE_GROUP + compared),
            Draw("antithetic", M, ONE_GROUP),
            Draw("stratified", M, ONE_GROUP),
        ]
        if compared:
            chosen.append(Draw("stratified", M, compared))  # in two groups
    return chosen


@dataclass(frozen=True)
class Reference:
    """The marginal of very many samples: what each equation's value aims at, and a gradient."""

    log_marginal: Tensor  # [B, T - 1], fp64
    brier: Tensor  # 2 p(y) - |p|^2
    gradient: Tensor  # of the log marginal's sum, for all parameters in a row

    @classmethod
    def of(cls, model: Model, ids: Tensor) -> Reference:
        total = 0.0
        with torch.no_grad():
            for hidden in passes(model, ids, REFERENCE):
                total = total + (hidden @ model.head.T).softmax(-1).sum(0, dtype=torch.float64)
        marginal = total / REFERENCE
        chosen = marginal.gather(-1, ids[:, 1:, None])[..., 0]
        parameters = parameters_of(model)
        gradient = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for hidden in passes(model, ids, GRADIENT_REFERENCE):
            log_probs = model.log_probs(hidden, ids)
            weights = (log_probs.detach() - chosen.log()).exp() / GRADIENT_REFERENCE
            gradient += flat_gradient((weights.float() * log_probs).sum(), parameters)
        return cls(chosen.log(), 2 * chosen - marginal.square().sum(-1), gradient)

    def target(self, equation: str) -> Tensor:
        return self.brier if equation == "quadratic" else self.log_marginal


def passes(model: Model, ids: Tensor, samples: int) -> Iterator[Tensor]:
    """Yield the hidden states of the reference's samples, some at a time."""
    for part in torch.arange(samples).split(AT_ONCE):
        yield model.hidden(ids, REFERENCE_SEED, part, strata=REFERENCE_STRATA)


class Sums:
    """Sums over the repeats of one variant, in fp64."""

    def __init__(self, size: int) -> None:
        self.errors: list[Tensor] = []  # [B, T - 1]
        self.gradients = 0
        self.gradient = torch.zeros(size, dtype=torch.float64)
        self.squared_gradient = torch.zeros(size, dtype=torch.float64)

    def add_error(self, error: Tensor) -> None:
        self.errors.append(error)

    def add_gradient(self, gradient: Tensor) -> None:
        self.gradients += 1
        self.gradient += gradient
        self.squared_gradient += gradient.square()

    def row(self, reference: Tensor, split: int) -> dict[str, float]:
        """Return the variant's results; entries of the gradient up to `split` are U's."""
        errors = torch.stack(self.errors)
        pieces = errors.mean(-1)
        repeats = self.gradients
        mean = self.gradient / repeats
        variance = (self.squared_gradient / repeats - mean.square()) * (repeats / (repeats - 1))
        entries = {
            "variance": variance,
            "signal": mean.square() - variance / repeats,
            "squared_bias": (mean - reference).square() - variance / repeats,
        }
        return {
            "repeats": len(errors),
            "gradients": repeats,
            "bias": errors.mean().item(),
            "mse_token": errors.square().mean().item(),
            "mse_piece": pieces.square().mean().item(),
            "variance_piece": pieces.var(0).mean().item(),
            **{f"{name}_U": values[:split].sum().item() for name, values in entries.items()},
            **{f"{name}_W": values[split:].sum().item() for name, values in entries.items()},
        }


def parameters_of(model: Model) -> list[Tensor]:
    return [*model.transform.parameters(), *model.base.parameters()]


def flat_gradient(value: Tensor, parameters: Sequence[Tensor], *, keep: bool = False) -> Tensor:
    parts = torch.autograd.grad(value, parameters, retain_graph=keep)
    return torch.cat([part.flatten() for part in parts]).double()


def measure(unit: Unit, model: Model, ids: Tensor, reference: Reference) -> dict[str, Any]:
    """Return the results of a unit."""
    parameters = parameters_of(model)
    size = len(reference.gradient)
    split = sum(parameter.numel() for parameter in model.transform.parameters())
    sums: dict[Variant, Sums] = {}
    for repeat in range(REPEATS):
        with torch.set_grad_enabled(repeat < GRADIENT_REPEATS):
            for draw in draws(repeat):
                for equation, value in values_of(draw, model, ids, 1000 * unit.number + repeat):
                    result = sums.setdefault(draw.variant(equation), Sums(size))
                    result.add_error(value.detach().double() - reference.target(equation))
                    if value.requires_grad:
                        keep = equation != draw.equations[-1]
                        result.add_gradient(flat_gradient(value.sum(), parameters, keep=keep))
    return {
        "unit": vars(unit),
        "tokens": ids[:, 1:].numel(),
        "nll": -reference.log_marginal.mean().item(),
        "squared_gradient_U": reference.gradient[:split].square().sum().item(),
        "squared_gradient_W": reference.gradient[split:].square().sum().item(),
        "rows": [
            {**vars(variant), **result.row(reference.gradient, split)}
            for variant, result in sums.items()
        ],
    }


def values_of(draw: Draw, model: Model, ids: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each equation with its value of every label [B, T - 1], from one pass."""
    antithetic, strata = draw.sampling == "antithetic", draw.strata
    hidden = model.hidden(ids, seed, draw.num_samples, antithetic=antithetic, strata=strata)
    for equation in draw.equations:
        if equation == "quadratic":
            flat, labels = hidden.flatten(1, 2), ids[:, 1:]
            value = ops.linear_quadratic(flat, model.head, labels.flatten(), strata=strata)
            yield equation, value.view(labels.shape)
        else:
            yield equation, combine(model.log_probs(hidden, ids), equation, strata=strata)[0]


def model_of(unit: Unit) -> Model:
    model = Model.load(unit.scope)
    if unit.transform == "trained":
        texts.train(model, unit.text)
    return model
