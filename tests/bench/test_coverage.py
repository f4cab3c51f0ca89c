"""The statistical claims: biases with few samples, and the coverage of intervals."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bench.synthetic import bias, coverage
from bench.synthetic.small import TRUTH, ClosedForm, everywhere, small_model
from fastperturb.estimators import Telescope, combine


@pytest.fixture(scope="module")
def model() -> ClosedForm:
    return ClosedForm.of(small_model("iwae", 2))


def test_the_closed_form_is_the_librarys_model() -> None:
    lm = small_model("iwae", 2, antithetic=True)  # both signs: all values of z
    with torch.no_grad():
        lm.transform.U.copy_(TRUTH[None])
    ids = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    out = lm(input_ids=ids, labels=ids, seed=3)
    expected = ClosedForm.of(lm).log_marginal(everywhere(TRUTH)).flatten()
    torch.testing.assert_close(out.log_marginal[:, 0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["jensen", "iwae", "jvi", "jvi_clip", "sumo", "mlmc"])
def test_expectations_are_sums_over_every_sequence_of_samples(
    model: ClosedForm, estimator: str
) -> None:
    M, U = 4, everywhere(TRUTH)
    plus, minus = model.log_probs(U).detach().unbind()  # (12, 12) each
    total = torch.zeros(12, 12, dtype=torch.float64)
    for signs in itertools.product((0, 1), repeat=M):
        drawn = torch.stack([minus if sign else plus for sign in signs])
        if estimator in ("sumo", "mlmc"):
            telescope = Telescope(estimator, M)
            for level, share in enumerate(telescope.probabilities):
                total += share * telescope.combine(drawn, torch.tensor(level))[0] / 2**M
        else:
            total += combine(drawn, estimator)[0] / 2**M
    torch.testing.assert_close(bias.expected(model, estimator, M, U), total)


def test_quadratic_is_unbiased_with_two_samples(model: ClosedForm) -> None:
    U = everywhere(TRUTH + 0.1)
    p = model.log_probs(U).detach().exp().mean(0)  # (12, 12)
    expected = 2 * p - p.square().sum(1, keepdim=True)
    torch.testing.assert_close(bias.expected(model, "quadratic", 2, U), expected)
    torch.testing.assert_close(bias.target(model, "quadratic", U), expected)


def test_telescopes_have_the_bias_of_iwae_at_their_deepest_level(model: ClosedForm) -> None:
    U = everywhere(TRUTH)
    deepest = bias.expected(model, "iwae", 8, U)
    for estimator in ("sumo", "mlmc"):
        torch.testing.assert_close(bias.expected(model, estimator, 8, U), deepest)


def test_the_bias_of_iwae_falls_like_one_over_its_samples(model: ClosedForm) -> None:
    biases = {M: bias.biases(model, "iwae", M) for M in (16, 32)}
    for part in ("value", "gradient"):
        assert biases[16][part] / biases[32][part] == pytest.approx(2, rel=0.08)
    # The first-order term: -Var(p) / (2 M p^2).
    U = everywhere(TRUTH)
    p = model.log_probs(U).detach().exp()
    truth = p.mean(0) / 12
    first = -(truth * p.var(0, correction=0) / (2 * 32 * p.mean(0).square())).sum().item()
    assert biases[32]["value"] == pytest.approx(first, rel=0.1)


def test_the_bias_of_jvi_falls_faster(model: ClosedForm) -> None:
    biases = {M: bias.biases(model, "jvi", M) for M in (16, 32)}
    assert biases[16]["gradient"] / biases[32]["gradient"] > 4


def test_with_few_samples_iwae_learns_too_little_noise_and_jensen_none(model: ClosedForm) -> None:
    assert bias.solution(model, "iwae", 4) < 0.8
    assert bias.solution(model, "iwae", 2) < 0.4
    assert bias.solution(model, "jensen", 4) < 1e-6
    assert bias.solution(model, "jvi_clip", 4) == pytest.approx(1, abs=0.02)
    assert bias.solution(model, "quadratic", 2) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("estimator", ["iwae", "jvi_clip", "quadratic"])
def test_the_librarys_errors_are_the_closed_forms_sandwich(estimator: str) -> None:
    design = coverage.Design(estimator=estimator, num_samples=4, examples=500, by_library=3)
    measured = coverage.row(design, replications=3)["library"]
    assert measured["replications"] == 3
    assert all(off < 5e-3 for off in measured["largest_difference"].values())


def test_estimates_approach_the_truth_like_one_over_the_root_of_n() -> None:
    few, many = (
        coverage.row(replace(coverage.DESIGNS[0], examples=n, by_library=0), replications=150)
        for n in (400, 6400)
    )
    assert few["rmse"] / many["rmse"] == pytest.approx(4, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "design",
    [
        replace(coverage.DESIGNS[0], examples=1000),
        coverage.Design(estimator="quadratic", num_samples=2, examples=4000),
    ],
    ids=["exact", "quadratic"],
)
def test_95_percent_intervals_cover_in_95_percent_of_replications(
    design: coverage.Design,
) -> None:
    replications = 300
    measured = coverage.row(replace(design, by_library=40), replications=replications)
    # The three parameters' hits are correlated, so the bound is that of one parameter's.
    bound = 3 * math.sqrt(0.95 * 0.05 / replications)
    for covered in measured["coverage"].values():
        assert abs(covered - 0.95) < bound
    for covered in measured["library"]["coverage"].values():
        assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 40)


@pytest.mark.slow
def test_errors_by_outer_products_alone_are_too_small_with_few_samples() -> None:
    design = coverage.Design(estimator="jvi_clip", num_samples=4, examples=1000, by_library=0)
    measured = coverage.row(design, replications=200)
    # The spread of 200 estimates is known to 5%.
    assert measured["error_over_spread"]["information"] == pytest.approx(1, abs=0.15)
    assert measured["error_over_spread"]["outer"] < 0.85
