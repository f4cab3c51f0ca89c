"""Weights are gradients; expectations are proved by enumerating rademacher latents."""

import itertools
import math

import pytest
import torch

from fastperturb import PerturbConfig, estimators, ops
from fastperturb.estimators import Telescope, combine
from fastperturb.transforms import make_transform

REDUCIBLE = ("jensen", "iwae", "jvi", "jvi_clip", "resample", "sumo", "mlmc")
EXTREMES = {
    "all impossible": torch.full((8, 2, 3), -1e30),
    "all minus infinity": torch.full((8, 2, 3), -torch.inf),
    "all equal": torch.full((8, 2, 3), -4.0),
    "one possible": torch.tensor([-2.0] + [-1e30] * 7)[:, None, None].expand(8, 2, 3),
}


def draws(*shape, spread=2.0):
    torch.manual_seed(0)
    return (spread * torch.randn(*shape, dtype=torch.float64) - 3).requires_grad_()


def log_mean_exp(log_p):
    return log_p.logsumexp(0) - math.log(len(log_p))


def jackknife(log_p):
    M = len(log_p)
    without = [log_mean_exp(torch.cat([log_p[:j], log_p[j + 1 :]])) for j in range(M)]
    return M * log_mean_exp(log_p) - (M - 1) * torch.stack(without).mean(0)


def sumo(log_p):
    terms = [
        k * (log_mean_exp(log_p[:k]) - log_mean_exp(log_p[: k - 1]))
        for k in range(2, len(log_p) + 1)
    ]
    return log_p[0] + sum(terms)


def mlmc(log_p, probability):
    if len(log_p) == 1:
        return log_p[0]
    halves = (log_mean_exp(log_p[: len(log_p) // 2]) + log_mean_exp(log_p[len(log_p) // 2 :])) / 2
    return log_p.mean(0) + (log_mean_exp(log_p) - halves) / probability


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3)])
@pytest.mark.parametrize(
    ("estimator", "formula"),
    [("jensen", lambda log_p: log_p.mean(0)), ("iwae", log_mean_exp), ("jvi", jackknife)],
)
def test_value_is_the_formula_and_weights_are_its_gradient(estimator, formula, shape):
    log_p = draws(*shape)
    value, weights = combine(log_p, estimator)
    expected = formula(log_p)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weights, torch.autograd.grad(expected.sum(), log_p)[0])


@pytest.mark.parametrize("draws_taken", [1, 2, 5, 8])
def test_sumo_is_the_telescope_and_its_weights_the_gradient(draws_taken):
    log_p = draws(8, 3, 4)
    value, weights = Telescope("sumo", 8).combine(log_p, torch.tensor(draws_taken - 1))
    expected = sumo(log_p[:draws_taken])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weights, torch.autograd.grad(expected.sum(), log_p)[0])


@pytest.mark.parametrize("level", range(4))
def test_mlmc_is_one_random_level_and_its_weights_the_gradient(level):
    log_p, telescope = draws(8, 3, 4), Telescope("mlmc", 8)
    value, weights = telescope.combine(log_p, torch.tensor(level))
    expected = mlmc(log_p[: 2**level], telescope.probabilities[level])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weights, torch.autograd.grad(expected.sum(), log_p)[0])


def test_each_row_telescopes_to_its_own_level():
    log_p, telescope, levels = draws(8, 4, 2), Telescope("mlmc", 8), torch.tensor([3, 0, 1, 0])
    value, weights = telescope.combine(log_p, levels)
    for row, level in enumerate(levels):
        alone, alone_weights = telescope.combine(log_p[:, row : row + 1], level)
        torch.testing.assert_close(value[row], alone[0])
        torch.testing.assert_close(weights[:, row], alone_weights[:, 0])


