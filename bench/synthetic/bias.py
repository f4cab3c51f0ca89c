"""The bias of each estimator with M samples, computed exactly on the small model by finite sums.

Three biases: of the value, against its target, log p(y), or 2 p(y) - |p|^2 for quadratic; of the
gradient, against the gradient of that target; and of the solution, the U where training ends with
unlimited data, relative to the true U.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.synthetic.small import (
    TRUTH,
    VOCAB,
    ClosedForm,
    every_sequence,
    everywhere,
    numbers_of_plus,
    small_model,
)
from fastperturb.estimators import Telescope

ESTIMATORS = ("jensen", "iwae", "jvi", "jvi_clip", "quadratic", "sumo", "mlmc")
SAMPLES = (2, 4, 8, 16, 32)
# Of gradient ascent: the gradients of quadratic are a tenth of the others'.
RATE = {estimator: 3.0 if estimator == "quadratic" else 0.3 for estimator in ESTIMATORS}
MOMENTUM = 0.95
MOST_STEPS = 1500
# Telescopes depend on the order of signs, and all sequences are summed: up to this length.
LONGEST = 8


def rows() -> list[dict[str, Any]]:
    """Return a row for each estimator and number of samples; "equation" is a key of results."""
    model = ClosedForm.of(small_model("iwae", 2))
    return [
        {
            "equation": estimator,
            "num_samples": M,
            **biases(model, estimator, M),
            "solution": solution(model, estimator, M),
        }
        for estimator in ESTIMATORS
        for M in SAMPLES
        if estimator not in ("sumo", "mlmc") or M <= LONGEST
    ]


def biases(model: ClosedForm, estimator: str, M: int) -> dict[str, float]:
    """Return the biases at TRUTH, averaged over (x, y) of the true distribution.

    value: mean of E[value] - target. gradient: root mean square of E[gradient] - target gradient,
    relative to that of the target gradient.
    """
    U = everywhere(TRUTH)
    truth = model.log_marginal(U).exp().detach() / VOCAB  # [12, 12], sums to 1
    expectation, unbiased = expected(model, estimator, M, U), target(model, estimator, U)
    (gradient,) = torch.autograd.grad(expectation.sum(), U)
    (target_gradient,) = torch.autograd.grad(unbiased.sum(), U)
    size, error = (
        (truth[..., None] * vector.square()).sum().sqrt()
        for vector in (target_gradient, gradient - target_gradient)
    )
    return {
        "value": (truth * (expectation - unbiased)).sum().item(),
        "gradient": (error / size).item(),
    }


def expected(model: ClosedForm, estimator: str, M: int, U: Tensor) -> Tensor:
    """Return E[value] at each (x, y), with a U for each: [12, 12, D] to [12, 12]."""
    if estimator not in ("sumo", "mlmc"):
        signs, probability = numbers_of_plus(M)
        return model.values(estimator, signs, U) @ probability
    telescope = Telescope(estimator, M)
    total = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for level, (samples, share) in enumerate(zip(telescope.level_draws, telescope.probabilities)):
        signs, probability = every_sequence(samples)
        values = model.level_values(telescope, level, signs, U)
        total = total + share * (values @ probability)
    return total


def target(model: ClosedForm, estimator: str, U: Tensor) -> Tensor:
    """Return the quantity that the value estimates, at each (x, y)."""
    if estimator != "quadratic":
        return model.log_marginal(U)
    marginal = (model.hidden(U) @ model.head.T).softmax(-1).mean(0)  # (12, 12, 12): p(. | x)
    return 2 * marginal.diagonal(dim1=-2, dim2=-1) - marginal.square().sum(-1)


def solution(model: ClosedForm, estimator: str, M: int) -> float:
    """Return |U| / |TRUTH| where ascent by the estimator's mean gradient ends, from TRUTH."""
    truth = model.log_marginal(everywhere(TRUTH)).exp().detach() / VOCAB
    U, step = TRUTH.clone(), torch.zeros_like(TRUTH)
    for _ in range(MOST_STEPS):
        copies = everywhere(U)
        value = (truth * expected(model, estimator, M, copies)).sum()
        (gradient,) = torch.autograd.grad(value, copies)
        step = MOMENTUM * step + RATE[estimator] * gradient.sum((0, 1))
        U = U + step
        if step.norm() < 1e-8:
            break
    return (U.norm() / TRUTH.norm()).item()
