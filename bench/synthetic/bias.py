"""Each equation's bias, exactly: what it expects of M draws of the small model, by finite sums.

Of the value, against what it estimates: log p(y), or 2 p(y) - |p|^2 for the quadratic equation.
Of the gradient, against that one's. And of the answer: the U at which training by it ends
where data are endless, over the true one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.synthetic.small import (
    TRUTH,
    WORDS,
    ClosedForm,
    every_sequence,
    everywhere,
    numbers_of_plus,
    small_model,
)
from fastperturb.estimators import Telescope

EQUATIONS = ("jensen", "iwae", "jvi", "jvi_clip", "quadratic", "sumo", "mlmc")
DRAWS = (2, 4, 8, 16, 32)
# Gradient ascent: the quadratic equation's gradients are a tenth of the others'.
RATE = {equation: 3.0 if equation == "quadratic" else 0.3 for equation in EQUATIONS}
MOMENTUM = 0.95
MOST_STEPS = 1500
# All sequences of so many signs are summed; beyond, only their numbers of +1.
LONGEST = 8


def rows() -> list[dict[str, Any]]:
    """One row for each equation and number of draws."""
    model = ClosedForm.of(small_model("iwae", 2))
    return [
        {
            "equation": equation,
            "num_samples": M,
            **biases(model, equation, M),
            "solution": solution(model, equation, M),
        }
        for equation in EQUATIONS
        for M in DRAWS
        if equation not in ("sumo", "mlmc") or M <= LONGEST
    ]


def biases(model: ClosedForm, equation: str, M: int) -> dict[str, float]:
    """Over x, and over y by the truth, the biases at TRUTH.

    value: the mean of E[value] - target. gradient: the root mean square of E[gradient] - target's
    gradient, over that of the target's gradient.
    """
    U = everywhere(TRUTH)
    law = model.log_marginal(U).exp().detach() / WORDS  # [12, 12], sums to 1
    found, wanted = expected(model, equation, M, U), target(model, equation, U)
    slopes = [torch.autograd.grad(each.sum(), U)[0] for each in (found, wanted)]
    size, off = (
        (law[..., None] * each.square()).sum().sqrt() for each in (slopes[1], slopes[0] - slopes[1])
    )
    return {
        "value": (law * (found - wanted)).sum().item(),
        "gradient": (off / size).item(),
    }


def expected(model: ClosedForm, equation: str, M: int, U: Tensor) -> Tensor:
    """E[value] at each (x, y), where U is given for each: [12, 12, D] to [12, 12]."""
    if equation not in ("sumo", "mlmc"):
        signs, probability = numbers_of_plus(M)
        return model.values(equation, signs, U) @ probability
    telescope = Telescope(equation, M)
    total = torch.zeros(WORDS, WORDS, dtype=torch.float64)
    for level, (draws, share) in enumerate(zip(telescope.level_draws, telescope.probabilities)):
        signs, probability = every_sequence(draws)
        values = model.level_values(telescope, level, signs, U)
        total = total + share * (values @ probability)
    return total


def target(model: ClosedForm, equation: str, U: Tensor) -> Tensor:
    """What the value estimates, at each (x, y)."""
    if equation != "quadratic":
        return model.log_marginal(U)
    both = (model.hidden(U) @ model.head.T).softmax(-1).mean(0)  # (12, 12, 12): p(. | x)
    return 2 * both.diagonal(dim1=-2, dim2=-1) - both.square().sum(-1)


def solution(model: ClosedForm, equation: str, M: int) -> float:
    """|U| over |TRUTH| where ascent by the equation's mean gradient ends, from TRUTH."""
    law = model.log_marginal(everywhere(TRUTH)).exp().detach() / WORDS
    U, step = TRUTH.clone(), torch.zeros_like(TRUTH)
    for _ in range(MOST_STEPS):
        each = everywhere(U)
        (slope,) = torch.autograd.grad((law * expected(model, equation, M, each)).sum(), each)
        step = MOMENTUM * step + RATE[equation] * slope.sum((0, 1))
        U = U + step
        if step.norm() < 1e-8:
            break
    return (U.norm() / TRUTH.norm()).item()
