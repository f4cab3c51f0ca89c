"""A model's answers, against one context at a time and, under noise, against `lm.score`."""

import itertools

import pytest
import torch
import transformers
from rank_cases import (
    BEGIN,
    FUTURES,
    HISTORIES,
    VOCAB,
    log_probs_one_by_one,
    perturbed,
    token_sequences,
)
from tiny import CONFIGS, SMALL, base_model, with_lora

from fastperturb import EditConfig, PerturbConfig, edit, wrap
from fastperturb.rank import ModelOracle
from fastperturb.rank.ask import model_oracle


def assert_close(log_probs, expected, tolerance=2e-5):
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_answers_are_those_of_one_context_at_a_time(architecture):
    model = base_model(architecture)
    expected = log_probs_one_by_one(model, HISTORIES, FUTURES)
    for batch_tokens in (8192, 60, 1):
        oracle = ModelOracle(model, prompt=BEGIN, batch_tokens=batch_tokens)
        assert_close(oracle.log_probs(HISTORIES, FUTURES), expected)


def tokens_of_passes(oracle, model, histories, futures):
    """The number of tokens, padding included, of each pass for a question."""
    oracle.log_probs([(4,)], [()])  # the first question of all also runs a token for its cache
    tokens = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].numel())
    )
    oracle.log_probs(histories, futures)
    hook.remove()
    return tokens


def test_a_history_is_encoded_once_and_a_future_that_another_extends_is_not_run():
    model = base_model()
    histories, futures = token_sequences(6, 8, 8), [(), (5,), (5, 6), (5, 6, 7), (8, 9, 4), (5, 6)]
    tokens = tokens_of_passes(ModelOracle(model), model, histories, futures)
    assert tokens == [6 * 8, 6 * (3 + 3)]
    tokens = tokens_of_passes(ModelOracle(model, batch_tokens=30), model, histories, futures)
    assert sum(tokens) == 6 * 8 + 6 * (3 + 3) and len(tokens) > 6
    # A history that cannot be encoded does not keep the others from it.
    tokens = tokens_of_passes(ModelOracle(model), model, [*histories, ()], [(5, 6, 7)])
    assert tokens == [6 * 8, 6 * 3, 3]


def test_a_pass_holds_no_more_tokens_and_logits_than_its_limits(monkeypatch):
    model, sizes = base_model(), []
    model.register_forward_hook(
        lambda module, args, inputs, output: sizes.append(
            (inputs["attention_mask"].numel(), output.logits.numel())
        ),
        with_kwargs=True,
    )
    expected = ModelOracle(model).log_probs(token_sequences(9, 1, 9), FUTURES)
    assert max(tokens for tokens, _ in sizes) > 100
    sizes.clear()
    assert_close(
        ModelOracle(model, batch_tokens=100).log_probs(token_sequences(9, 1, 9), FUTURES), expected
    )
    assert 50 < max(tokens for tokens, _ in sizes) <= 100
    sizes.clear()
    monkeypatch.setattr(model_oracle, "_MAX_LOGITS", 20 * VOCAB)
    assert_close(ModelOracle(model).log_probs(token_sequences(9, 1, 9), FUTURES), expected)
    assert 10 * VOCAB < max(logits for _, logits in sizes) <= 20 * VOCAB


def test_without_a_prompt_an_empty_history_is_answered_from_its_futures_alone():
    model = base_model("Gemma2")
    futures = [future for future in FUTURES if future]
    expected = log_probs_one_by_one(model, HISTORIES, futures, prompt=())
    assert_close(ModelOracle(model).log_probs(HISTORIES, futures), expected)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
HYBRID = {"layer_types": ["conv", "full_attention"]}
# Models whose passes must hold whole contexts, by the reason.
WITHOUT_SHARED_CACHE = {
    "no cache": transformers.OpenAIGPTConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "a cache of its own": transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4),
    "recurrent layers": transformers.Lfm2Config(**SMALL, **HYBRID),
    "angles by length": transformers.Phi3Config(
        **SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=8
    ),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("reason", WITHOUT_SHARED_CACHE)
