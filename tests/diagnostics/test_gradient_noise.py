"""Gradient noise against enumeration of all latents and resampled ones, and what it decides."""

import dataclasses
import itertools
import math

import batches
import pytest
import tiny
import torch
from batches import labelled, row_of

from fastperturb import PerturbConfig, estimators, wrap

V, B, T = 23, 3, 5


def llama(*, layers=1):
    return tiny.llama(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        head_dim=4,
        initializer_range=0.5,
        pad_token_id=None,  # else the embedding of token 0 is zero, and its gradient huge
    )


def perturbed(base=None, **options):
    options = {"latent_dim": 2, "num_samples": 4, "plan": "batched", "init_scale": 0.5, **options}
    return tiny.perturbed(llama() if base is None else base, seed=1, **options)


def batch(rows=B):
    inputs = batches.batch(rows, T, vocab=V, lowest=0, right=0, unlabelled=3, seed=2)
    return {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}


def by_name(report):
    """Return the rows of a report by estimator and K."""
    return {(row.estimator, row.backward_samples): row for row in report.rows}


def enumerated(lm, inputs):
    """Return the exact variances from latents, resampling (K = 1) and data, and the squared mean.

    They are those of iwae with one sign a sequence and M = 2, where a row has four equally likely
    pairs of latents.
    """
    (U,) = lm.transform.parameters()
    count = labelled(inputs).sum()
    means, latents, draws = [], 0.0, 0.0
    for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
        e = lm.base.get_input_embeddings()(ids[None])
        rows = []
        for pair in itertools.product((-1.0, 1.0), repeat=2):
            embeddings = [lm.transform(e, torch.tensor([z])) for z in pair]
            with lm.exact():
                log_probs = [lm(inputs_embeds=x, labels=labels[None]).log_probs for x in embeddings]
            log_probs = torch.cat(log_probs)  # (M, 1, T - 1)
            mask = labels[None, 1:] != -100
            _, weights = estimators.combine(log_probs, "iwae", mask=mask)
            parts = (weights * log_probs).sum((1, 2)) / count
            grads = [torch.autograd.grad(part, U, retain_graph=True)[0] for part in parts]
            probabilities = 0.9 * (weights * mask).sum((1, 2)) / mask.sum() + 0.1 / 2
            whole = sum(grads)
            resampled = sum(g.square().sum() / q for g, q in zip(grads, probabilities, strict=True))
            draws += (resampled - whole.square().sum()) / 4
            rows.append(whole)
        rows = torch.stack(rows)
        latents += rows.var(0, correction=0).sum()
        means.append(rows.mean(0))
    means = torch.stack(means)
    data = len(means) * means.var(0).sum()
    return {
        "latents": latents.item(),
        "draws": draws.item(),
        "data": data.item(),
        "signal": means.sum(0).square().sum().item(),
    }


def two_valued(**options):
    fixed = {"latent": "rademacher", "latent_dim": 1, "scope": "sequence"}
    options = {**fixed, "sampling": "independent", **options}
    return perturbed(llama(layers=0), num_samples=2, **options)


def test_every_variance_matches_enumeration():
    lm, inputs = two_valued(), batch()
    exact = enumerated(lm, inputs)
    report = lm.gradient_noise(**inputs, repeats=300, estimators=[], seed=1)
    latents, draws, data = exact["latents"], exact["draws"], exact["data"]
    table, close = by_name(report), {"rel": 0.15}
    iwae = table["iwae", None]
    assert iwae.variance == pytest.approx(latents, **close)
    assert iwae.signal == pytest.approx(exact["signal"], **close)
    assert 1 + report.data_noise == pytest.approx(1 + data / latents, **close)
    assert report.draw_noise == pytest.approx(draws / (latents + data), **close)
    for kept in (1, 2):
        drawn = table["resample", kept].variance - iwae.variance
        assert drawn == pytest.approx(draws / kept, **close)


@pytest.mark.parametrize("rows", [3, 4])
def test_data_noise_is_the_variance_between_batch_rows(rows):
    inputs = batch(rows)
    lm = perturbed(init_scale=1e-3)  # the latents hardly matter
    report = lm.gradient_noise(**inputs, repeats=40, parameters="trainable", seed=1)
    count = labelled(inputs).sum()
    parameters = [value for value in lm.parameters() if value.requires_grad]
    per_row = []
    for row in range(rows):
        part = row_of(inputs, row)
        with lm.exact():
            loss = lm(**part, num_items_in_batch=count).loss
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        per_row.append(torch.cat([grad.flatten() for grad in grads]))
    expected = rows * torch.stack(per_row).var(0).sum()
    assert report.data_noise * report.rows[0].variance == pytest.approx(expected.item(), rel=0.1)
    assert report.data_noise > 10 and report.backward_samples == 1


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_resampling_k_samples_adds_variance_like_one_over_k(marginal):
    inputs, lm = batch(), perturbed(backward_samples=2, marginal=marginal)
    split = by_name(lm.gradient_noise(**inputs, repeats=150, estimators=[], seed=4))
    resampling = wrap(lm.base, PerturbConfig(**{**lm.config.to_dict(), "estimator": "resample"}))
    resampling.load_state_dict(lm.state_dict())
    ours, resampled = (
        torch.stack(
            [
                torch.autograd.grad(model(**inputs, seed=seed).loss, model.transform.U)[0]
                for seed in range(200)
            ]
        )
        for model in (lm, resampling)
    )
    added = (resampled - ours).square().sum((1, 2)).mean().item()
    whole = ours.var(0).sum().item() + added
    assert resampled.var(0).sum().item() == pytest.approx(whole, rel=0.1)
    ours_split = split["resample", 2].variance - split["iwae", None].variance
    assert ours_split == pytest.approx(added, rel=0.3)  # not 1 or 1 / 4 of one draw's


