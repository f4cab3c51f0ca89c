"""Coverage of 95% intervals over replications, and the decay of errors like 1 / sqrt(n).

Each replication draws n pairs from the small model at the truth, solves an estimating equation by
Newton's method, with one fixed set of samples as in `standard_errors`, and records if the truth is
within 1.96 errors of the solution. All replications are solved at once in closed form; the errors
of the library are compared with the closed form's sandwich.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.synthetic.small import (
    DIM,
    TRUTH,
    VOCAB,
    ClosedForm,
    everywhere,
    numbers_of_plus,
    small_model,
)
from fastperturb import noise
from fastperturb.model import PerturbedLM

REPLICATIONS = 500
NORMAL_975 = 1.959964
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Design:
    """A setting to replicate.

    antithetic: with two samples these are all values of z, and there is no Monte-Carlo noise.
    by_library: the number of replications that also compute the library's own errors.
    """

    estimator: str
    num_samples: int
    examples: int
    antithetic: bool = False
    by_library: int = 20

    @property
    def name(self) -> str:
        if self.antithetic:
            return "exact marginal"
        return f"{self.estimator}, M = {self.num_samples}"


SIZES = (250, 1000, 4000)
# Replications solved at a time: the tables of all of them would fill the memory.
AT_ONCE = 50
DESIGNS = (
    *(
        Design(estimator="iwae", num_samples=2, examples=n, antithetic=True, by_library=count)
        for n, count in zip(SIZES, (REPLICATIONS, REPLICATIONS, 100))
    ),
    *(
        Design(estimator=estimator, num_samples=M, examples=n)
        for estimator, M in (
            ("iwae", 16),
            ("iwae", 4),
            ("jvi_clip", 4),
            ("quadratic", 2),
        )
        for n in SIZES
    ),
)


def row(design: Design, *, replications: int = REPLICATIONS, seed: int = 0) -> dict[str, Any]:
    """Return the coverage with each bread, averaged over parameters, and the estimates' errors."""
    lm = small_model(design.estimator, design.num_samples, antithetic=design.antithetic)
    model = ClosedForm.of(lm)
    data = [replicate(model, design, seed + number) for number in range(replications)]
    counts = torch.stack([counted(design, *pair) for pair in data])  # (R, 12, 12, S)
    equation = Equation(model, design)
    parts = [solve(equation, part) for part in counts.split(AT_ONCE)]
    U, solved, *covariances = (torch.cat(tensors) for tensors in zip(*parts))
    breads = dict(zip(("information", "outer"), covariances))
    if design.estimator == "quadratic":  # whose value is no log-likelihood
        del breads["outer"]
    covered = {name: covers(U, covariance)[solved] for name, covariance in breads.items()}
    measured = {
        "name": design.name,
        "examples": design.examples,
        "replications": int(solved.sum()),
        "unsolved": int((~solved).sum()),
        "coverage": {name: hits.double().mean().item() for name, hits in covered.items()},
        # Ratio of the errors to the spread of the estimates: 1 is right.
        "error_over_spread": {
            name: (error_of(covariance)[solved].mean(0) / U[solved].std(0)).mean().item()
            for name, covariance in breads.items()
        },
        "bias": (U[solved] - TRUTH).mean(0).norm().item(),
        "rmse": (U[solved] - TRUTH).square().sum(1).mean().sqrt().item(),
    }
    measured["library"] = by_library(lm, design, data, U, solved, breads, seed)
    return measured