def test_a_model_whose_cache_cannot_be_shared_answers_the_same(reason):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(WITHOUT_SHARED_CACHE[reason]).eval()
    histories, futures = HISTORIES[-3:], FUTURES[:5]
    expected = log_probs_one_by_one(model, histories, futures)
    for batch_tokens in (8192, 1):
        oracle = ModelOracle(model, prompt=BEGIN, batch_tokens=batch_tokens)
        assert_close(oracle.log_probs(histories, futures), expected)


def test_long_rope_runs_whole_contexts_only_where_its_angles_change():
    model = transformers.Phi3ForCausalLM(WITHOUT_SHARED_CACHE["angles by length"]).eval()
    histories, futures = token_sequences(4, 5, 5), token_sequences(3, 3, 3)
    tokens = tokens_of_passes(ModelOracle(model), model, histories, futures)
    assert sum(tokens) == 4 * 5 + 4 * 3 * 3
    tokens = tokens_of_passes(ModelOracle(model, prompt=BEGIN), model, histories, futures)
    assert sum(tokens) == 4 * 3 * (1 + 5 + 3)


def test_an_adapter_inside_the_layers_is_run():
    model = with_lora(base_model())
    log_probs = ModelOracle(model, prompt=BEGIN).log_probs(HISTORIES, FUTURES)
    assert_close(log_probs, log_probs_one_by_one(model, HISTORIES, FUTURES))
    with model.disable_adapter():
        assert (log_probs - log_probs_one_by_one(model, HISTORIES, FUTURES)).abs().max() > 0.1


def log_probs_by_score(lm, histories, futures, *, num_samples, seed):
    """Log-probs of every next token by `lm.score`, and the chain rule where it scores sequences."""

    def log_marginals(texts):
        rows = torch.zeros(len(texts), dtype=torch.int64)
        return lm.score(
            torch.tensor(texts), num_samples=num_samples, rows=rows, seed=seed
        ).log_marginal.float()

    rows = []
    for history, future in itertools.product(histories, futures):
        context = BEGIN + history + future
        log_probs = log_marginals([(*context, token) for token in range(VOCAB)])
        if lm.config.marginal == "token":
            log_probs = log_probs[:, -1]
        elif len(context) > 1:
            log_probs = log_probs - log_marginals([context])
        rows.append(log_probs)
    return torch.stack(rows).view(len(histories), len(futures), VOCAB)


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Llama"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"antithetic": True, "scope": "sequence"}], ids=str)
def test_next_token_distributions_are_those_of_the_score(architecture, marginal, options):
    lm = perturbed(base_model(architecture), marginal=marginal, **options)
    histories, futures = HISTORIES[-3:], FUTURES[:5]
    expected = log_probs_by_score(lm, histories, futures, num_samples=6, seed=3)
    for batch_tokens in (8192, 100, 1):  # all samples in a pass, or one
        oracle = ModelOracle(lm, prompt=BEGIN, num_samples=6, seed=3, batch_tokens=batch_tokens)
        log_probs = oracle.log_probs(histories, futures)
        assert_close(log_probs, expected)
        assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_without_a_prompt_a_future_after_the_empty_history_scores_the_same(marginal):
    lm = perturbed(base_model(), marginal=marginal)
    oracle = ModelOracle(lm, num_samples=4)
    (log_probs,) = oracle.log_probs([()], [(1, 7, 8)])[0]
    assert_close(log_probs, log_probs_by_score(lm, [(7, 8)], [()], num_samples=4, seed=0)[0, 0])


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_samples_form_one_model_whose_answer_depends_on_the_context_alone(marginal):
    lm = perturbed(base_model(), marginal=marginal)
    oracle = ModelOracle(lm, num_samples=4, seed=5)
    text = token_sequences(1, 9, 9)[0]
    answers = [
        # Beside other histories and futures, which change rows, padding and chunks.
        oracle.log_probs([(4,), text[:cut], (3,) * 12], [(), text[cut:], (6, 6)])[1, 1]
        for cut in range(1, 10)
    ]
    for answer in answers[1:]:
        assert_close(answer, answers[0])


