"""Scores against one forward, against brute force, and against models whose marginal is known."""

import math

import pytest
import torch
import transformers

from fastperturb import PerturbConfig, wrap
from fastperturb.diagnostics.score import summarise

IGNORED = -100


def llama(*, layers=2, hidden=16, vocab=31, **options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            **options,
        )
    ).eval()


def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, 31, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def four_valued(*, scale=0.6):
    """No layers and one z of two signs a sequence: a marginal that is a sum of four terms."""
    config = PerturbConfig(
        latent="rademacher", latent_dim=2, scope="sequence", init_scale=scale, num_samples=8
    )
    return wrap(llama(layers=0, hidden=4), config)


@torch.no_grad()
def exact_marginal(lm, ids):
    e = lm.base.get_input_embeddings()(ids)
    signs = torch.tensor([[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)])
    with lm.exact():
        log_probs = [lm(inputs_embeds=lm.transform(e, z), labels=ids).log_probs[0] for z in signs]
    return torch.stack(log_probs).logsumexp(0) - math.log(4)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_any_chunk_size_gives_the_log_marginal_of_one_forward(chunk_size, marginal, antithetic):
    lm = wrap(llama(), PerturbConfig(marginal=marginal, antithetic=antithetic))
    score = lm.score(**batch(), num_samples=8, chunk_size=chunk_size, seed=5)
    out = lm(**batch(), num_samples=8, seed=5)
    expected = out.log_marginal.detach().to(score.log_marginal.dtype)
    torch.testing.assert_close(score.log_marginal, expected, rtol=1e-4, atol=1e-5)
    assert score.count == (batch()["labels"][:, 1:] != IGNORED).sum()
    assert score.nll.item() == pytest.approx((-expected.sum() / score.count).item(), rel=1e-4)
    assert score.perplexity.item() == pytest.approx(score.nll.exp().item())
    outcomes = (out.log_marginal != 0).sum()
    assert (score.ess.sum() / outcomes).item() == pytest.approx(out.ess.item(), rel=1e-4)


@pytest.mark.parametrize("estimator", ["jensen", "quadratic", "sumo", "resample"])
def test_the_score_is_the_same_whatever_the_model_is_trained_by(estimator):
    config = PerturbConfig(estimator=estimator, plan="auto")
    lm = wrap(llama(), config)
    expected = wrap(llama(), PerturbConfig())
    expected.load_state_dict(lm.state_dict())
    ours, theirs = (each.score(**batch(), seed=5, num_samples=6) for each in (lm, expected))
    assert ours.nll == theirs.nll
    assert lm.config is config


def test_labels_are_by_default_the_tokens_that_follow_one_of_their_document():
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
        found = lm.score(ids, position_ids=packed).log_marginal
        assert (found == 0).tolist() == [[False, False, True, False, False, False]] * 3


def test_outcomes_without_a_label_count_for_nothing():
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
def test_the_curve_is_the_mean_over_disjoint_groups_of_the_same_draws(num_samples, sizes, marginal):
    lm = wrap(llama(), PerturbConfig(marginal=marginal))
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


def test_the_jackknife_takes_away_the_bias_of_few_draws():
    lm = four_valued()
    ids = batch()["input_ids"][:1]
    exact, copies = exact_marginal(lm, ids), 20_000
    few = lm.score(ids.expand(copies, -1), num_samples=4, seed=5)
    many = lm.score(ids.expand(copies, -1), num_samples=16, seed=6)
    for score in (few, many):
        bias, left = ((each - exact).mean() for each in (score.log_marginal, score.jackknife))
        predicted = -score.standard_error.square().mean() / 2
        assert bias.item() == pytest.approx(predicted.item(), rel=0.25)
        assert left.abs() < bias.abs() / 4
    assert (many.log_marginal - exact).mean() > 0.35 * (few.log_marginal - exact).mean()


@pytest.mark.parametrize("antithetic", [False, True])
def test_standard_errors_of_outcomes_are_calibrated(antithetic):
    lm = four_valued()
    ids = batch()["input_ids"][:1]
    with lm._configured(antithetic=antithetic):
        score = lm.score(ids.expand(2000, -1), num_samples=128, seed=5)
    z = (score.jackknife - exact_marginal(lm, ids)) / score.standard_error
    assert (z.square().mean(0).sqrt() - 1).abs().max() < 0.1


def test_the_standard_error_of_the_nll_is_calibrated_where_tokens_share_draws():
    lm = four_valued()
    ids = batch()["input_ids"][:2]
    exact = exact_marginal(lm, ids).mean()
    scores = [lm.score(ids, num_samples=256, chunk_size=256, seed=seed) for seed in range(400)]
    z = torch.stack([(-s.curve.jackknife[-1] - exact) / s.nll_standard_error for s in scores])
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    naive = torch.stack([s.standard_error.norm() / s.count for s in scores])
    ours = torch.stack([s.nll_standard_error for s in scores])
    assert not 0.8 < (naive / ours).mean() < 1.25  # or the test could not tell