def replicate(model: ClosedForm, design: Design, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, y [n] from the model at the truth, and each row's number of samples with +1 [n]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(VOCAB, (design.examples,), generator=generator)
    truth = model.log_marginal(everywhere(TRUTH)).exp().detach()
    y = torch.multinomial(truth[x], 1, generator=generator)[:, 0]
    shape = (design.num_samples, design.examples, 1, 1)
    z = noise.latent(seed, shape, latent="rademacher", antithetic=design.antithetic)
    return x, y, (z[:, :, 0, 0] > 0).sum(0)


def counted(design: Design, x: Tensor, y: Tensor, plus: Tensor) -> Tensor:
    """Count each (x, y, number of +1) [12, 12, M + 1]: all that a closed form needs of the data."""
    counts = torch.zeros(VOCAB, VOCAB, design.num_samples + 1, dtype=torch.float64)
    return counts.index_put_((x, y, plus), torch.ones(len(x)).double(), accumulate=True)


@dataclass(frozen=True)
class Equation:
    """An estimating equation over the data of many replications at once."""

    model: ClosedForm
    design: Design

    def psi(self, U: Tensor) -> Tensor:
        """Return the gradient of the value of each (x, y, number of +1): [R, 12, 12, S, D]."""
        copies = everywhere(U)
        signs, _ = numbers_of_plus(self.design.num_samples)
        values = self.model.values(self.design.estimator, signs, copies)  # (R, 12, 12, S)
        gradients = [
            torch.autograd.grad(value.sum(), copies, retain_graph=True)[0]
            for value in values.unbind(-1)
        ]
        return torch.stack(gradients, dim=-2)

    def total(self, U: Tensor, counts: Tensor) -> Tensor:
        """Return the sum of psi over the data: [R, D]."""
        copies = everywhere(U)
        signs, _ = numbers_of_plus(self.design.num_samples)
        values = self.model.values(self.design.estimator, signs, copies)
        (gradient,) = torch.autograd.grad((counts * values).sum(), copies)
        return gradient.sum((-3, -2))

    def jacobian(self, U: Tensor, counts: Tensor, step: float = 1e-4) -> Tensor:
        """Return d total / d U [R, D, D] by central differences: some psi are no derivatives."""
        columns = []
        for offset in torch.eye(DIM, dtype=U.dtype) * step:
            rise = self.total(U + offset, counts) - self.total(U - offset, counts)
            columns.append(rise / (2 * step))
        return torch.stack(columns, dim=-1)

    def outer_products(self, U: Tensor, counts: Tensor) -> Tensor:
        """Return the sum of psi psi^T over the data: [R, D, D]."""
        psi = self.psi(U)
        return torch.einsum("rxys,rxysd,rxyse->rde", counts, psi, psi)


def solve(equation: Equation, counts: Tensor, *, steps: int = 25) -> tuple[Tensor, ...]:
    """Solve all replications by Newton's method from the truth.

    Return the solutions [R, D], a mask of those that converged [R], and the covariances by the
    sandwich and by the outer products alone [R, D, D].
    """
    U = TRUTH.expand(len(counts), DIM).clone()
    for _ in range(steps):
        total = equation.total(U, counts)
        step = torch.linalg.solve(equation.jacobian(U, counts), total)
        U = U - step.clamp(-0.2, 0.2)
        if step.abs().max() < 1e-8:
            break
    jacobian, outer = equation.jacobian(U, counts), equation.outer_products(U, counts)
    top = torch.linalg.eigvals(jacobian).real.amax(-1)
    bread = torch.linalg.inv(jacobian)
    solved = (step.abs().amax(-1) < 1e-6) & (top < 0)
    return U, solved, bread @ outer @ bread.mT, torch.linalg.inv(outer)


def error_of(covariance: Tensor) -> Tensor:
    """Return the standard errors: [R, D, D] to [R, D]."""
    return covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()


def covers(U: Tensor, covariance: Tensor) -> Tensor:
    """Tell if the 95% interval around each parameter holds the truth [R, D]."""
    return (U - TRUTH).abs() < NORMAL_975 * error_of(covariance)


def by_library(
    lm: PerturbedLM,
    design: Design,
    data: list[tuple[Tensor, Tensor, Tensor]],
    U: Tensor,
    solved: Tensor,
    breads: dict[str, Tensor],
    seed: int,
) -> dict[str, Any]:
    """Return the coverage of `lm.standard_errors`, and its largest difference from closed form."""
    chosen = solved.nonzero()[: design.by_library, 0].tolist()
    measured: dict[str, Any] = {
        "replications": len(chosen),
        "coverage": {},
        "largest_difference": {},
    }
    for bread, covariance in breads.items():
        errors = []
        for number in chosen:
            x, y, _ = data[number]
            with torch.no_grad():
                lm.transform.U.copy_(U[number][None])
            ids = torch.stack([x, y], dim=1)
            labels = ids.clone()
            labels[:, 0] = IGNORED
            batch = {"input_ids": ids, "labels": labels}
            errors.append(lm.standard_errors([batch], bread=bread, seed=seed + number).errors["U"])
        if not errors:
            continue
        error = torch.cat(errors)
        difference = error / error_of(covariance)[chosen] - 1
        hits = (U[chosen] - TRUTH).abs() < NORMAL_975 * error
        measured["coverage"][bread] = hits.double().mean().item()
        measured["largest_difference"][bread] = difference.abs().max().item()
    return measured