def test_costs_follow_the_plan_and_gains_follow_the_costs():
    report = perturbed(num_samples=8).gradient_noise(
        **batch(), repeats=4, estimators=["sumo", {"iwae": 1.0, "quadratic": 2.0}], seed=5
    )
    costs = [row.cost for row in report.rows]
    telescope = estimators.Telescope("sumo", 8)
    assert costs == pytest.approx([32, 4 * telescope.expected_draws, 32, 20, 24, 32, 48])
    iwae, *_ = report.rows
    assert iwae.at_equal_flops == 1 and iwae.plan == "batched"
    data = report.data_noise * iwae.variance
    assert report.rows[2].signal > 0
    for row in report.rows[2:]:
        noise = row.variance * iwae.signal / row.signal + data
        expected = (iwae.variance + data) / noise * 32 / row.cost
        assert row.at_equal_flops == pytest.approx(expected)
        assert row.signal_to_noise == row.signal / row.variance
    assert "resample K=8" in str(report) and len(str(report).splitlines()) == 8


def test_a_proposal_costs_its_steps_in_every_row():
    lm = perturbed(num_samples=4, scope="sequence", proposal="gradient", proposal_steps=3)
    report = lm.gradient_noise(**batch(), repeats=2, estimators=["sumo"], seed=5)
    telescope = estimators.Telescope("sumo", 4)
    costs = [row.cost for row in report.rows]
    assert costs == pytest.approx([28, 4 * telescope.expected_draws + 12, 24, 28, 36])
    assert report.rows[0].at_equal_flops == 1


def test_chunked_plan_costs_more_and_has_the_same_variance():
    plain, chunked = perturbed(), perturbed(plan="chunked", chunk_size=2)
    tables = [by_name(lm.gradient_noise(**batch(), repeats=3, seed=6)) for lm in (plain, chunked)]
    assert tables[0].keys() == tables[1].keys()
    for name, row in tables[1].items():
        assert row.variance == pytest.approx(tables[0][name].variance, rel=1e-4)
    assert tables[1]["iwae", None].cost == tables[1]["jvi_clip", None].cost == 6 * 4
    assert tables[1]["iwae", None].at_equal_flops == pytest.approx(4 / 6)
    assert [tables[1]["resample", kept].cost for kept in (1, 2, 4)] == [12, 16, 8 + 6 * 4]


def test_near_equal_weights_have_draw_noise_of_m_minus_1():
    lm = perturbed(num_samples=8, init_scale=1e-3, latent_dim=4, sampling="independent")
    report = lm.gradient_noise(**batch(1), repeats=60, estimators=[], seed=7)
    assert report.data_noise == 0
    assert report.draw_noise == pytest.approx(7, rel=0.2)
    assert report.backward_samples == 5


@pytest.mark.parametrize("noise, kept", [(0.0, 1), (0.1, 1), (1.0, 4), (4.0, 8), (100.0, 32)])
def test_default_k_is_the_best_at_equal_flops_and_at_most_m(noise, kept):
    assert estimators.default_backward_samples(32, None, noise) == kept
    costs = {K: (2 * 32 + 4 * K) * (1 + noise / K) for K in range(1, 33)}
    assert costs[kept] <= 1.01 * min(costs.values())
    assert estimators.default_backward_samples(32, 3, noise) == 3


def test_measured_k_changes_nothing_until_it_is_configured():
    lm = perturbed(num_samples=8, estimator="resample", plan="auto", init_scale=1e-3)
    lm(**batch(1))
    before = lm.plan_report()
    measured = lm.gradient_noise(**batch(1), repeats=20, seed=8).backward_samples
    assert measured > 3 and lm.plan_report() is before
    lm(**batch(1))
    assert "2 of them" in before.reason and "2 of them" in lm.plan_report().reason
    lm.config = dataclasses.replace(lm.config, backward_samples=measured)
    lm(**batch(1))
    assert f"{measured} of them" in lm.plan_report().reason
    whole = wrap(lm.base, dataclasses.replace(lm.config, plan="batched"))
    whole.load_state_dict(lm.state_dict())
    grads = [
        torch.autograd.grad(model(**batch(), seed=9).loss, model.transform.U)[0]
        for model in (lm, whole)
    ]
    torch.testing.assert_close(*grads)


