"""Streams: weighted sums of histories' logits, continued token by token or along given ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_cases import small_isan
from tiny import base_model

from fastperturb import PerturbConfig, wrap
from fastperturb.rank import (
    FunctionOracle,
    Metered,
    ModelOracle,
    QueryBudgetSpent,
    follow,
    open_streams,
    write,
)
from fastperturb.rank.combine import streams as module

HISTORIES = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (14, 15), (8, 3)]
TOKENS = torch.tensor([[4, 5, 6, 7], [4, 9, 9, 3]])


def random_weights(sums=3):
    return np.random.default_rng(0).standard_normal((sums, len(HISTORIES)))


def combined_one_by_one(oracle, weights, tokens):
    """softmax(sum_n w[n] centred log-probs of history n), history by history [W, L + 1, V]."""
    futures = [tuple(tokens[:end]) for end in range(len(tokens) + 1)]
    logits = torch.stack([oracle.log_probs([h], futures)[0].double() for h in HISTORIES])
    logits = logits - logits.mean(-1, keepdim=True)
    return torch.einsum("wn,nlv->wlv", torch.from_numpy(weights), logits).log_softmax(-1)


def models():
    """Models whose heads and perturbations combine in different ways, by name."""
    torch.manual_seed(0)
    plain = {name: base_model(name) for name in ("Llama", "GPT2", "Gemma2", "Cohere", "GPTNeoX")}
    config = PerturbConfig(latent_dim=4, init_scale=1.0)
    perturbed = wrap(base_model("Llama"), config)
    sequence = wrap(base_model("Llama"), replace(config, marginal="sequence"))
    biased = base_model("Llama")
    biased.lm_head = torch.nn.Linear(biased.config.hidden_size, biased.config.vocab_size)
    torch.nn.init.normal_(biased.lm_head.bias)
    return {
        **plain,
        "biased head": biased,
        "perturbed": perturbed,
        "perturbed, sequence marginal": sequence,
    }


@pytest.mark.parametrize("name", models())
def test_stream_distributions_are_the_softmax_of_weighted_sums_of_centred_logits(name):
    oracle = ModelOracle(models()[name], prompt=(1,), num_samples=4)
    weights = random_weights()
    streams = open_streams(oracle, HISTORIES, weights, copies=2)
    log_probs = torch.cat([streams.law[:, :, None], streams.advance(TOKENS)], dim=2)
    for number, tokens in enumerate(TOKENS.tolist()):
        expected = combined_one_by_one(oracle, weights, tokens)
        torch.testing.assert_close(log_probs[:, number].double(), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("batch_tokens", [8192, 20])
def test_follow_gives_what_streams_give_token_by_token(name, batch_tokens, monkeypatch):
    oracle = ModelOracle(models()[name], prompt=(1,), num_samples=4, batch_tokens=batch_tokens)
    if batch_tokens == 20:
        monkeypatch.setattr(module, "_BLOCK", 1)
    streams = open_streams(oracle, HISTORIES, random_weights(), copies=2)
    expected = torch.cat([streams.law[:, :, None], streams.advance(TOKENS)], dim=2)
    log_probs = follow(oracle, HISTORIES, random_weights(), TOKENS)
    torch.testing.assert_close(log_probs, expected, atol=2e-5, rtol=0)
    without_tokens = follow(oracle, HISTORIES, random_weights(), TOKENS[:, :0])
    torch.testing.assert_close(without_tokens, expected[:, :, :1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", models())
def test_tokens_one_by_one_give_what_they_give_at_once(name):
    oracle = ModelOracle(models()[name], prompt=(1,), num_samples=4)
    at_once = open_streams(oracle, HISTORIES, random_weights(), copies=2)
    one_by_one = open_streams(oracle, HISTORIES, random_weights(), copies=2)
    expected = at_once.advance(TOKENS)
    log_probs = torch.cat([one_by_one.advance(part) for part in TOKENS.split(1, 1)], dim=2)
    torch.testing.assert_close(log_probs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(one_by_one.law, expected[:, :, -1], atol=2e-5, rtol=0)


def test_a_linear_head_runs_on_sums_of_hidden_states_alone(monkeypatch):
    model, widths = base_model("Llama"), []
    oracle = ModelOracle(model, prompt=(1,))
    run = oracle.passes.run

    def recorded(*arguments, **options):
        output, cache = run(*arguments, **options)
        widths.append(output.shape[-1])
        return output, cache

    oracle.log_probs([(4,)], [()])
    monkeypatch.setattr(oracle.passes, "run", recorded)
    open_streams(oracle, HISTORIES, random_weights(), copies=2).advance(TOKENS)
    assert set(widths) == {model.config.hidden_size}  # hidden states, no logits of any history


def test_sums_stay_in_full_precision_under_autocast():
    model = base_model("Llama").bfloat16()
    oracle, weights = ModelOracle(model, prompt=(1,)), 30 * random_weights(1)
    hidden = []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (log_probs,) = open_streams(oracle, HISTORIES, weights).law
        for history in HISTORIES:
            ids = torch.tensor([[1, *history]])
            hidden.append(model.model(ids, attention_mask=torch.ones_like(ids))[0][0, -1])
    summed = torch.from_numpy(weights[0]) @ torch.stack(hidden).double()
    expected = (summed @ model.lm_head.weight.double().T).log_softmax(-1)
    # Padding and batching change bf16 hidden states by a bit; sums in bf16 would add 0.5 and more.
    torch.testing.assert_close(log_probs[0].double(), expected, atol=0.2, rtol=0)


def test_sums_of_perturbed_logits_stay_in_full_precision_under_autocast():
    oracle = ModelOracle(models()["perturbed"].bfloat16(), prompt=(1,), num_samples=4)
    weights = 30 * random_weights(1)
    with torch.autocast("cpu", torch.bfloat16):
        (log_probs,) = open_streams(oracle, HISTORIES, weights).law
        logits = oracle.log_probs(HISTORIES, [()])[:, 0].double()
    logits = logits - logits.mean(-1, keepdim=True)
    expected = (torch.from_numpy(weights[0]) @ logits).log_softmax(-1)
    torch.testing.assert_close(log_probs[0].double(), expected, atol=1e-3, rtol=0)


def test_an_oracle_that_is_a_function_has_streams_too():
    model = small_isan()
    weights = random_weights()
    histories = [tuple(token % 6 for token in history) for history in HISTORIES]
    oracle = FunctionOracle(lambda context: model.log_probs([context], [()])[0, 0], 6)
    tokens = TOKENS[:, :2] % 6
    log_probs = open_streams(oracle, histories, weights, copies=2).advance(tokens)
    logits = model.log_probs(histories, [tuple(tokens[1].tolist())])[:, 0]
    logits = logits - logits.mean(-1, keepdim=True)
    expected = (torch.from_numpy(weights) @ logits).log_softmax(-1)
    torch.testing.assert_close(log_probs[:, 1, 1], expected)


@pytest.mark.parametrize("cached", [True, False])
def test_streams_count_each_context_once_and_keep_to_a_budget(cached):
    model = ModelOracle(base_model("Llama"), prompt=(1,))
    oracle = model
    if not cached:
        oracle = FunctionOracle(lambda context: model.log_probs([context], [()])[0, 0], 97)
    meter = Metered(oracle, budget=5 * 6)
    streams = open_streams(meter, HISTORIES, random_weights(), copies=2)
    assert meter.queries == 5
    streams.advance(torch.tensor([[4], [4]]))
    assert meter.queries == 5 * 2
    streams.advance(torch.tensor([[5, 6], [5, 7]]))
    assert meter.queries == 5 * 5
    with pytest.raises(QueryBudgetSpent, match="25 of 30 were asked, and the next step needs 10"):
        streams.advance(torch.tensor([[1], [1]]))


def test_a_history_combined_with_no_other_writes_what_the_model_does():
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
    written = write(ModelOracle(model, prompt=(1,)), HISTORIES, weights, 6)
    assert list(written) == expected[0, ids.shape[1] :].tolist()


def test_a_generator_samples_the_tokens_to_write():
    model, weights = small_isan(vocab_size=4), np.array([0.7, 0.6])
    histories, generator = [(0, 1), (2, 3)], torch.Generator().manual_seed(0)
    written = [write(model, histories, weights, 1, generator=generator) for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(written)[:, 0], minlength=4) / len(written)
    expected = open_streams(model, histories, weights[None]).law[0, 0].exp()
    torch.testing.assert_close(frequencies.double(), expected, atol=0.032, rtol=0)  # 4 sd


@pytest.mark.parametrize(
    ("weights", "copies", "message"),
    [
        (np.ones(5), 1, r"weights must be \[W, N\] with N = 5"),
        (np.ones((2, 4)), 1, r"weights must be \[W, N\] with N = 5"),
        (np.ones((2, 5)), 0, "copies must be at least 1"),
    ],
)
def test_weights_and_copies_that_do_not_fit_are_rejected(weights, copies, message):
    with pytest.raises(ValueError, match=message):
        open_streams(small_isan(), HISTORIES, weights, copies=copies)


def test_streams_beyond_a_models_positions_are_rejected():
    model = base_model("GPT2")
    most = model.config.n_positions
    streams = open_streams(ModelOracle(model), [(5,) * (most - 2)], np.ones((1, 1)))
    streams.advance(torch.tensor([[5, 5]]))
    with pytest.raises(ValueError, match=f"has {most + 1} tokens"):
        streams.advance(torch.tensor([[5]]))
