"""A model's answers against one context at a time; under noise, against the score of its text."""

import itertools

import pytest
import torch
import transformers
from rank_cases import BEGIN, FUTURES, HISTORIES, VOCAB, one_by_one, perturbed, sequences
from tiny import CONFIGS, SMALL, base_model, with_lora

from fastperturb import EditConfig, edit
from fastperturb.rank.ask import models
from fastperturb.rank.ask.models import ModelOracle
from fastperturb.rank.ask.oracle import FunctionOracle, Metered, QueryBudgetSpent


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# A plain model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_answers_are_those_of_one_context_at_a_time(architecture):
    model = base_model(architecture)
    expected = one_by_one(model, HISTORIES, FUTURES)
    for batch_tokens in (8192, 60, 1):
        oracle = ModelOracle(model, prompt=BEGIN, batch_tokens=batch_tokens)
        close(oracle.log_probs(HISTORIES, FUTURES), expected)


def run_tokens(oracle, model, histories, futures):
    """How many tokens, padding included, each pass of a question has."""
    oracle.log_probs([(4,)], [()])  # the first one of all looks at the model's cache
    tokens = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].numel())
    )
    oracle.log_probs(histories, futures)
    hook.remove()
    return tokens


def test_a_history_is_encoded_once_and_a_future_that_begins_another_is_not_run():
    model = base_model()
    histories, futures = sequences(6, 8, 8), [(), (5,), (5, 6), (5, 6, 7), (8, 9, 4), (5, 6)]
    run = run_tokens(ModelOracle(model), model, histories, futures)
    assert run == [6 * 8, 6 * (3 + 3)]
    run = run_tokens(ModelOracle(model, batch_tokens=30), model, histories, futures)
    assert sum(run) == 6 * 8 + 6 * (3 + 3) and len(run) > 6
    # A history that cannot be encoded does not keep the others from it.
    run = run_tokens(ModelOracle(model), model, [*histories, ()], [(5, 6, 7)])
    assert run == [6 * 8, 6 * 3, 3]


def test_a_pass_holds_no_more_tokens_and_logits_than_it_may(monkeypatch):
    model, held = base_model(), []
    model.register_forward_hook(
        lambda module, args, inputs, output: held.append(
            (inputs["attention_mask"].numel(), output.logits.numel())
        ),
        with_kwargs=True,
    )
    expected = ModelOracle(model).log_probs(sequences(9, 1, 9), FUTURES)
    assert max(tokens for tokens, _ in held) > 100
    held.clear()
    close(ModelOracle(model, batch_tokens=100).log_probs(sequences(9, 1, 9), FUTURES), expected)
    assert 50 < max(tokens for tokens, _ in held) <= 100
    held.clear()
    monkeypatch.setattr(models, "_MOST_LOGITS", 20 * VOCAB)
    close(ModelOracle(model).log_probs(sequences(9, 1, 9), FUTURES), expected)
    assert 10 * VOCAB < max(logits for _, logits in held) <= 20 * VOCAB


def test_without_a_prompt_the_future_may_begin_the_text():
    model = base_model("Gemma2")
    futures = [future for future in FUTURES if future]
    expected = one_by_one(model, HISTORIES, futures, prompt=())
    close(ModelOracle(model).log_probs(HISTORIES, futures), expected)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
