"""Telescopes: every batch row runs the samples of its own level."""

import functools
import itertools

import pytest
import torch
from batches import batch, row_of
from oracles import assert_near
from tiny import llama, perturbed

from fastperturb import estimators
from fastperturb.engine import levels, memory, planner, sharding

M = 4


def telescoped(estimator="mlmc", **options):
    options = {"num_samples": M, "latent_dim": 4, **options}
    return perturbed(llama(), estimator=estimator, **options)


def at_levels(monkeypatch, numbers):
    """Let the rows of the next calls have these levels, whatever their seeds are."""
    monkeypatch.setattr(levels, "_drawn", lambda lm, batch: torch.tensor(numbers))


def step(lm, inputs, **options):
    """Return the output of a call and the gradient of its loss, as one vector."""
    out = lm(**inputs, seed=5, **options)
    grads = torch.autograd.grad(out.loss, [*lm.parameters()])
    return out, torch.cat([grad.flatten() for grad in grads])


def a_prefix(inputs):
    """Return the mask that leaves the first four positions as they are."""
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, :4] = False
    return mask


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_outputs_are_those_of_rows_that_run_alone(marginal, with_prefix, monkeypatch):
    lm = telescoped(marginal=marginal)
    inputs = batch(4)
    if with_prefix:
        inputs = batch(4, right=0) | {"perturb_mask": a_prefix(batch(4))}
    numbers = [2, 0, 1, 0]
    at_levels(monkeypatch, numbers)
    whole, gradient = step(lm, inputs, num_items_in_batch=20, return_logits=True)
    alone, gradients = [], []
    for row, number in enumerate(numbers):
        at_levels(monkeypatch, [number])
        options = {"num_items_in_batch": 20, "return_logits": True, "rows": torch.tensor([row])}
        out, grad = step(lm, row_of(inputs, row), **options)
        alone.append(out)
        gradients.append(grad)
    near = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    near(whole.loss, sum(out.loss for out in alone))
    assert_near(gradient, sum(gradients), rel=1e-4, floor=1e-6)
    for name in ("log_marginal", "logits"):
        near(getattr(whole, name), torch.cat([getattr(out, name) for out in alone]))
    assert len(whole.log_probs) == M
    for row, out in enumerate(alone):
        taken = len(out.log_probs)
        near(whole.log_probs[:taken, row], out.log_probs[:, 0])
        assert whole.log_probs[taken:, row].isnan().all()
    labelled = torch.tensor([float((out.log_marginal != 0).sum()) for out in alone])
    positions = (inputs["attention_mask"] * inputs.get("perturb_mask", 1)).sum(1)
    for name, count in {"ess": labelled, "log_prob_variance": labelled, "shift": positions}.items():
        values = torch.stack([getattr(out, name) for out in alone])
        near(getattr(whole, name), (values * count).sum() / count.sum())


def test_the_mean_over_the_levels_of_all_rows_is_the_gradient_of_iwae(monkeypatch):
    lm = telescoped("sumo", num_samples=3)  # whose mean over levels is L_M for any samples
    inputs, chances = batch(2), estimators.Telescope("sumo", 3).probabilities
    loss, gradient = 0, 0
    for numbers in itertools.product(range(3), repeat=2):
        at_levels(monkeypatch, numbers)
        out, grad = step(lm, inputs)
        chance = chances[numbers[0]] * chances[numbers[1]]
        loss, gradient = loss + chance * out.loss, gradient + chance * grad
    with lm.overriding(estimator="iwae"):
        expected, expected_gradient = step(lm, inputs)
    torch.testing.assert_close(loss, expected.loss)
    assert_near(gradient, expected_gradient, rel=1e-4, floor=1e-6)


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_a_level_of_stratified_samples_is_of_whole_groups(estimator, monkeypatch):
    lm = telescoped(estimator, num_samples=8, sampling="stratified", group_size=2)
    telescope = estimators.Telescope(estimator, 8, strata=2)
    at_levels(monkeypatch, [0, 1, 2])
    out = lm(**batch(right=0), seed=5)
    assert out.log_probs.isfinite().all(-1).sum(0).tolist() == telescope.level_draws[:3]
    value, _ = telescope.combine(out.log_probs.detach().nan_to_num(), torch.tensor([0, 1, 2]))
    assert out.loss.item() == pytest.approx(-value.mean().item(), rel=1e-5)
    with lm.overriding(estimator="iwae"):  # the same samples, all of them
        everything = lm(**batch(right=0), seed=5).log_probs
    torch.testing.assert_close(out.log_probs[:2, 0], everything[:2, 0], rtol=1e-4, atol=1e-5)


def test_processes_that_share_shards_have_one_level_a_step(monkeypatch):
    lm = telescoped(num_samples=16)
    monkeypatch.setattr(sharding, "is_sharded", lambda module: True)
    counts = set()
    for seed in range(12):
        log_probs = lm(**batch(), seed=seed).log_probs
        assert log_probs.isfinite().all()
        counts.add(len(log_probs))
    assert len(counts) > 2


def test_a_packed_row_has_one_level_for_all_of_its_documents():
    lm = telescoped()
    inputs = batch(6, right=0)
    del inputs["attention_mask"]
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(6, -1)
    rows = torch.arange(6)[:, None] * 2 + (torch.arange(9) >= 4)
    taken = lm(**inputs, position_ids=positions, rows=rows, seed=1).log_probs.isfinite()
    assert (taken == taken[..., :1]).all() and not taken[1:].all()
    first = lm(**inputs, rows=rows[:, 0], seed=1).log_probs.isfinite()
    assert torch.equal(taken, first)


def test_auto_counts_the_samples_of_all_levels(monkeypatch):
    lm = telescoped()
    at_levels(monkeypatch, [0, 0, 1, 2])
    lm(**batch(4), seed=5)
    report = lm.plan_report()  # of the deepest level's row
    assert (report.plan, report.chunk_size) == ("batched", 4)
    row = report.bytes_per_sample  # a sample of one row; the call has 8 of them
    for samples, plan in ((5, "chunked"), (9, "batched")):
        free = 1.2 / 0.7 * samples * row
        monkeypatch.setattr(memory, "spare_bytes", lambda owner, device, free=free: int(free))
        lm.state.planner = planner.Planner()
        out = lm(**batch(4), seed=5)
        assert lm.plan_report().plan == plan
        out.loss.backward()
