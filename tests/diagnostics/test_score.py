"""Scores against one forward, against brute force, and against models whose marginal is known."""

import math

import batches
import pytest
import tiny
import torch
from batches import IGNORED, labelled

from fastperturb import PerturbConfig, estimators, wrap
from fastperturb.diagnostics.score import summarise

V = 31


def llama(**changes):
    return tiny.llama(vocab_size=V, initializer_range=0.3, pad_token_id=None, **changes)


def batch():
    return batches.batch(length=7, vocab=V, lowest=0, right=2, unlabelled=4)


def four_valued(**options):
    """Return a model without layers and one z of two signs a sequence.

    Its marginal is a mean of four terms.
    """
    fixed = {"latent_dim": 2, "scope": "sequence", "init_scale": 0.6, "num_samples": 8}
    if "antithetic" not in options:
        fixed["sampling"] = "independent"
    config = PerturbConfig(**{"latent": "rademacher", **fixed, **options})
    return wrap(llama(num_hidden_layers=0, hidden_size=4), config)


@torch.no_grad()
def exact_marginal(lm, ids):
    """Return the log marginal [B, T - 1], all four latents enumerated."""
    e = lm.base.get_input_embeddings()(ids)
    signs = torch.tensor([[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)])
    with lm.exact():
        log_probs = [lm(inputs_embeds=lm.transform(e, z), labels=ids).log_probs[0] for z in signs]
    return torch.stack(log_probs).logsumexp(0) - math.log(4)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_any_chunk_size_has_the_log_marginal_of_one_forward(chunk_size, marginal, antithetic):
    lm = wrap(llama(), PerturbConfig(marginal=marginal, antithetic=antithetic))
    score = lm.score(**batch(), num_samples=8, chunk_size=chunk_size, seed=5)
    out = lm(**batch(), num_samples=8, seed=5)
    expected = out.log_marginal.detach().to(score.log_marginal.dtype)
    torch.testing.assert_close(score.log_marginal, expected, rtol=1e-4, atol=1e-5)
    assert score.count == labelled(batch()).sum()
    assert score.nll.item() == pytest.approx((-expected.sum() / score.count).item(), rel=1e-4)
    assert score.perplexity.item() == pytest.approx(score.nll.exp().item())
    count = (out.log_marginal != 0).sum()
    assert (score.ess.sum() / count).item() == pytest.approx(out.ess.item(), rel=1e-4)


@pytest.mark.parametrize("estimator", ["jensen", "quadratic", "sumo", "resample"])
def test_score_does_not_depend_on_the_training_estimator(estimator):
    config = PerturbConfig(estimator=estimator, plan="auto")
    lm = wrap(llama(), config)
    expected = wrap(llama(), PerturbConfig())
    expected.load_state_dict(lm.state_dict())
    ours, theirs = (model.score(**batch(), seed=5, num_samples=6) for model in (lm, expected))
    assert ours.nll == theirs.nll
    assert lm.config is config


def test_default_labels_are_the_tokens_with_a_prefix_in_their_document():
    lm = wrap(llama(), PerturbConfig())
    ids = batch()["input_ids"]
    masks = torch.ones_like(ids)
    masks[0, :2], masks[1, -3:] = 0, 0  # left and right padding
    labels = ids.masked_fill(masks == 0, IGNORED)
    labels[0, 2] = IGNORED  # the first token has no prefix
    ours = lm.score(ids, attention_mask=masks, seed=5)
    theirs = lm.score(ids, attention_mask=masks, labels=labels, seed=5)
    assert ours.count == theirs.count == 4 + 3 + 6
    assert ours.nll == theirs.nll
    for start in (0, 7):  # of the second document, which may be cut off from its beginning
        packed = torch.tensor([[0, 1, 2, *range(start, start + 4)]]).expand(3, -1)
        log_marginal = lm.score(ids, position_ids=packed).log_marginal
        assert (log_marginal == 0).tolist() == [[False, False, True, False, False, False]] * 3


def test_ignored_labels_do_not_count():
    lm = wrap(llama(), PerturbConfig())
    ids = batch()["input_ids"]
    some = ids.clone()
    some[:, 3] = IGNORED
    whole, part = (lm.score(ids, labels=labels, seed=5) for labels in (ids, some))
    for name in ("log_marginal", "jackknife", "standard_error", "ess"):
        assert (getattr(part, name)[:, 2] == 0).all()
    assert part.count == whole.count - 3
    assert part.sum.item() == pytest.approx(
        whole.sum.item() - whole.log_marginal[:, 2].sum().item(), rel=1e-5
    )
    nothing = lm.score(ids, labels=torch.full_like(ids, IGNORED))
    assert nothing.sum == 0 and nothing.count == 0