@pytest.mark.parametrize("estimator", REDUCIBLE)
def test_the_gradient_of_the_value_is_its_weights(estimator):
    log_p = draws(8, 3, 4)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    value, weights = combine(log_p, estimator, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(value, log_p, upstream)
    torch.testing.assert_close(gradient, upstream * weights)
    assert not weights.requires_grad


def test_clipped_jackknife_has_its_value_and_no_negative_weight():
    log_p = draws(6, 50, spread=4.0)
    value, weights = combine(log_p, "jvi_clip")
    jvi_value, jvi_weights = combine(log_p, "jvi")
    torch.testing.assert_close(value, jvi_value)
    assert (jvi_weights < 0).any()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("estimator", REDUCIBLE)
def test_values_and_weights_stay_finite(estimator, extreme):
    value, weights = combine(EXTREMES[extreme], estimator)
    assert torch.isfinite(value).all() and torch.isfinite(weights).all()


@pytest.mark.parametrize("estimator", REDUCIBLE)
def test_whole_sequences_of_log_probs_keep_their_precision_in_fp32(estimator):
    torch.manual_seed(0)
    log_p = 3 * torch.randn(64, 40).double() - 6000
    exact, exact_weights = combine(
        log_p.float().double(), estimator, generator=torch.Generator().manual_seed(1)
    )
    value, weights = combine(log_p.float(), estimator, generator=torch.Generator().manual_seed(1))
    assert (value - exact).abs().max() < 2e-3  # an ulp of 6000 is 5e-4
    assert (weights - exact_weights).abs().max() < 1e-4 * exact_weights.abs().max()


def test_second_derivatives_raise():
    log_p = draws(4, 3)
    (gradient,) = torch.autograd.grad(
        combine(log_p, "iwae")[0].square().sum(), log_p, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("estimator", ["jensen", "iwae", "jvi", "jvi_clip", "sumo", "mlmc"])
def test_equal_log_probs_are_their_own_marginal(estimator):
    value, weights = combine(torch.full((4, 2, 3), -5.0), estimator)
    torch.testing.assert_close(value, torch.full((2, 3), -5.0))
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 3))


@pytest.mark.parametrize("estimator", REDUCIBLE)
def test_half_precision_log_probs_are_combined_in_fp32(estimator):
    log_p = draws(4, 3, 5).to(torch.bfloat16)
    same = {"generator": torch.Generator().manual_seed(2)}
    value, weights = combine(log_p, estimator, **same)
    same = {"generator": torch.Generator().manual_seed(2)}
    expected, expected_weights = combine(log_p.float(), estimator, **same)
    assert value.dtype == weights.dtype == torch.float32
    assert torch.equal(value, expected) and torch.equal(weights, expected_weights)


@pytest.mark.parametrize("estimator", REDUCIBLE)
def test_positions_without_a_label_have_no_value_and_no_weight(estimator):
    log_p, mask = draws(4, 3, 5), torch.rand(3, 5) > 0.4
    value, weights = combine(log_p, estimator, mask=mask)
    assert (value[~mask] == 0).all() and (weights[:, ~mask] == 0).all()
    assert (value[mask] != 0).all()


def rademacher_points(latent_dim):
    return torch.tensor(
        list(itertools.product([1.0, -1.0], repeat=latent_dim)), dtype=torch.float64
    )


def enumerated_log_probs(latent_dim=2):
    """Return log p(y | z) of a small model at every latent point [2^R], all equally likely."""
    torch.manual_seed(3)
    slope = torch.randn(latent_dim, dtype=torch.float64)
    return -1.5 + rademacher_points(latent_dim) @ slope


def all_tuples(values, size):
    """Return every tuple of `size` independent samples, as log-probs [size, tuples]."""
    return torch.tensor(list(itertools.product(values.tolist(), repeat=size))).double().T


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_quadratic_gradient_over_all_pairs_is_the_exact_gradient(latent_dim):
    torch.manual_seed(0)
    config = PerturbConfig(latent_dim=latent_dim, latent="rademacher", init_scale=1.0)
    transform = make_transform(config, 5).double()
    e = torch.randn(5, dtype=torch.float64)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    leaves = [transform.U, weight]
    points = rademacher_points(latent_dim)
    perturbed = transform(e, points)  # (2^R, D)

    marginal = torch.softmax(perturbed @ weight.T, dim=-1).mean(0)
    exact = 2 * marginal[4] - marginal.square().sum()
    expected = torch.autograd.grad(exact, leaves, retain_graph=True)

    pairs = list(itertools.product(range(len(points)), repeat=2))
    first, second = (perturbed[[pair[i] for pair in pairs]] for i in range(2))
    value = ops.linear_quadratic(
        torch.stack([first, second]), weight, torch.full((len(pairs),), 4)
    ).mean()
    torch.testing.assert_close(value, exact)
    for ours, exactly in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        torch.testing.assert_close(ours, exactly)