def test_rows_of_one_number_share_draws_and_rows_of_two_do_not():
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


def test_the_standard_error_is_the_delta_methods():
    torch.manual_seed(0)
    log_p = torch.randn(10, 1, 2) - 3
    labels = torch.zeros(1, 3, dtype=torch.long)
    score = summarise(log_p, labels, torch.arange(1), marginal="token", paired=False)
    p = log_p.exp()
    torch.testing.assert_close(score.standard_error, p.std(0) / p.mean(0) / math.sqrt(10))
    both = (p / p.mean(0)).sum(-1).std(0) / math.sqrt(10) / 2
    assert score.nll_standard_error.item() == pytest.approx(both.item(), rel=1e-5)


def test_antithetic_pairs_count_as_one_draw():
    torch.manual_seed(0)
    log_p = torch.randn(8, 1, 2) - 3
    labels, rows = torch.zeros(1, 3, dtype=torch.long), torch.arange(1)
    ours = summarise(log_p, labels, rows, marginal="token", paired=True)
    pairs = log_p.exp().unflatten(0, (4, 2)).mean(1).log()
    theirs = summarise(pairs, labels, rows, marginal="token", paired=False)
    assert ours.curve.num_samples == [2, 4, 8]
    for name in ("log_marginal", "jackknife", "standard_error", "nll_standard_error"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.ess, 1 / log_p.softmax(0).square().sum(0))


def test_long_sequences_are_scored_in_log_space():
    log_p = torch.full((4, 1, 1000), -20.0)
    log_p[0] += 1e-3
    labels = torch.zeros(1, 1001, dtype=torch.long)
    score = summarise(log_p, labels, torch.arange(1), marginal="sequence", paired=False)
    ratio = torch.tensor([math.e, 1, 1, 1], dtype=torch.float64)
    expected = (ratio.std() / ratio.mean() / 2).item()
    assert score.standard_error.item() == pytest.approx(expected, rel=1e-3)


def test_one_draw_has_neither_error_nor_jackknife():
    lm = wrap(llama(), PerturbConfig())
    with lm.exact():
        exact = lm.score(**batch())
        assert exact.nll.item() == pytest.approx(lm(**batch()).loss.item(), rel=1e-5)
    for score in (exact, lm.score(**batch(), num_samples=1)):
        assert score.nll_standard_error.isnan() and score.jackknife[0, 4].isnan()
        assert score.curve.num_samples == [1]


def peak_bytes(run):
    """The most memory held at once during a call, beyond what was held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_grows_with_draws_by_their_log_probs_alone():
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


def test_dropout_is_refused_and_training_mode_without_it_is_not():
    model = llama(attention_dropout=0.1)
    lm = wrap(model, PerturbConfig()).train()
    with pytest.raises(ValueError, match=r"dropout is active in .*: call lm.eval\(\) to score"):
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
def test_bad_arguments_are_refused_by_name(changes, message):
    config = PerturbConfig()
    lm = wrap(llama(), config)
    with pytest.raises(ValueError, match=message):
        lm.score(**{**batch(), **changes})
    assert lm.config is config


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_a_temperature_divides_the_logits_whatever_the_head_does_to_them(family, temperature):
    options = {"Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 4}}.get(family, {})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            vocab_size=12,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.8,
            pad_token_id=0,
            **options,
        )
    ).eval()
    lm = wrap(model, PerturbConfig())
    ids = batch()["input_ids"] % 12
    with lm.exact():
        ours = lm.score(ids, temperature=temperature)
        log_probs = (model(ids).logits[:, :-1] / temperature).log_softmax(-1)
    expected = log_probs.gather(2, ids[:, 1:, None])[..., 0].detach()
    torch.testing.assert_close(ours.log_marginal, expected, rtol=1e-4, atol=1e-5)
    assert lm(ids, labels=ids, seed=0).loss == lm(ids, labels=ids, seed=0).loss  # left as it was
    with lm.exact():
        torch.testing.assert_close(lm.score(ids).nll.item(), lm(ids, labels=ids).loss.item())


def test_a_temperature_is_of_each_draw_and_not_of_the_mean():
    lm = four_valued()
    ids = batch()["input_ids"]
    found = lm.score(ids, num_samples=64, seed=1, temperature=1.7)
    plain = lm.score(ids, num_samples=64, seed=1)
    with torch.no_grad():
        lm.base.lm_head.weight.div_(1.7)
        expected = lm.score(ids, num_samples=64, seed=1)
    torch.testing.assert_close(found.log_marginal, expected.log_marginal, rtol=1e-4, atol=1e-5)
    assert (found.nll - plain.nll).abs() > 1e-3


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be a number above 0"):
        wrap(llama(), PerturbConfig()).score(**batch(), temperature=temperature)