def jackknife(log_p):
    M = len(log_p)
    left_out = [log_mean_exp(torch.cat([log_p[:j], log_p[j + 1 :]])) for j in range(M)]
    return M * log_mean_exp(log_p) - (M - 1) * torch.stack(left_out).mean(0)


def log_mean_exp(log_p):
    return log_p.logsumexp(0) - math.log(len(log_p))


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize(("num_samples", "sizes"), [(8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])])
def test_curve_is_the_mean_over_disjoint_groups_of_the_same_samples(num_samples, sizes, marginal):
    lm = wrap(llama(), PerturbConfig(marginal=marginal, sampling="independent"))
    score = lm.score(**batch(), num_samples=num_samples, seed=5)
    log_p = lm(**batch(), num_samples=num_samples, seed=5).log_probs.detach().double()
    log_p = log_p if marginal == "token" else log_p.sum(-1)
    assert score.curve.num_samples == sizes
    for size, nll, corrected in zip(*score.curve, strict=True):
        groups = log_p[: num_samples - num_samples % size].split(size)
        expected = -sum(log_mean_exp(group).sum() for group in groups) / len(groups)
        assert nll.item() == pytest.approx((expected / score.count).item(), rel=1e-5)
        if size == 1:
            assert corrected.isnan()
            continue
        expected = -sum(jackknife(group).sum() for group in groups) / len(groups)
        assert corrected.item() == pytest.approx((expected / score.count).item(), rel=1e-5)
    assert score.curve.nll[-1] == score.nll
    assert score.curve.jackknife[-1].item() == pytest.approx(
        (-score.jackknife.sum() / score.count).item(), rel=1e-5
    )


def test_jackknife_removes_the_bias_of_few_samples():
    lm = four_valued()
    ids = batch()["input_ids"][:1]
    exact, count = exact_marginal(lm, ids), 20_000
    few = lm.score(ids.expand(count, -1), num_samples=4, seed=5)
    many = lm.score(ids.expand(count, -1), num_samples=16, seed=6)
    for score in (few, many):
        bias, left = (
            (estimate - exact).mean() for estimate in (score.log_marginal, score.jackknife)
        )
        predicted = -score.standard_error.square().mean() / 2
        assert bias.item() == pytest.approx(predicted.item(), rel=0.25)
        assert left.abs() < bias.abs() / 4
    assert (many.log_marginal - exact).mean() > 0.35 * (few.log_marginal - exact).mean()


@pytest.mark.parametrize("antithetic", [False, True])
def test_standard_errors_of_log_marginals_are_calibrated(antithetic):
    lm = four_valued(antithetic=antithetic)
    ids = batch()["input_ids"][:1]
    score = lm.score(ids.expand(2000, -1), num_samples=128, seed=5)
    z = (score.jackknife - exact_marginal(lm, ids)) / score.standard_error
    assert (z.square().mean(0).sqrt() - 1).abs().max() < 0.1


def test_a_stratified_score_leaves_eight_groups_or_as_many_as_there_can_be():
    lm, ids = four_valued(sampling="stratified"), batch()["input_ids"][:1]
    sizes = {1: [1], 3: [1, 2, 3], 4: [2, 4], 8: [2, 4, 8], 16: [2, 4, 8, 16], 64: [8, 16, 32, 64]}
    for num_samples, expected in sizes.items():
        score = lm.score(ids, num_samples=num_samples, seed=5)
        assert score.curve.num_samples == expected
        assert score.nll_standard_error.isnan() == (num_samples == 1)
    fixed = four_valued(sampling="stratified", group_size=4)
    assert fixed.score(ids, num_samples=64, seed=5).curve.num_samples == [4, 8, 16, 32, 64]
    assert fixed.score(ids, num_samples=4, seed=5).curve.num_samples == [2, 4]