def test_quadratic_value_of_two_stratified_groups_is_exact_on_average():
    """A group of two rademacher samples is (z, -z); its strata are dealt out for each r alone."""
    torch.manual_seed(0)
    weight, e = torch.randn(7, 5).double(), torch.randn(5).double()
    directions = torch.randn(2, 5).double()
    perturbed = e + rademacher_points(2) @ directions  # (4, D), and those of -z in reverse
    marginal = torch.softmax(perturbed @ weight.T, dim=-1).mean(0)
    exact = 2 * marginal[4] - marginal.square().sum()
    groups = torch.stack([perturbed, perturbed.flip(0)])  # (2, 4, D)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    samples = torch.cat([groups[:, pairs[:, 0]], groups[:, pairs[:, 1]]])  # (M, pairs, D)
    target = torch.full((len(pairs),), 4)
    by_groups = ops.linear_quadratic(samples, weight, target, strata=2).mean()
    torch.testing.assert_close(by_groups, exact)
    assert (ops.linear_quadratic(samples, weight, target).mean() - exact).abs() > 1e-3


@pytest.mark.parametrize("estimator", ["jvi", "jvi_clip"])
def test_jackknives_take_stratified_groups_as_their_units(estimator):
    log_p = draws(8, 2, 3)
    value, weights = combine(log_p, estimator, strata=2)
    expected = jackknife(log_p.unflatten(0, (4, 2)).logsumexp(1) - math.log(2))
    torch.testing.assert_close(value, expected)
    if estimator == "jvi":
        (slope,) = torch.autograd.grad(expected.sum(), log_p)
        torch.testing.assert_close(weights, slope)
    else:
        assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones_like(value))
    iwae = combine(log_p, "iwae")[0]
    assert torch.equal(combine(log_p, "iwae", strata=8)[0], iwae)
    with pytest.raises(ValueError, match="two or more groups of strata=8 samples"):
        combine(log_p, estimator, strata=8)