def test_the_seed_decides_the_samples():
    lm = perturbed(base_model())
    first, again, other = (
        ModelOracle(lm, num_samples=2, seed=seed).log_probs([(4, 5)], [(6,)]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_more_samples_come_closer_to_the_marginal():
    lm = perturbed(base_model(), init_scale=0.3)

    def probabilities(num_samples, seed):
        return ModelOracle(lm, num_samples=num_samples, seed=seed).log_probs([(4, 5)], [(6,)]).exp()

    limit = probabilities(4096, 99)
    few, many = (
        sum((probabilities(size, seed) - limit).abs().sum() for seed in range(8))
        for size in (4, 256)
    )
    assert few > 4 * many  # the error falls as the root: 8 times


def test_exact_and_deterministic_models_take_one_sample():
    lm = perturbed(base_model("Llama"))
    oracle = ModelOracle(lm, prompt=BEGIN)
    with lm.exact():
        log_probs = oracle.log_probs(HISTORIES, FUTURES)
    assert_close(log_probs, log_probs_one_by_one(lm.base, HISTORIES, FUTURES))
    assert (log_probs - oracle.log_probs(HISTORIES, FUTURES)).abs().max() > 0.1
    lm = perturbed(base_model(), deterministic=True, num_samples=1)
    oracle = ModelOracle(lm, num_samples=32, seed=6)
    (log_probs,) = oracle.log_probs([(1, 4)], [(), (6,)])
    assert_close(log_probs, log_probs_by_score(lm, [(4,)], [(), (6,)], num_samples=1, seed=7)[0])
    rows = []
    lm.base.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    oracle.log_probs([(1, 4)], [(), (6,)])
    assert rows == [1, 1]


def prompt_tuned():
    peft = pytest.importorskip("peft", reason="PEFT tests need peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(base_model(), config).eval()


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (
            lambda: edit(base_model(), EditConfig()),
            {},
            ValueError,
            "model edits tokens .* cannot share a history's cache",
        ),
        (
            lambda: wrap(base_model(), PerturbConfig(), edits=EditConfig()),
            {},
            ValueError,
            "model edits tokens .* cannot share a history's cache",
        ),
        (prompt_tuned, {}, ValueError, "PROMPT_TUNING puts virtual tokens .*such as LoRA"),
        (lambda: torch.nn.Linear(3, 3), {}, TypeError, "causal LM or a PerturbedLM .*got Linear"),
        (lambda: "gpt2", {}, TypeError, "causal LM or a PerturbedLM .*got str"),
        (base_model, {"batch_tokens": 0}, ValueError, "batch_tokens must be at least 1, got 0"),
        (base_model, {"prompt": (97,)}, ValueError, r"prompt must hold .* in \[0, 97\), got 97"),
        (
            lambda: perturbed(base_model(), antithetic=True),
            {"num_samples": 3},
            ValueError,
            "num_samples must be even",
        ),
        (base_model, {"seed": 2**70}, ValueError, "seed must be an int of 64 bits"),
    ],
)
def test_models_and_options_that_cannot_answer_are_rejected_by_name(make, options, error, message):
    with pytest.raises(error, match=message):
        ModelOracle(make(), **options)


@pytest.mark.parametrize(
    ("histories", "futures", "message"),
    [
        ([(4,), ()], [(5,), ()], "both empty.* give ModelOracle a prompt="),
        ([], [()], "histories must hold at least one sequence"),
        ([(4,)], [], "futures must hold at least one sequence"),
        ([(4,), (5, -1)], [()], r"histories .*\[0, 97\), got -1 in the sequence numbered 1"),
        ([(4,)], [(5, 97)], "futures .*got 97 in the sequence numbered 0"),
        ([(4,) * 60], [(), (5,) * 5], "has 65 tokens, .*model has 64 positions; shorten"),
    ],
)
def test_histories_and_futures_without_an_answer_are_rejected(histories, futures, message):
    with pytest.raises(ValueError, match=message):
        ModelOracle(base_model()).log_probs(histories, futures)


def test_active_dropout_is_rejected():
    model = base_model("GPT2", embd_pdrop=0.5)
    oracle = ModelOracle(model)
    model.train()
    with pytest.raises(ValueError, match=r"dropout .*transformer.drop .*call model.eval\(\)"):
        oracle.log_probs([(4,)], [()])
    lm = perturbed(base_model("GPT2", embd_pdrop=0.5)).train()
    with pytest.raises(ValueError, match="dropout"):
        ModelOracle(lm).log_probs([(4,)], [()])