HYBRID = {"layer_types": ["conv", "full_attention"]}
# What must see a whole context in one pass, and why.
WHOLE = {
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
@pytest.mark.parametrize("why", WHOLE)
def test_a_model_whose_cache_cannot_be_shared_answers_all_the_same(why):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(WHOLE[why]).eval()
    histories, futures = HISTORIES[-3:], FUTURES[:5]
    expected = one_by_one(model, histories, futures)
    for batch_tokens in (8192, 1):
        oracle = ModelOracle(model, prompt=BEGIN, batch_tokens=batch_tokens)
        close(oracle.log_probs(histories, futures), expected)


def test_long_rope_is_asked_of_whole_contexts_only_where_its_angles_change():
    model = transformers.Phi3ForCausalLM(WHOLE["angles by length"]).eval()
    histories, futures = sequences(4, 5, 5), sequences(3, 3, 3)
    run = run_tokens(ModelOracle(model), model, histories, futures)
    assert sum(run) == 4 * 5 + 4 * 3 * 3
    run = run_tokens(ModelOracle(model, prompt=BEGIN), model, histories, futures)
    assert sum(run) == 4 * 3 * (1 + 5 + 3)


def test_an_adapter_inside_the_layers_is_run():
    model = with_lora(base_model())
    found = ModelOracle(model, prompt=BEGIN).log_probs(HISTORIES, FUTURES)
    close(found, one_by_one(model, HISTORIES, FUTURES))
    with model.disable_adapter():
        assert (found - one_by_one(model, HISTORIES, FUTURES)).abs().max() > 0.1


# Under a perturbation


def by_score(lm, histories, futures, *, num_samples, seed):
    """What `lm.score` says of every next token, by the chain rule where rows are outcomes."""

    def log_marginals(texts):
        rows = torch.zeros(len(texts), dtype=torch.int64)
        return lm.score(
            torch.tensor(texts), num_samples=num_samples, rows=rows, seed=seed
        ).log_marginal.float()

    found = []
    for history, future in itertools.product(histories, futures):
        context = BEGIN + history + future
        told = log_marginals([(*context, token) for token in range(VOCAB)])
        if lm.config.marginal == "token":
            told = told[:, -1]
        elif len(context) > 1:
            told = told - log_marginals([context])
        found.append(told)
    return torch.stack(found).view(len(histories), len(futures), VOCAB)


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Llama"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"antithetic": True, "scope": "sequence"}], ids=str)
def test_the_law_of_the_next_token_is_that_of_the_score(architecture, marginal, options):
    lm = perturbed(base_model(architecture), marginal=marginal, **options)
    histories, futures = HISTORIES[-3:], FUTURES[:5]
    expected = by_score(lm, histories, futures, num_samples=6, seed=3)
    for batch_tokens in (8192, 100, 1):  # all draws in a pass, or one
        oracle = ModelOracle(lm, prompt=BEGIN, num_samples=6, seed=3, batch_tokens=batch_tokens)
        found = oracle.log_probs(histories, futures)
        close(found, expected)
        close(found.exp().sum(-1), torch.ones(found.shape[:2]))


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_without_a_prompt_the_score_of_a_text_that_a_future_begins_is_the_same(marginal):
    lm = perturbed(base_model(), marginal=marginal)
    oracle = ModelOracle(lm, num_samples=4)
    (of_future,) = oracle.log_probs([()], [(1, 7, 8)])[0]
    close(of_future, by_score(lm, [(7, 8)], [()], num_samples=4, seed=0)[0, 0])


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_the_draws_are_one_model_whose_answer_depends_on_the_context_alone(marginal):
    lm = perturbed(base_model(), marginal=marginal)
    oracle = ModelOracle(lm, num_samples=4, seed=5)
    text = sequences(1, 9, 9)[0]
    answers = [
        # Beside other histories and futures, which change rows, padding and chunks.
        oracle.log_probs([(4,), text[:cut], (3,) * 12], [(), text[cut:], (6, 6)])[1, 1]
        for cut in range(1, 10)
    ]
    for answer in answers[1:]:
        close(answer, answers[0])


def test_the_seed_says_which_model_the_draws_are():
    lm = perturbed(base_model())
    first, again, other = (
        ModelOracle(lm, num_samples=2, seed=seed).log_probs([(4, 5)], [(6,)]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_more_draws_come_closer_to_the_marginal():
    lm = perturbed(base_model(), init_scale=0.3)

    def law(num_samples, seed):
        return ModelOracle(lm, num_samples=num_samples, seed=seed).log_probs([(4, 5)], [(6,)]).exp()

    limit = law(4096, 99)
    few, many = (
        sum((law(size, seed) - limit).abs().sum() for seed in range(8)) for size in (4, 256)
    )
    assert few > 4 * many  # the error falls as the root: 8 times


def test_exact_and_deterministic_models_have_one_draw():
    lm = perturbed(base_model("Llama"))
    oracle = ModelOracle(lm, prompt=BEGIN)
    with lm.exact():
        found = oracle.log_probs(HISTORIES, FUTURES)
    close(found, one_by_one(lm.base, HISTORIES, FUTURES))
    assert (found - oracle.log_probs(HISTORIES, FUTURES)).abs().max() > 0.1
    still = perturbed(base_model(), deterministic=True, num_samples=1)
    oracle = ModelOracle(still, num_samples=32, seed=6)
    (found,) = oracle.log_probs([(1, 4)], [(), (6,)])
    close(found, by_score(still, [(4,)], [(), (6,)], num_samples=1, seed=7)[0])
    rows = []
    still.base.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    oracle.log_probs([(1, 4)], [(), (6,)])
    assert rows == [1, 1]


# What is refused


def prompt_tuned():
    peft = pytest.importorskip("peft", reason="PEFT tests need peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(base_model(), config).eval()


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: edit(base_model(), EditConfig()), {}, ValueError, "EditedLM.*moves every token"),
        (prompt_tuned, {}, ValueError, "PROMPT_TUNING puts virtual tokens .*such as LoRA"),
        (lambda: torch.nn.Linear(3, 3), {}, TypeError, "causal LM or a PerturbedLM .*got Linear"),
        (lambda: "gpt2", {}, TypeError, "causal LM or a PerturbedLM .*got str"),
        (base_model, {"batch_tokens": 0}, ValueError, "batch_tokens must be at least 1, got 0"),
        (base_model, {"prompt": (97,)}, ValueError, r"prompt must be .* in \[0, 97\), got 97"),
        (
            lambda: perturbed(base_model(), antithetic=True),
            {"num_samples": 3},
            ValueError,
            "num_samples must be even",
        ),
        (base_model, {"seed": 2**70}, ValueError, "seed must be an int of 64 bits"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(make, options, error, message):
    with pytest.raises(error, match=message):
        ModelOracle(make(), **options)


@pytest.mark.parametrize(
    ("histories", "futures", "message"),
    [
        ([(4,), ()], [(5,), ()], "both empty.* give ModelOracle a prompt="),
        ([], [()], "histories must hold at least one sequence"),
        ([(4,)], [], "futures must hold at least one sequence"),
        ([(4,), (5, -1)], [()], r"histories .*\[0, 97\), got -1 in the one numbered 1"),
        ([(4,)], [(5, 97)], "futures .*got 97 in the one numbered 0"),
        ([(4,) * 60], [(), (5,) * 5], "has 65 tokens, .*made for 64 positions; shorten"),
    ],
)
def test_a_question_without_an_answer_is_refused(histories, futures, message):
    with pytest.raises(ValueError, match=message):
        ModelOracle(base_model()).log_probs(histories, futures)


def test_active_dropout_is_refused():
    model = base_model("GPT2", embd_pdrop=0.5)
    oracle = ModelOracle(model)
    model.train()
    with pytest.raises(ValueError, match=r"dropout .*transformer.drop .*call model.eval\(\)"):
        oracle.log_probs([(4,)], [()])
    lm = perturbed(base_model("GPT2", embd_pdrop=0.5)).train()
    with pytest.raises(ValueError, match="dropout"):
        ModelOracle(lm).log_probs([(4,)], [()])


# Other oracles


def test_a_function_is_asked_once_a_pair_and_normalised():
    asked = []

    def function(context):
        asked.append(context)
        return [float(len(context)), 2.0 * sum(context), 7.0]

    found = FunctionOracle(function, 3).log_probs([(), (1, 2)], [(), (0,)])
    assert asked == [(), (0,), (1, 2), (1, 2, 0)]
    assert found.shape == (2, 2, 3) and found.dtype == torch.float64
    close(found[1, 1], torch.tensor([3.0, 6.0, 7.0]).double().log_softmax(0), 1e-12)
    with pytest.raises(ValueError, match=r"\[V\] = \[4\] logits, got \[3\] after \(1,\)"):
        FunctionOracle(function, 4).log_probs([(1,)], [()])


def test_a_meter_counts_contexts_and_asks_nothing_beyond_the_budget():
    asked = []

    def function(context):
        asked.append(context)
        return [0.0, 1.0]

    meter = Metered(FunctionOracle(function, 2), budget=7)
    meter.log_probs([(), (0,)], [(), (0,), (0, 1)])  # () + (0,) is (0,) + ()
    assert meter.queries == 5
    asked.clear()
    with pytest.raises(QueryBudgetSpent, match="5 of 7 were asked, and the next step needs 3"):
        meter.log_probs([(1,)], [(), (0,), (1,)])
    assert not asked and meter.queries == 5
    meter.log_probs([(1,)], [(), (0,)])
    assert meter.queries == 7
    with pytest.raises(ValueError, match="budget must be .*got -1"):
        Metered(meter, budget=-1)