@pytest.mark.parametrize("impossible", range(1, 4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_of_the_jackknife_sum_to_one_beside_impossible_samples(dtype, impossible):
    log_p = torch.tensor([-1.0, -2.5, -2000.0, -1.5], dtype=dtype)
    log_p[1 : 1 + impossible] = -torch.inf
    _, weights = combine(log_p[:, None], "jvi")
    assert weights.sum().item() == pytest.approx(1, abs=1e-4)
    *_, by_op = ops.combine(log_p[:, None, None].float(), torch.ones(1, 1).bool(), "jvi")
    torch.testing.assert_close(weights.float(), by_op[..., 0], rtol=0, atol=1e-4)


def test_the_bias_of_iwae_falls_as_one_over_m():
    values = enumerated_log_probs(1)
    p = values.exp()
    log_marginal = p.mean().log()

    def bias(num_samples):
        hits = torch.arange(num_samples + 1, dtype=torch.float64)
        log_chance = (
            torch.lgamma(torch.tensor(num_samples + 1.0).double())
            - torch.lgamma(hits + 1)
            - torch.lgamma(num_samples - hits + 1)
            - num_samples * math.log(2)
        )
        value = ((hits * p[0] + (num_samples - hits) * p[1]) / num_samples).log()
        return (log_chance.exp() * value).sum() - log_marginal

    limit = -p.var(correction=0) / (2 * p.mean() ** 2)
    assert 64 * bias(64) == pytest.approx(limit.item(), rel=0.03)
    assert bias(64) / bias(128) == pytest.approx(2, rel=0.02)
    # combine's mean over all tuples is that same expectation
    tuples = all_tuples(values, 4)
    mean = combine(tuples, "iwae")[0].mean()
    assert (mean - log_marginal).item() == pytest.approx(bias(4).item(), rel=1e-6)


def test_the_jackknife_bias_is_of_second_order():
    values = enumerated_log_probs(1)
    log_marginal = values.logsumexp(0) - math.log(2)
    bias = {
        (name, M): (combine(all_tuples(values, M), name)[0].mean() - log_marginal).abs()
        for name in ("iwae", "jvi")
        for M in (4, 8)
    }
    assert bias["jvi", 8] < 0.2 * bias["iwae", 8]
    assert bias["jvi", 4] / bias["jvi", 8] > 3


@pytest.mark.parametrize(("estimator", "cap"), [("sumo", 4), ("mlmc", 4), ("mlmc", 2)])
def test_a_telescope_is_unbiased_for_iwae_at_its_cap(estimator, cap):
    tuples = all_tuples(enumerated_log_probs(2), cap)
    target = log_mean_exp(tuples).mean()
    telescope = Telescope(estimator, cap)
    mean = sum(
        chance * telescope.combine(tuples, torch.tensor(level))[0].mean()
        for level, chance in enumerate(telescope.probabilities)
    )
    assert mean.item() == pytest.approx(target.item(), abs=1e-7)


@pytest.mark.parametrize(("estimator", "units"), [("sumo", 3), ("mlmc", 4)])
def test_a_telescope_of_groups_is_unbiased_for_iwae_over_them_all(estimator, units):
    values = enumerated_log_probs(2)
    # Groups of two samples that depend on each other: one of three pairs, each as likely.
    pairs = torch.stack([values[[0, 3]], values[[1, 2]], values[[2, 2]]])
    chosen = torch.tensor([*itertools.product(range(3), repeat=units)]).T  # (units, 3^units)
    log_p = pairs[chosen].transpose(1, 2).flatten(0, 1).double()  # (samples, 3^units)
    log_p.requires_grad_()
    telescope = Telescope(estimator, 2 * units, strata=2)
    mean, weights = 0, 0
    for level, chance in enumerate(telescope.probabilities):
        value, level_weights = telescope.combine(log_p, level)
        own = torch.autograd.grad(value.sum(), log_p)[0]
        torch.testing.assert_close(own, level_weights)
        mean, weights = mean + chance * value.mean(), weights + chance * level_weights
    target = log_mean_exp(log_p)
    assert mean.item() == pytest.approx(target.mean().item(), abs=1e-9)
    # Weights of the samples of a pair, summed over where that pair is drawn, whatever its place.
    places = torch.arange(2 * units).view(-1, 2)

    def by_pair(weights):
        return torch.stack(
            [weights[places][:, side][chosen == pair].sum() for pair in range(3) for side in (0, 1)]
        )

    torch.testing.assert_close(
        by_pair(weights), by_pair(torch.autograd.grad(target.sum(), log_p)[0])
    )


@pytest.mark.parametrize("level", [1, torch.tensor(1), torch.tensor([1, 1])])
def test_a_level_may_be_a_number_or_a_tensor(level):
    log_p, telescope = draws(8, 2, 4), Telescope("mlmc", 8, strata=2)
    value, weights = telescope.combine(log_p, level)
    log_units = torch.stack([log_mean_exp(log_p[:2]), log_mean_exp(log_p[2:4])])
    expected = mlmc(log_units, telescope.probabilities[1])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weights, torch.autograd.grad(expected.sum(), log_p)[0])


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_combine_draws_levels_of_groups(estimator):
    log_p = draws(8, 50, 2)
    options = {"generator": torch.Generator().manual_seed(0), "strata": 2}
    _, weights = combine(log_p, estimator, **options)
    taken = (weights != 0).any(-1).sum(0)
    assert set(taken.tolist()) == set(Telescope(estimator, 8, strata=2).level_draws)


def test_a_telescope_of_one_group_raises():
    with pytest.raises(ValueError, match="two or more groups of strata=4 samples .* got 4"):
        Telescope("sumo", 4, strata=4)
    with pytest.raises(ValueError, match="two or more groups of strata=4 samples .* got 10"):
        Telescope("mlmc", 10, strata=4)


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_telescopes_match_the_exact_marginal_within_their_standard_error(estimator):
    values = enumerated_log_probs(2) * 0.5
    exact = (values.logsumexp(0) - math.log(4)).item()
    generator = torch.Generator().manual_seed(0)
    count, cap = 200_000, 32
    log_p = values[torch.randint(4, (cap, count), generator=generator)]
    value, _ = combine(log_p, estimator, generator=generator)
    error = value.std() / math.sqrt(count)
    cap_bias = values.exp().var() / (2 * cap * values.exp().mean() ** 2)
    assert abs(value.mean() - exact) < 4 * error + 1.5 * cap_bias
    # the naive mean of as many draws as the telescope takes is biased beyond that
    few = combine(log_p[: round(Telescope(estimator, cap).expected_draws)], "iwae")[0].mean()
    assert abs(few - exact) > 4 * error + 1.5 * cap_bias


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_a_telescope_draws_its_levels_with_their_probabilities(estimator):
    telescope = Telescope(estimator, 16)
    assert sum(telescope.probabilities) == pytest.approx(1)
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    levels = telescope.sample(uniforms)
    shares = torch.bincount(levels, minlength=len(telescope.level_draws)) / len(levels)
    torch.testing.assert_close(shares, torch.tensor(telescope.probabilities), atol=1e-4, rtol=0)
    taken = telescope.draws(levels)
    assert taken.double().mean().item() == pytest.approx(telescope.expected_draws, rel=1e-3)
    assert taken.max() == 16 and taken.min() == 1


@pytest.mark.parametrize("shape", [(4, 1, 3), (4, 1)])
def test_resampling_has_the_iwae_gradient_on_average(shape):
    log_p, count = draws(*shape), 20_000
    many = log_p.detach().expand(4, count, *shape[2:])
    uniforms = ((torch.arange(count) + 0.5) / count)[None]  # every sample once
    value, weights = estimators.resample(many, uniforms)
    expected, expected_weights = combine(log_p, "iwae")
    torch.testing.assert_close(value[:1], expected)
    torch.testing.assert_close(
        weights.mean(1, keepdim=True), expected_weights, atol=2e-3, rtol=2e-3
    )


def test_resampling_sends_at_most_k_samples_of_a_row_backward():
    log_p = draws(8, 50, 3)
    _, weights = combine(log_p, "resample", backward_samples=3)
    used = (weights != 0).any(-1).sum(0)
    assert used.max() == 3 and used.min() >= 1


def test_resampling_draws_by_labelled_tokens_only():
    log_p = torch.full((2, 1000, 2), -1.0)
    log_p[0, :, 0], log_p[1, :, 1] = 50.0, 90.0  # the token without a label would favour sample 1
    mask = torch.tensor([True, False]).expand(1000, 2)
    weights = combine(log_p, "resample", mask=mask, backward_samples=1)[1]
    chosen_first = (weights[0, :, 0] > 0).double().mean().item()
    assert chosen_first == pytest.approx(0.95, abs=0.03)


def test_effective_samples_count_the_samples_that_matter():
    log_p = torch.tensor([[0.0, 0.0], [0.0, -100.0], [-1e30, -100.0]])
    torch.testing.assert_close(estimators.effective_samples(log_p), torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "quadratic"}, "ops.linear_quadratic"),
        ({"estimator": "iwea"}, "estimator must be one of"),
        ({"log_probs": torch.zeros(0, 2, 3)}, "M >= 1"),
        ({"log_probs": torch.zeros(4)}, r"log_probs must be floating point \[M, B, T\]"),
        ({"log_probs": torch.zeros(4, 2, 3, dtype=torch.int64)}, "log_probs must be floating"),
        ({"log_probs": torch.zeros(1, 2, 3), "estimator": "jvi"}, "must be at least 2"),
        ({"estimator": "resample", "backward_samples": 0}, "backward_samples must be a positive"),
        ({"estimator": "resample", "backward_samples": 9}, "must not exceed num_samples=4, got 9"),
        ({"mask": torch.ones(2, 3)}, r"mask must be bool \[2, 3\]"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, r"mask must be bool \[2, 3\]"),
    ],
)
def test_bad_arguments_raise_by_name(changes, message):
    arguments = {"log_probs": torch.zeros(4, 2, 3), "estimator": "iwae", **changes}
    with pytest.raises(ValueError, match=message):
        combine(**arguments)


def test_a_telescope_with_too_few_samples_raises():
    with pytest.raises(ValueError, match="must hold the 8 samples of the deepest level, got 4"):
        Telescope("mlmc", 8).combine(torch.zeros(4, 2, 3), torch.tensor([0, 3]))
