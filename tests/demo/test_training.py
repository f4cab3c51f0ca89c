"""The model of the demo, its estimators and its training."""

import math

import pytest
import torch
from demo_cases import all_prefixes, seeded

from fastperturb.demo import language, training
from fastperturb.demo.methods import METHODS, Method
from fastperturb.estimators import Telescope


@pytest.fixture(scope="module")
def world() -> language.Language:
    return language.make_language(seeded())


def make_model(world: language.Language, method: str) -> training.Model:
    torch.manual_seed(0)
    return training.Model(world.embeddings, METHODS[method])


def test_the_divergence_is_zero_from_itself_and_the_missing_entropy_from_uniform() -> None:
    truth = language.truth(all_prefixes()[::97])
    assert training.divergence(truth, truth.log()).abs().max() < 1e-12
    uniform = torch.full_like(truth, -math.log(language.VOCAB))
    entropy = torch.distributions.Categorical(truth).entropy()
    torch.testing.assert_close(
        training.divergence(truth, uniform), math.log(language.VOCAB) - entropy, atol=1e-9, rtol=0
    )


def test_the_net_sees_two_tokens_of_a_contextual_prefix_and_the_transform_all() -> None:
    data = training.make_data(0, training.Setting(contextual=True, pairs=500))
    assert data.prefixes is not None and data.prefixes.shape == (500, 3)
    prefixes = data.prefixes[:4]
    other = prefixes.clone()
    other[:, 0] = (other[:, 0] + 70) % language.VOCAB
    for transform, sees in (("lowrank", False), ("gated", False), ("context", True)):
        torch.manual_seed(0)
        method = Method(name="learned", transform=transform, num_samples=4)
        model = training.Model(data.world.embeddings, method)
        assert model.transform is not None
        with torch.no_grad():
            for name in ("C", "G"):  # both start at 0
                if hasattr(model.transform, name):
                    getattr(model.transform, name).normal_()
            hidden = [model.hidden(tokens, 5, 4) for tokens in (prefixes, other)]
        assert torch.equal(*hidden) == (not sees)
    whole = training.Model(data.world.embeddings, METHODS["exact"], seen=3)
    with torch.no_grad():
        assert not torch.equal(whole.hidden(prefixes, 5, 1), whole.hidden(other, 5, 1))


def test_tokens_score_by_their_squared_distance_from_the_answer_of_the_net(
    world: language.Language,
) -> None:
    model = make_model(world, "exact")
    prefixes, targets = all_prefixes()[::500], torch.arange(42)
    answer = model.net(world.embeddings[prefixes].flatten(1))  # (B, D)
    distances = torch.cdist(answer, world.embeddings).square()
    marginal = torch.log_softmax(-model.log_sharpness.exp() * distances, dim=-1)
    log_probs = model.log_probs(prefixes, targets, 0, 1)
    torch.testing.assert_close(log_probs[0], marginal[range(42), targets], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.log_marginal(prefixes), marginal, atol=1e-4, rtol=1e-4)


def test_the_marginal_is_the_mean_probability_over_samples(world: language.Language) -> None:
    model = make_model(world, "learned")
    prefixes = torch.tensor([[3, 130], [77, 5]])
    marginal = model.log_marginal(prefixes, num_samples=64)
    for target in (0, 70, 143):
        log_probs = model.log_probs(prefixes, torch.full((2,), target), 0, 64)  # (64, 2)
        torch.testing.assert_close(marginal[:, target], log_probs.logsumexp(0) - math.log(64))


def test_methods_of_a_seed_start_from_the_same_net(world: language.Language) -> None:
    nets = [make_model(world, name).net.state_dict() for name in METHODS]
    for net in nets[1:]:
        for name, value in net.items():
            torch.testing.assert_close(value, nets[0][name], atol=0, rtol=0)


def test_a_telescope_over_listed_samples_has_the_value_and_gradient_of_all_samples(
    world: language.Language,
) -> None:
    model = make_model(world, "learned_mlmc")
    prefixes, targets = all_prefixes()[::650], torch.arange(32)
    telescope = Telescope("mlmc", 16)
    level = torch.arange(32) % 5
    seed = torch.tensor(11)

    listed, samples = training.telescoped(model, telescope, level, prefixes, targets, seed)
    full, _ = telescope.combine(model.log_probs(prefixes, targets, seed, 16), level)
    assert samples == telescope.draws(level).sum()
    torch.testing.assert_close(listed, full, atol=1e-4, rtol=1e-4)

    upstream = torch.randn(32, generator=seeded())
    parameters = [*model.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(listed, parameters, upstream),
        torch.autograd.grad(full, parameters, upstream),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


def test_fixed_noise_keeps_its_scale_along_both_axes_and_learned_noise_does_not() -> None:
    fixed = training.run_job(0, METHODS["jensen"], steps=3).movement
    learned = training.run_job(0, METHODS["learned"], steps=3).movement
    assert fixed == {axis: pytest.approx(0.15, rel=0.02) for axis in ("noisy", "precise")}
    first = training.run_job(0, METHODS["learned"], steps=1).movement
    assert learned is not None and first is not None
    assert learned["noisy"] != pytest.approx(first["noisy"], rel=1e-2)


@pytest.mark.parametrize("method", ["learned_quadratic_m2", "learned_mlmc"])
def test_the_outcome_depends_on_the_seed_alone(method: str) -> None:
    first, again, other = (training.run_job(s, METHODS[method], steps=3) for s in (4, 4, 5))
    assert first == again
    assert first.kl != other.kl