def test_standard_errors_of_stratified_samples_are_calibrated_by_groups_alone():
    lm = four_valued(sampling="stratified", latent="gaussian")
    ids = batch()["input_ids"][:1].expand(2000, -1)
    score = lm.score(ids, num_samples=64, seed=5)
    spread = score.log_marginal.var(0)
    by_groups = score.standard_error.square().mean(0)
    assert ((by_groups / spread).sqrt() - 1).abs().max() < 0.1
    with lm.overriding(group_size=8):
        log_probs = lm(ids, labels=ids, num_samples=64, seed=5).log_probs.detach()
    naive = summarise(log_probs, ids, torch.arange(2000), marginal="token", group_size=1)
    torch.testing.assert_close(naive.log_marginal, score.log_marginal)
    assert ((naive.standard_error.square().mean(0) / spread).sqrt() > 1.5).all()


def test_a_jackknifed_log_prob_is_never_above_zero():
    log_p = torch.tensor([0.0, -30.0, -30.0, -30.0])[:, None, None]
    labels = torch.zeros(1, 2, dtype=torch.long)
    score = summarise(log_p, labels, torch.arange(1), marginal="token", group_size=1)
    assert estimators.combine(log_p, "jvi")[0] > 0  # what the jackknife says
    assert score.jackknife == 0 and (score.curve.jackknife[1:] >= 0).all()


def test_nll_standard_error_is_calibrated_where_tokens_share_latents():
    lm = four_valued()
    ids = batch()["input_ids"][:2]
    exact = exact_marginal(lm, ids).mean()
    scores = [lm.score(ids, num_samples=256, chunk_size=256, seed=seed) for seed in range(400)]
    z = torch.stack([(-s.curve.jackknife[-1] - exact) / s.nll_standard_error for s in scores])
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    naive = torch.stack([s.standard_error.norm() / s.count for s in scores])
    ours = torch.stack([s.nll_standard_error for s in scores])
    assert not 0.8 < (naive / ours).mean() < 1.25  # or the test could not tell


def test_equal_row_ids_share_latents_and_different_ones_do_not():
    lm = four_valued()
    ids = batch()["input_ids"][:1]
    one = lm.score(ids, seed=5, num_samples=64).nll_standard_error
    twice = lm.score(ids.expand(2, -1), rows=torch.tensor([0, 0]), seed=5, num_samples=64)
    apart = lm.score(ids.expand(2, -1), rows=torch.tensor([0, 1]), seed=5, num_samples=64)
    assert twice.nll_standard_error.item() == pytest.approx(one.item(), rel=1e-5)
    assert apart.nll_standard_error.item() == pytest.approx(one.item() / math.sqrt(2), rel=0.3)
    packed = lm.score(
        ids.repeat(1, 2), rows=torch.tensor([[0] * 7 + [1] * 7]), seed=5, num_samples=64,
        labels=torch.cat([ids, ids.index_fill(1, torch.tensor([0]), IGNORED)], dim=1),
    )  # fmt: skip
    assert packed.nll_standard_error.item() == pytest.approx(
        apart.nll_standard_error.item(), rel=1e-5
    )


def test_standard_error_is_that_of_the_delta_method():
    torch.manual_seed(0)
    log_p = torch.randn(10, 1, 2) - 3
    labels = torch.zeros(1, 3, dtype=torch.long)
    score = summarise(log_p, labels, torch.arange(1), marginal="token", group_size=1)
    p = log_p.exp()
    torch.testing.assert_close(score.standard_error, p.std(0) / p.mean(0) / math.sqrt(10))
    both = (p / p.mean(0)).sum(-1).std(0) / math.sqrt(10) / 2
    assert score.nll_standard_error.item() == pytest.approx(both.item(), rel=1e-5)


def test_antithetic_pair_counts_as_one_sample():
    torch.manual_seed(0)
    log_p = torch.randn(8, 1, 2) - 3
    labels, rows = torch.zeros(1, 3, dtype=torch.long), torch.arange(1)
    ours = summarise(log_p, labels, rows, marginal="token", group_size=2)
    pairs = log_p.exp().unflatten(0, (4, 2)).mean(1).log()
    theirs = summarise(pairs, labels, rows, marginal="token", group_size=1)
    assert ours.curve.num_samples == [2, 4, 8]
    for name in ("log_marginal", "jackknife", "standard_error", "nll_standard_error"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.ess, 1 / log_p.softmax(0).square().sum(0))


