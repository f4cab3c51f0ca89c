"""Linear combinations of histories: weights, streams that go on by them, and what they lose."""

import numpy as np
import pytest
import torch
from tiny import base_model

from fastperturb import PerturbConfig, wrap
from fastperturb.rank import ISAN, FunctionOracle, Metered, ModelOracle, logit_matrix
from fastperturb.rank.ask.laws import drawn, told
from fastperturb.rank.ask.oracle import QueryBudgetSpent
from fastperturb.rank.combine import streams
from fastperturb.rank.combine.combination import fit, shares_by_length
from fastperturb.rank.combine.comparison import compare, truncations
from fastperturb.rank.combine.streams import follow, open_streams, write
from fastperturb.rank.measure.measurement import Asked
from fastperturb.rank.texts import pieces, shuffled, with_prefixes

HISTORIES = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (14, 15), (8, 3)]
WRITTEN = torch.tensor([[4, 5, 6, 7], [4, 9, 9, 3]])


def weights_of(sums=3):
    return np.random.default_rng(0).standard_normal((sums, len(HISTORIES)))


def one_at_a_time(oracle, weights, written):
    """softmax(sum_n w[n] centred log-probs of history n), history by history [W, L + 1, V]."""
    contexts = [tuple(written[:end]) for end in range(len(written) + 1)]
    logits = torch.stack([oracle.log_probs([h], contexts)[0].double() for h in HISTORIES])
    logits = logits - logits.mean(-1, keepdim=True)
    return torch.einsum("wn,nlv->wlv", torch.from_numpy(weights), logits).log_softmax(-1)


def isan(rank=3, vocab_size=6, length=9):
    return ISAN.random(vocab_size, length, rank, seed=1)


def some(count, length, *, vocab_size=6, seed=0):
    random = np.random.default_rng(seed)
    return [tuple(row) for row in random.integers(vocab_size, size=(count, length)).tolist()]


def models():
    torch.manual_seed(0)
    plain = {name: base_model(name) for name in ("Llama", "GPT2", "Gemma2", "Cohere", "GPTNeoX")}
    noisy = wrap(base_model("Llama"), PerturbConfig(latent_dim=4, init_scale=1.0))
    sequence = wrap(
        base_model("Llama"), PerturbConfig(latent_dim=4, init_scale=1.0, marginal="sequence")
    )
    biased = base_model("Llama")
    biased.lm_head = torch.nn.Linear(biased.config.hidden_size, biased.config.vocab_size)
    torch.nn.init.normal_(biased.lm_head.bias)
    return {
        **plain,
        "biased head": biased,
        "noisy": noisy,
        "noisy, sequence marginal": sequence,
    }


# Weights


def test_weights_are_those_of_ridge_regression():
    random = np.random.default_rng(0)
    values, targets = random.standard_normal((7, 5, 4)), random.standard_normal((3, 5, 4))
    found = fit(values, targets, ridges=[0.02])
    rows, wanted = values.reshape(7, -1), targets.reshape(3, -1)
    penalty = 0.02 * np.square(rows).sum(1).mean()
    expected = np.linalg.lstsq(
        np.vstack([rows.T, np.sqrt(penalty) * np.eye(7)]),
        np.vstack([wanted.T, np.zeros((7, 3))]),
        rcond=None,
    )[0].T
    np.testing.assert_allclose(found.weights, expected, rtol=1e-9)
    missed = np.linalg.norm(wanted - expected @ rows) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(missed, rel=1e-9)


def test_a_future_of_twice_the_share_counts_as_two():
    random = np.random.default_rng(0)
    values, targets = random.standard_normal((7, 5, 4)), random.standard_normal((3, 5, 4))
    twice = [0, 1, 1, 2, 3, 3, 4]
    expected = fit(values[:, twice], targets[:, twice], ridges=[0.02])
    found = fit(values, targets, shares=np.array([1.0, 2, 1, 2, 1]), ridges=[0.02])
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-9)
    assert found.error == pytest.approx(expected.error, rel=1e-9)


def test_every_length_of_futures_has_the_same_share():
    futures = with_prefixes([(1, 2, 3), (1, 4), (5,)])
    shares = shares_by_length(futures)
    by_length = {n: sum(s for s, f in zip(shares, futures) if len(f) == n) for n in range(4)}
    assert by_length == pytest.approx(dict.fromkeys(range(4), 1.0))


