"""Decoding under the noise against naive loops of full forwards."""

import itertools

import pytest
import torch
from decoding import (
    ARCHITECTURES,
    MODES,
    SEED,
    STEPS,
    Recorder,
    base_model,
    mean_probs,
    naive_greedy,
    perturbed,
    prompts,
    recorded_scores,
)
from tiny import with_lora
from torch.nn import functional as F

from fastperturb import PerturbConfig, wrap


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_matches_a_naive_loop_of_full_forwards(architecture, mode, scope):
    lm, inputs = perturbed(architecture, scope=scope), prompts()
    expected = naive_greedy(lm, **inputs, mode=mode)
    for use_cache in (True, False):
        ids = lm.generate(
            **inputs, **MODES[mode], seed=SEED, max_new_tokens=STEPS, use_cache=use_cache
        )
        assert ids.equal(expected)
    with lm.exact():
        assert not lm.generate(**inputs, max_new_tokens=STEPS).equal(expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_decoding_uses_the_latents_of_forward(num_samples, lora):
    model = base_model()
    lm = wrap(with_lora(model) if lora else model, PerturbConfig(init_scale=0.7)).eval()
    ids = start = prompts(padding=False)["input_ids"]
    for _ in range(STEPS):
        out = lm(input_ids=ids, num_samples=num_samples, seed=SEED, return_logits=True)
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    options = {"seed": SEED, "max_new_tokens": STEPS}
    assert lm.generate(start, mode="mixture", num_samples=num_samples, **options).equal(ids)
    if num_samples == 1:
        assert lm.generate(start, mode="sequence", **options).equal(ids)


@pytest.mark.parametrize("mode", MODES)
def test_padded_batch_decodes_as_its_rows_do_alone(mode):
    lm, inputs = perturbed("GPT2"), prompts()
    options = {**MODES[mode], "seed": SEED, "max_new_tokens": STEPS}
    together = lm.generate(**inputs, **options)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row, mask][None]
        alone = lm.generate(ids, rows=torch.tensor([row]), **options)
        assert together[row, len(mask) :].equal(alone[0, ids.shape[1] :])


@pytest.mark.parametrize("mode", MODES)
def test_equal_row_ids_decode_alike_and_another_seed_does_not(mode):
    lm = perturbed()
    ids = prompts(padding=False)["input_ids"][:1].repeat(3, 1)
    options = {**MODES[mode], "max_new_tokens": STEPS}
    rows = lm.generate(ids, seed=SEED, rows=torch.tensor([7, 2, 7]), **options)
    assert rows[0].equal(rows[2]) and not rows[0].equal(rows[1])
    assert not lm.generate(ids, seed=SEED + 1, rows=torch.tensor([7, 2, 7]), **options).equal(rows)


@pytest.mark.parametrize("mode", MODES)
def test_perturb_mask_leaves_prompt_positions_unperturbed(mode):
    lm, inputs = perturbed(), prompts()
    perturb_mask = torch.rand(3, 7) < 0.4
    options = {"seed": SEED, "max_new_tokens": STEPS, **MODES[mode]}
    ids = lm.generate(**inputs, perturb_mask=perturb_mask, **options)
    assert ids.equal(naive_greedy(lm, **inputs, mode=mode, perturb_mask=perturb_mask))
    assert not ids.equal(lm.generate(**inputs, **options))


def test_only_samples_that_are_averaged_are_antithetic():
    lm, inputs = perturbed(antithetic=True), prompts()
    options = {"seed": SEED, "max_new_tokens": STEPS}
    for mode in ("sequence", "token"):
        ids = lm.generate(**inputs, mode=mode, **options)
        assert ids.equal(naive_greedy(lm, **inputs, mode=mode))
    scores = recorded_scores(lm, inputs, mode="mixture", num_samples=2)
    expected = mean_probs(lm, *inputs.values(), [0, 1], antithetic=True)
    torch.testing.assert_close(scores[0].exp(), expected, rtol=1e-4, atol=1e-5)


def test_logits_processors_see_the_log_of_the_mean_probability():
    lm, inputs = perturbed("Gemma2", num_samples=3), prompts()
    first, _ = recorded_scores(lm, inputs, mode="mixture")
    expected = mean_probs(lm, *inputs.values(), [0, 1, 2])
    torch.testing.assert_close(first.exp(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_returned_sequence_of_a_row_has_its_own_samples(mode):
    lm, inputs, recorder = perturbed(), prompts(), Recorder()
    perturb_mask = torch.rand(3, 7) < 0.5
    ids = lm.generate(
        **inputs,
        **MODES[mode],
        seed=SEED,
        perturb_mask=perturb_mask,
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        max_new_tokens=3,
        logits_processor=[recorder],
    ).view(3, 2, -1)
    for step, index in itertools.product(range(3), range(2)):
        mask = F.pad(inputs["attention_mask"], (0, step), value=1)
        mixed = [3 * index, 3 * index + 1, 3 * index + 2]
        samples = {"sequence": [index], "token": [2 * step + index], "mixture": mixed}[mode]
        padded = F.pad(perturb_mask, (0, step), value=True)
        prefix = ids[:, index, : 7 + step]
        expected = mean_probs(lm, prefix, mask, samples, perturb_mask=padded)
        probs = recorder.scores[step].softmax(-1).view(3, 2, -1)[:, index]
        torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_decodes_from_the_logits_of_the_model():
    lm, inputs = perturbed("Gemma2"), prompts()
    lm.base.bfloat16()
    first, _ = recorded_scores(lm, inputs)
    expected = mean_probs(lm, *inputs.values(), [0])
    torch.testing.assert_close(first.softmax(-1), expected.float(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_text_without_a_seed_is_that_of_seed_0_at_every_call(mode):
    lm, inputs = perturbed(), prompts()
    options = {**MODES[mode], "max_new_tokens": STEPS}
    state = torch.get_rng_state()
    first = lm.generate(**inputs, **options)
    assert torch.get_rng_state().equal(state)
    assert lm.generate(**inputs, **options).equal(first)
    assert lm.generate(**inputs, **options, seed=0).equal(first)
    assert not lm.generate(**inputs, **options, seed=1).equal(first)


def test_sampled_text_without_a_seed_follows_the_generator_of_torch():
    lm, inputs = perturbed(), prompts()
    # Near-greedy choices: without the drawn noise the calls would be the same.
    options = {"do_sample": True, "temperature": 1e-4, "max_new_tokens": STEPS}
    torch.manual_seed(3)
    first = lm.generate(**inputs, **options)
    torch.manual_seed(3)
    assert lm.generate(**inputs, **options).equal(first)
    assert not lm.generate(**inputs, **options).equal(first)