def test_long_sequences_are_scored_in_log_space():
    log_p = torch.full((4, 1, 1000), -20.0)
    log_p[0] += 1e-3
    labels = torch.zeros(1, 1001, dtype=torch.long)
    score = summarise(log_p, labels, torch.arange(1), marginal="sequence", group_size=1)
    ratio = torch.tensor([math.e, 1, 1, 1], dtype=torch.float64)
    expected = (ratio.std() / ratio.mean() / 2).item()
    assert score.standard_error.item() == pytest.approx(expected, rel=1e-3)


def test_one_sample_has_neither_standard_error_nor_jackknife():
    lm = wrap(llama(), PerturbConfig())
    with lm.exact():
        exact = lm.score(**batch())
        assert exact.nll.item() == pytest.approx(lm(**batch()).loss.item(), rel=1e-5)
    for score in (exact, lm.score(**batch(), num_samples=1)):
        assert score.nll_standard_error.isnan() and score.jackknife[0, 4].isnan()
        assert score.curve.num_samples == [1]


def peak_bytes(run):
    """Return the most memory held at once during a call, beyond what was held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_grows_by_the_log_probs_of_each_sample_only():
    lm = wrap(llama(), PerturbConfig())
    ids = torch.randint(0, 31, (4, 32))
    few, many = (
        peak_bytes(lambda M=M: lm.score(ids, num_samples=M, chunk_size=4, seed=5))
        for M in (16, 512)
    )
    log_probs = 4 * (512 - 16) * 4 * 32
    assert many - few < 10 * log_probs
    all_at_once = peak_bytes(lambda: lm.score(ids, num_samples=512, chunk_size=512, seed=5))
    assert all_at_once > 5 * many


def test_dropout_is_rejected_and_train_mode_without_dropout_is_not():
    model = llama(attention_dropout=0.1)
    lm = wrap(model, PerturbConfig()).train()
    with pytest.raises(ValueError, match=r"dropout is active in .* call lm.eval\(\) first"):
        lm.score(**batch())
    assert lm.eval().score(**batch(), seed=5).nll.isfinite()
    assert wrap(llama(), PerturbConfig()).train().score(**batch(), seed=5).nll.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive int"),
        ({"num_samples": 0}, "num_samples must be a positive int"),
        ({"labels": torch.zeros(3, 2).long()}, r"labels must be \[B, T\] = \[3, 7\]"),
        ({"labels": None, "attention_mask": torch.ones(3, 2)}, "attention_mask must be"),
        ({"labels": None, "input_ids": torch.zeros(3)}, "input_ids must be"),
        ({"rows": torch.arange(2)}, "rows must be int64"),
    ],
)
def test_bad_score_argument_is_rejected_by_name(changes, message):
    config = PerturbConfig()
    lm = wrap(llama(), config)
    with pytest.raises(ValueError, match=message):
        lm.score(**{**batch(), **changes})
    assert lm.config is config


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_temperature_divides_the_final_logits_of_any_head(family, temperature):
    model = tiny.base_model(family, initializer_range=0.8)
    lm = wrap(model, PerturbConfig())
    ids = batch()["input_ids"]
    with lm.exact():
        ours = lm.score(ids, temperature=temperature)
        log_probs = (model(ids).logits[:, :-1] / temperature).log_softmax(-1)
    expected = log_probs.gather(2, ids[:, 1:, None])[..., 0].detach()
    torch.testing.assert_close(ours.log_marginal, expected, rtol=1e-4, atol=1e-5)
    assert lm(ids, labels=ids, seed=0).loss == lm(ids, labels=ids, seed=0).loss  # left as it was
    with lm.exact():
        torch.testing.assert_close(lm.score(ids).nll.item(), lm(ids, labels=ids).loss.item())


def test_temperature_applies_to_each_sample_and_not_to_the_mean():
    lm = four_valued()
    ids = batch()["input_ids"]
    tempered = lm.score(ids, num_samples=64, seed=1, temperature=1.7)
    plain = lm.score(ids, num_samples=64, seed=1)
    with torch.no_grad():
        lm.base.lm_head.weight.div_(1.7)
        expected = lm.score(ids, num_samples=64, seed=1)
    torch.testing.assert_close(tempered.log_marginal, expected.log_marginal, rtol=1e-4, atol=1e-5)
    assert (tempered.nll - plain.nll).abs() > 1e-3


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_that_is_no_positive_number_is_rejected(temperature):
    with pytest.raises(ValueError, match="temperature must be a number above 0"):
        wrap(llama(), PerturbConfig()).score(**batch(), temperature=temperature)