def test_configured_k_stays_after_a_measurement():
    lm = perturbed(num_samples=8, plan="resample", backward_samples=1)
    lm.gradient_noise(**batch(1), repeats=2)
    lm(**batch(1))
    assert "1 of them" in lm.plan_report().reason


def test_gradients_and_the_random_state_stay_unchanged():
    lm, inputs = perturbed(), batch()
    lm(**inputs, seed=1).loss.backward()
    before = {name: value.grad.clone() for name, value in lm.named_parameters()}
    state, config = torch.get_rng_state(), lm.config
    options = {**inputs, "repeats": 2, "parameters": "trainable"}
    with torch.no_grad():
        first = lm.gradient_noise(**options)
    assert torch.equal(torch.get_rng_state(), state) and lm.config is config
    for name, value in lm.named_parameters():
        assert torch.equal(value.grad, before[name])
    assert lm.gradient_noise(**options) == first
    torch.rand(1)
    assert lm.gradient_noise(**options) != first
    held = lm.gradient_noise(**options, seed=3)
    assert held == lm.gradient_noise(**options, seed=torch.tensor(3), rows=None)
    assert held == lm.gradient_noise(**options, seed=3, rows=torch.arange(B))
    assert held != lm.gradient_noise(**options, seed=3, rows=torch.arange(B) + 1)


def test_trainable_parameters_add_their_own_variance():
    lm = perturbed(tiny.with_lora(llama(), r=2, target_modules=["q_proj"]))
    options = {**batch(), "repeats": 3, "estimators": [], "seed": 3}
    transform, trainable = (
        lm.gradient_noise(**options, parameters=name).rows[0] for name in ("transform", "trainable")
    )
    assert trainable.variance > 1.01 * transform.variance
    lm.transform.requires_grad_(False)
    adapter = lm.gradient_noise(**options, parameters="trainable").rows[0]
    assert adapter.variance + transform.variance == pytest.approx(trainable.variance)
    with pytest.raises(ValueError, match="none of the 'transform' parameters requires a gradient"):
        lm.gradient_noise(**options)


def test_incomparable_estimators_are_left_out_by_default_and_rejected_on_request():
    lm = perturbed(antithetic=True, estimator="jensen")
    names = [row.estimator for row in lm.gradient_noise(**batch(), repeats=2).rows]
    assert names == ["iwae", "jensen", *["resample"] * 3]
    with pytest.raises(ValueError, match="sampling='antithetic' pairs the samples.*'jvi_clip'"):
        lm.gradient_noise(**batch(), repeats=2, estimators=["jvi_clip"])
    lm = perturbed()
    with pytest.raises(ValueError, match="estimator='jvi' is for evaluation"):
        lm.train().gradient_noise(**batch(), repeats=2, estimators=["jvi"])
    one = lm.gradient_noise(**batch(), repeats=2, num_samples=1)
    assert one.draw_noise == 0 and [row.cost for row in one.rows] == [4, 6]


def test_bad_gradient_noise_argument_is_rejected_by_name():
    lm, inputs = perturbed(), batch()
    with pytest.raises(ValueError, match="repeats must be an int of 2 or more, got 1"):
        lm.gradient_noise(**inputs, repeats=1)
    with pytest.raises(ValueError, match=r"labels are needed for a loss, got only \['input_ids'\]"):
        lm.gradient_noise(input_ids=inputs["input_ids"])
    with pytest.raises(TypeError, match="estimators must be a list of estimators or None"):
        lm.gradient_noise(**inputs, estimators="iwae")
    with pytest.raises(ValueError, match="parameters must be one of .*got 'lora'"):
        lm.gradient_noise(**inputs, parameters="lora")
    with pytest.raises(ValueError, match="the gradient is the same for every seed"):
        lm.gradient_noise(**inputs, perturb_mask=torch.zeros(B, T, dtype=torch.bool))
    with lm.exact(), pytest.raises(ValueError, match=r"lm.exact\(\) perturbs nothing"):
        lm.gradient_noise(**inputs)
    base = llama()
    base.config.attention_dropout = base.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout is active in .*attention_dropout=0.1"):
        perturbed(base).train().gradient_noise(**inputs)
    assert math.isfinite(perturbed(base).eval().gradient_noise(**inputs, repeats=2).draw_noise)


def test_estimators_of_stratified_groups_are_compared_where_there_are_two():
    lm = perturbed(sampling="stratified")
    compared = {
        num_samples: [
            row.estimator
            for row in lm.gradient_noise(**batch(), repeats=2, num_samples=num_samples).rows
            if row.backward_samples is None
        ]
        for num_samples in (2, 4)
    }
    assert compared == {2: ["iwae"], 4: ["iwae", "jvi_clip"]}
    wanted = ["quadratic", "jensen", {"iwae": 0.5, "jvi_clip": 0.5}]
    rows = lm.gradient_noise(**batch(), repeats=2, estimators=wanted).rows
    assert [row.estimator for row in rows[:4]] == ["iwae", *wanted]
    with pytest.raises(ValueError, match="at least 4 for 2 groups"):
        lm.gradient_noise(**batch(), repeats=2, num_samples=2, estimators=["quadratic"])