def test_without_a_penalty_weights_are_the_shortest_that_fit():
    values = np.random.default_rng(0).standard_normal((2, 3, 4))
    doubled = np.concatenate([values, values])
    found = fit(doubled, values, ridges=[0.0])
    np.testing.assert_allclose(found.weights, 0.5 * np.hstack([np.eye(2), np.eye(2)]), atol=1e-9)


def test_the_ridge_is_the_one_that_predicts_futures_it_has_not_seen():
    random = np.random.default_rng(0)
    truth = random.standard_normal((2, 40))
    columns = random.standard_normal((40, 30, 4))
    targets = np.einsum("tn,nfk->tfk", truth, columns) + 5.0 * random.standard_normal((2, 30, 4))
    ridges = (1e-8, 1e-2, 1.0, 100.0)
    found = fit(columns, targets, ridges=ridges)
    errors = []
    for ridge in ridges:
        seen = fit(columns[:, :22], targets[:, :22], ridges=[ridge]).weights  # three quarters
        rest = targets[:, 22:] - np.einsum("tn,nfk->tfk", seen, columns[:, 22:])
        errors.append(np.linalg.norm(rest) / np.linalg.norm(targets[:, 22:]))
    assert found.ridge == ridges[int(np.argmin(errors))] not in (ridges[0], ridges[-1])
    assert found.held_out_error == pytest.approx(min(errors), rel=1e-9)
    everything = fit(columns, targets, ridges=[found.ridge])
    np.testing.assert_allclose(found.weights, everything.weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": np.ones((1, 3, 3))}, "targets must be asked on the futures and tokens"),
        ({"shares": np.ones(2)}, "shares must be positive, one for each of the 3 futures"),
        ({"shares": np.zeros(3)}, "shares must be positive, one for each of the 3 futures"),
        ({"ridges": []}, "ridges must be one or more numbers from 0 on"),
        ({"ridges": [-1.0]}, "ridges must be one or more numbers from 0 on"),
        ({"held_out": 1.0}, "held_out must be a share between 0 and 1"),
        ({"values": np.ones((2, 1, 4)), "targets": np.ones((1, 1, 4))}, "1 futures cannot be"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, message):
    given = {"values": np.ones((2, 3, 4)), "targets": np.ones((1, 3, 4)), **arguments}
    with pytest.raises(ValueError, match=message):
        fit(given.pop("values"), given.pop("targets"), **given)


# Streams


@pytest.mark.parametrize("name", models())
def test_streams_go_on_by_the_weighted_sum_of_centred_logits(name):
    oracle = ModelOracle(models()[name], prompt=(1,), num_samples=4)
    weights = weights_of()
    found = open_streams(oracle, HISTORIES, weights, copies=2)
    law = torch.cat([found.law[:, :, None], found.advance(WRITTEN)], dim=2)
    for number, written in enumerate(WRITTEN.tolist()):
        expected = one_at_a_time(oracle, weights, written)
        torch.testing.assert_close(law[:, number].double(), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("batch_tokens", [8192, 20])
def test_continuations_are_followed_as_streams_go_on(name, batch_tokens, monkeypatch):
    oracle = ModelOracle(models()[name], prompt=(1,), num_samples=4, batch_tokens=batch_tokens)
    if batch_tokens == 20:
        monkeypatch.setattr(streams, "_AT_ONCE", 1)
    found = open_streams(oracle, HISTORIES, weights_of(), copies=2)
    law = torch.cat([found.law[:, :, None], found.advance(WRITTEN)], dim=2)
    followed = follow(oracle, HISTORIES, weights_of(), WRITTEN)
    torch.testing.assert_close(followed, law, atol=2e-5, rtol=0)
    nothing = follow(oracle, HISTORIES, weights_of(), WRITTEN[:, :0])
    torch.testing.assert_close(nothing, law[:, :, :1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", models())
def test_tokens_may_come_one_by_one_or_at_once(name):
    oracle = ModelOracle(models()[name], prompt=(1,), num_samples=4)
    at_once = open_streams(oracle, HISTORIES, weights_of(), copies=2)
    one_by_one = open_streams(oracle, HISTORIES, weights_of(), copies=2)
    expected = at_once.advance(WRITTEN)
    found = torch.cat([one_by_one.advance(part) for part in WRITTEN.split(1, 1)], dim=2)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(one_by_one.law, expected[:, :, -1], atol=2e-5, rtol=0)


def test_a_linear_head_runs_on_sums_alone(monkeypatch):
    model, made = base_model("Llama"), []
    oracle = ModelOracle(model, prompt=(1,))
    run = oracle.passes.run

    def spied(*arguments, **options):
        found, cache = run(*arguments, **options)
        made.append(found.shape[-1])
        return found, cache

    oracle.log_probs([(4,)], [()])
    monkeypatch.setattr(oracle.passes, "run", spied)
    open_streams(oracle, HISTORIES, weights_of(), copies=2).advance(WRITTEN)
    assert set(made) == {model.config.hidden_size}  # hidden states, no logits of any history


def test_sums_stay_in_full_precision_under_autocast():
    model = base_model("Llama").bfloat16()
    oracle, weights = ModelOracle(model, prompt=(1,)), 30 * weights_of(1)
    hidden = []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = open_streams(oracle, HISTORIES, weights).law
        for history in HISTORIES:
            ids = torch.tensor([[1, *history]])
            hidden.append(model.model(ids, attention_mask=torch.ones_like(ids))[0][0, -1])
    summed = torch.from_numpy(weights[0]) @ torch.stack(hidden).double()
    expected = (summed @ model.lm_head.weight.double().T).log_softmax(-1)
    # Padding and batching move hidden states in bf16 by a bit; sums in bf16 would add 0.5 and more.
    torch.testing.assert_close(found[0].double(), expected, atol=0.2, rtol=0)


def test_sums_of_draws_stay_in_full_precision_under_autocast():
    oracle = ModelOracle(models()["noisy"].bfloat16(), prompt=(1,), num_samples=4)
    weights = 30 * weights_of(1)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = open_streams(oracle, HISTORIES, weights).law
        logits = oracle.log_probs(HISTORIES, [()])[:, 0].double()
    logits = logits - logits.mean(-1, keepdim=True)
    expected = (torch.from_numpy(weights[0]) @ logits).log_softmax(-1)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-3, rtol=0)


def test_any_oracle_has_streams():
    model = isan()
    weights = weights_of()
    histories = [tuple(token % 6 for token in history) for history in HISTORIES]
    oracle = FunctionOracle(lambda context: model.log_probs([context], [()])[0, 0], 6)
    written = WRITTEN[:, :2] % 6
    law = open_streams(oracle, histories, weights, copies=2).advance(written)
    logits = model.log_probs(histories, [tuple(written[1].tolist())])[:, 0]
    logits = logits - logits.mean(-1, keepdim=True)
    expected = (torch.from_numpy(weights) @ logits).log_softmax(-1)
    torch.testing.assert_close(law[:, 1, 1], expected)


@pytest.mark.parametrize("cached", [True, False])
def test_streams_count_each_context_once_and_keep_to_a_budget(cached):
    model = ModelOracle(base_model("Llama"), prompt=(1,))
    oracle = model
    if not cached:
        oracle = FunctionOracle(lambda context: model.log_probs([context], [()])[0, 0], 97)
    meter = Metered(oracle, budget=5 * 6)
    found = open_streams(meter, HISTORIES, weights_of(), copies=2)
    assert meter.queries == 5
    found.advance(torch.tensor([[4], [4]]))
    assert meter.queries == 5 * 2
    found.advance(torch.tensor([[5, 6], [5, 7]]))
    assert meter.queries == 5 * 5
    with pytest.raises(QueryBudgetSpent, match="25 of 30 were asked, and the next step needs 10"):
        found.advance(torch.tensor([[1], [1]]))


def test_a_history_written_on_by_itself_writes_what_the_model_does():
    model = base_model("Llama")
    ids = torch.tensor([[1, *HISTORIES[2]]])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    weights = np.eye(5)[2]
    found = write(ModelOracle(model, prompt=(1,)), HISTORIES, weights, 6)
    assert list(found) == expected[0, ids.shape[1] :].tolist()


def test_a_generator_draws_what_a_sum_writes():
    model, weights = isan(vocab_size=4), np.array([0.7, 0.6])
    histories, generator = [(0, 1), (2, 3)], torch.Generator().manual_seed(0)
    drawn_tokens = [write(model, histories, weights, 1, generator=generator) for _ in range(4000)]
    found = torch.bincount(torch.tensor(drawn_tokens)[:, 0], minlength=4) / len(drawn_tokens)
    expected = open_streams(model, histories, weights[None]).law[0, 0].exp()
    torch.testing.assert_close(found.double(), expected, atol=0.032, rtol=0)  # 4 sd


@pytest.mark.parametrize(
    ("weights", "copies", "message"),
    [
        (np.ones(5), 1, r"weights must be \[W, N\] with N = 5"),
        (np.ones((2, 4)), 1, r"weights must be \[W, N\] with N = 5"),
        (np.ones((2, 5)), 0, "copies must be at least 1"),
    ],
)
def test_streams_without_their_weights_are_refused(weights, copies, message):
    with pytest.raises(ValueError, match=message):
        open_streams(isan(), HISTORIES, weights, copies=copies)


def test_streams_beyond_a_models_positions_are_refused():
    model = base_model("GPT2")
    most = model.config.n_positions
    found = open_streams(ModelOracle(model), [(5,) * (most - 2)], np.ones((1, 1)))
    found.advance(torch.tensor([[5, 5]]))
    with pytest.raises(ValueError, match=f"has {most + 1} tokens"):
        found.advance(torch.tensor([[5]]))


# What they lose


def test_of_exact_rank_a_combination_of_that_many_histories_is_the_model():
    model, target = isan(rank=3), (0, 1, 2)
    others = some(3, 3, seed=3)
    futures = with_prefixes(some(6, 4))
    values = logit_matrix(model, [*others, target], futures).values.astype(np.float64)
    weights = fit(values[:3], values[3:], ridges=[0.0]).weights
    written = torch.tensor(some(8, 5, seed=5))
    truth, law = told(model, target, written), follow(model, others, weights, written[:, :-1])[0]
    np.testing.assert_allclose(law, truth, atol=1e-4)  # the matrix is held in fp32


def test_the_comparison_is_of_the_laws_along_continuations_of_the_model():
    model = isan(rank=3)
    histories, targets = some(20, 4), some(3, 4, seed=9)
    futures = with_prefixes(some(6, 3, seed=2))
    pools = {"all": logit_matrix(model, histories, futures)}
    pools["two"] = logit_matrix(model, histories[:2], futures)
    asked = logit_matrix(model, targets, futures)
    found = compare(model, pools, asked, steps=4, continuations=5, earlier=isan(rank=2), seed=1)
    kl = {way.name: way.kl for way in (*found.combinations, *found.baselines)}
    assert set(kl) == {
        *("all", "two", "empty future", "last token", "last 2 tokens", "last 3 tokens"),
        *("unigram", "earlier checkpoint"),
    }
    assert all(each.shape == (3, 4) and (each > -1e-9).all() for each in kl.values())
    assert kl["all"].max() < 1e-4
    # A rank of 3 in 6 tokens: the next token's logits tell the state, but two rows do not span it.
    assert kl["two"].sum() > 0.1 and kl["earlier checkpoint"].sum() > 0.1
    for each, target in zip(found.written, targets):
        assert each.target == target and each.combination == each.model
        law = model.log_probs([target], [each.model[:2]])[0, 0]
        assert each.model[2] == law.argmax() and len(each.model) == 4
    generator = torch.Generator().manual_seed(1)
    written = drawn(model, targets[0], 4, 5, generator)
    assert found.asked[0] == 1.0 and 0 <= found.asked[1:].min() < 1
    truth, short = told(model, targets[0], written), told(model, targets[0][-2:], written)
    expected = (truth.exp() * (truth - short)).sum(-1).mean(0)
    np.testing.assert_allclose(kl["last 2 tokens"][0], expected, rtol=1e-6)


def test_an_earlier_checkpoint_has_the_same_vocabulary():
    targets = logit_matrix(isan(), some(2, 4), with_prefixes(some(4, 3)))
    with pytest.raises(ValueError, match="earlier has a vocabulary of 5 tokens and the model one"):
        compare(isan(), {"own": targets}, targets, earlier=isan(vocab_size=5))


def test_the_unigram_is_the_best_of_all_constant_laws():
    model = isan()
    targets = logit_matrix(model, some(2, 4), with_prefixes(some(4, 3)))
    found = compare(model, {"own": targets}, targets, steps=3, continuations=2, seed=4)
    unigram = next(way for way in found.baselines if way.name == "unigram")
    generator = torch.Generator().manual_seed(4)
    truths = torch.stack(
        [told(model, each, drawn(model, each, 3, 2, generator)) for each in targets.histories]
    )
    best = truths.exp().mean((0, 1, 2))
    lost = (truths.exp() * (truths - best.log())).sum(-1).mean((0, 1))
    np.testing.assert_allclose(unigram.kl.mean(0), lost, rtol=1e-6)
    for other in (best, *torch.rand(20, 6, dtype=torch.float64).softmax(-1)):
        lost = (truths.exp() * (truths - other.log())).sum(-1).mean((0, 1)).sum()
        assert unigram.kl.mean(0).sum() <= lost + 1e-9


def test_continuations_are_drawn_from_the_model():
    model = isan(vocab_size=4)
    written = drawn(model, (0, 1), 2, 20_000, torch.Generator().manual_seed(0))
    pairs = torch.bincount(written[:, 0] * 4 + written[:, 1], minlength=16) / len(written)
    first = model.log_probs([(0, 1)], [()])[0, 0]
    second = model.log_probs([(0, 1)], [(token,) for token in range(4)])[0]
    expected = (first[:, None] + second).exp().flatten()
    torch.testing.assert_close(pairs.double(), expected, atol=0.015, rtol=0)  # 4 sd


def test_a_target_is_cut_to_one_token_and_by_quarters():
    assert truncations(32) == [1, 8, 16, 24]
    assert truncations(5) == [1, 2, 3]
    assert truncations(2) == [1]
    assert truncations(1) == []


# Texts


def test_pieces_are_different_and_share_no_token():
    documents = [np.arange(0, 17), np.arange(100, 103), np.arange(200, 230), np.tile([70, 80], 4)]
    found = pieces(documents, 4, np.random.default_rng(0))
    assert len(found) == 4 + 7 + 1
    assert len({token for piece in found for token in piece}) == 4 * 11 + 2
    inner = [piece for piece in found if piece[0] != 70]
    assert all(piece == tuple(range(piece[0], piece[0] + 4)) for piece in inner)


def asked_of(documents, **changes):
    sizes = {"histories": 20, "history_tokens": 4, "futures": 5, "future_tokens": 3, "targets": 6}
    return Asked.of(documents, **sizes | changes, seed=0)


def test_targets_come_from_documents_that_give_no_history():
    documents = [np.arange(100 * n, 100 * n + 40) for n in range(10)]
    asked = asked_of(documents)
    parts = [
        {piece[0] // 100 for piece in each if piece}
        for each in (asked.targets, asked.histories, asked.futures)
    ]
    assert len(parts[0]) > 1 and not parts[0] & (parts[1] | parts[2])
    assert asked.histories != sorted(asked.histories)


@pytest.mark.parametrize("history_tokens", [2, 8])
def test_histories_targets_and_futures_differ_and_share_no_token(history_tokens):
    asked = asked_of([np.arange(400)], history_tokens=history_tokens, future_tokens=5)
    rows = [*asked.histories, *asked.targets]
    runs = [future for future in asked.futures if len(future) == 5]
    tokens = [token for piece in (*rows, *runs) for token in piece]
    assert (len(rows), len(runs)) == (26, 5) and len(set(tokens)) == len(tokens)


def test_cuts_that_are_the_same_are_taken_once():
    repeated = np.array([token for n in range(200) for token in (n % 40, 40 + n % 7, n)])
    asked = asked_of([repeated], history_tokens=1, future_tokens=3, histories=20)
    rows = [*asked.histories, *asked.targets]
    assert len(set(rows)) == len(rows) == 26
    with pytest.raises(ValueError, match="pieces of 3 tokens, too few for 60 histories"):
        asked_of([repeated], history_tokens=1, future_tokens=3, histories=60)


def test_shuffled_sequences_have_their_own_tokens():
    before = some(50, 6)
    after = shuffled(before, np.random.default_rng(0))
    assert [sorted(each) for each in after] == [sorted(each) for each in before]
    assert sum(a != b for a, b in zip(after, before)) > 40


def test_prefixes_come_once_the_empty_one_first():
    assert with_prefixes([(1, 2), (1, 3)]) == [(), (1,), (1, 2), (1, 3)]
