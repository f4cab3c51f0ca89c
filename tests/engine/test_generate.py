"""Decoding under the noise against naive loops, and samples against enumerated marginals."""

import itertools
import math

import pytest
import torch
import transformers
from torch.nn import functional as F

from fastperturb import PerturbConfig, noise, wrap

V, STEPS, SEED = 97, 6, 5
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    # Scaled embeddings, capped logits, and a window shorter than the prompts.
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SHAPE, final_logit_softcapping=3.0, sliding_window=4)
    ),
}
MODES = {
    "sequence": {"mode": "sequence"},
    "token": {"mode": "token"},
    "mixture": {"mode": "mixture", "num_samples": 3},
}


def base_model(architecture="llama"):
    torch.manual_seed(0)
    return ARCHITECTURES[architecture]().eval()


def perturbed(architecture="llama", **changes):
    return wrap(base_model(architecture), PerturbConfig(**{"init_scale": 0.7, **changes}))


def prompts(size=3, length=7, padding=True):
    """Prompts [B, T] of different lengths, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, V, (size, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :3] = 0
        ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def samples_of(mode, step):
    return {"sequence": [0], "token": [step], "mixture": [0, 1, 2]}[mode]


@torch.no_grad()
def mean_probs(lm, ids, mask, samples, *, rows=None, moves=None, antithetic=False):
    """The mean over sample numbers of next-token probabilities, one full forward each."""
    embeddings = lm.base.get_input_embeddings()(ids)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    z = noise.latent(
        SEED,
        (len(samples), *ids.shape, lm.transform.latent_dim),
        scope=lm.config.scope,
        samples=torch.tensor(samples),
        rows=rows,
        positions=positions,
        antithetic=antithetic,
    )
    total = 0
    for sample in z:
        moved = lm.transform(embeddings.float(), sample).to(embeddings.dtype)
        if moves is not None:
            moved = torch.where(moves[..., None], moved, embeddings)
        total = total + lm.base(
            inputs_embeds=moved, attention_mask=mask, position_ids=positions
        ).logits[:, -1].softmax(-1)
    return total / len(samples)


def naive_greedy(lm, input_ids, attention_mask, mode, *, steps=STEPS, moves=None, **options):
    ids, mask = input_ids, attention_mask
    for step in range(steps):
        probs = mean_probs(lm, ids, mask, samples_of(mode, step), moves=moves, **options)
        ids = torch.cat([ids, probs.argmax(-1, keepdim=True)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
        moves = None if moves is None else F.pad(moves, (0, 1), value=True)
    return ids


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_is_that_of_a_naive_loop_of_full_forwards(architecture, mode, scope):
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
def test_decoding_takes_the_noise_of_forward(num_samples, lora):
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


def with_lora(model):
    peft = pytest.importorskip("peft", reason="LoRA tests need peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch_decodes_as_its_rows_do_alone(mode):
    lm, inputs = perturbed("gpt2"), prompts()
    options = {**MODES[mode], "seed": SEED, "max_new_tokens": STEPS}
    together = lm.generate(**inputs, **options)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row, mask][None]
        alone = lm.generate(ids, rows=torch.tensor([row]), **options)
        assert together[row, len(mask) :].equal(alone[0, ids.shape[1] :])


@pytest.mark.parametrize("mode", MODES)
def test_a_row_keeps_its_noise_wherever_it_stands_and_another_seed_changes_it(mode):
    lm = perturbed()
    ids = prompts(padding=False)["input_ids"][:1].repeat(3, 1)
    options = {**MODES[mode], "max_new_tokens": STEPS}
    rows = lm.generate(ids, seed=SEED, rows=torch.tensor([7, 2, 7]), **options)
    assert rows[0].equal(rows[2]) and not rows[0].equal(rows[1])
    assert not lm.generate(ids, seed=SEED + 1, rows=torch.tensor([7, 2, 7]), **options).equal(rows)


@pytest.mark.parametrize("mode", MODES)
def test_a_perturb_mask_keeps_prompt_positions_still(mode):
    lm, inputs = perturbed(), prompts()
    moves = torch.rand(3, 7) < 0.4
    options = {"seed": SEED, "max_new_tokens": STEPS, **MODES[mode]}
    ids = lm.generate(**inputs, perturb_mask=moves, **options)
    assert ids.equal(naive_greedy(lm, **inputs, mode=mode, moves=moves))
    assert not ids.equal(lm.generate(**inputs, **options))


def test_only_draws_that_are_averaged_are_antithetic():
    lm, inputs = perturbed(antithetic=True), prompts()
    options = {"seed": SEED, "max_new_tokens": STEPS}
    for mode in ("sequence", "token"):
        ids = lm.generate(**inputs, mode=mode, **options)
        assert ids.equal(naive_greedy(lm, **inputs, mode=mode))
    scores = recorded_scores(lm, inputs, mode="mixture", num_samples=2)
    expected = mean_probs(lm, *inputs.values(), [0, 1], antithetic=True)
    torch.testing.assert_close(scores[0].exp(), expected, rtol=1e-4, atol=1e-5)


class Recorder(transformers.LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores)
        return scores


def recorded_scores(lm, inputs, **options):
    recorder = Recorder()
    lm.generate(**inputs, seed=SEED, max_new_tokens=2, logits_processor=[recorder], **options)
    return recorder.scores


def test_processors_see_the_log_of_the_mean_probability():
    lm, inputs = perturbed("gemma2", num_samples=3), prompts()
    first, _ = recorded_scores(lm, inputs, mode="mixture")
    expected = mean_probs(lm, *inputs.values(), [0, 1, 2])
    torch.testing.assert_close(first.exp(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_sequence_returned_for_a_row_has_draws_of_its_own(mode):
    lm, inputs, moves, recorder = perturbed(), prompts(), torch.rand(3, 7) < 0.5, Recorder()
    ids = lm.generate(
        **inputs,
        **MODES[mode],
        seed=SEED,
        perturb_mask=moves,
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        max_new_tokens=3,
        logits_processor=[recorder],
    ).view(3, 2, -1)
    for step, copy in itertools.product(range(3), range(2)):
        mask = F.pad(inputs["attention_mask"], (0, step), value=1)
        mixed = [3 * copy, 3 * copy + 1, 3 * copy + 2]
        samples = {"sequence": [copy], "token": [2 * step + copy], "mixture": mixed}[mode]
        expected = mean_probs(
            lm, ids[:, copy, : 7 + step], mask, samples, moves=F.pad(moves, (0, step), value=True)
        )
        found = recorder.scores[step].softmax(-1).view(3, 2, -1)[:, copy]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "min_new_tokens": 3},
        {"do_sample": True, "top_k": 5, "max_length": 11},
        {"generation_config": transformers.GenerationConfig(do_sample=True, max_new_tokens=4)},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [3, 4, 5]},
        {"do_sample": True, "temperature": 2.0, "pad_token_id": None},
    ],
    ids=["copies", "top p", "top k", "config", "penalties", "no padding token"],
)
def test_without_noise_it_is_the_base_models_own_generate(options, mode):
    lm, inputs = perturbed(), prompts()
    torch.nn.init.zeros_(lm.transform.U)
    if "generation_config" not in options and "max_length" not in options:
        options = {**options, "max_new_tokens": 8}
    if "generation_config" not in options:
        options = {"eos_token_id": list(range(6, 30)), "pad_token_id": 1, **options}
    torch.manual_seed(3)
    expected = lm.base.generate(**inputs, **options)
    torch.manual_seed(3)
    assert lm.generate(**inputs, **MODES[mode], seed=SEED, **options).equal(expected)
    with lm.exact():
        torch.manual_seed(3)
        assert lm.generate(**inputs, mode=mode, **options).equal(expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_finished_row_is_padded_and_the_others_go_on(mode):
    lm, inputs = perturbed(), prompts()
    free = lm.generate(**inputs, **MODES[mode], seed=SEED, max_new_tokens=STEPS)[:, 7:]
    eos = int(free[0, 1])
    expected = free.clone()
    for row in expected:
        if (row == eos).any():
            row[(row == eos).nonzero()[0, 0] + 1 :] = 1
    assert (expected[0, 2:] == 1).all() and (expected != 1).any(0).all()
    for use_cache in (True, False):
        encoded = []
        hook = lm.base.register_forward_pre_hook(
            lambda module, args, kwargs, seen=encoded: seen.append(kwargs["inputs_embeds"].shape),
            with_kwargs=True,
        )
        ids = lm.generate(
            **inputs,
            **MODES[mode],
            seed=SEED,
            max_new_tokens=STEPS,
            use_cache=use_cache,
            eos_token_id=eos,
            pad_token_id=1,
        )
        hook.remove()
        assert ids[:, 7:].equal(expected)
        if mode == "token" or not use_cache:
            assert [length for _, length, _ in encoded] == list(range(7, 7 + STEPS))
            assert encoded[2][0] < encoded[0][0]  # what is finished is not encoded again
        else:
            assert [length for _, length, _ in encoded] == [7] + [1] * (STEPS - 1)


def test_a_static_cache_serves_one_stream_and_is_refused_for_several():
    lm, inputs = perturbed(), prompts()
    options = {"seed": SEED, "max_new_tokens": STEPS}
    static = lm.generate(**inputs, cache_implementation="static", **options)
    assert static.equal(lm.generate(**inputs, **options))
    with pytest.raises(ValueError, match="cache_implementation='static' has no room for the 8"):
        lm.generate(**inputs, mode="mixture", cache_implementation="static", **options)


def test_half_precision_decodes_from_the_models_own_logits():
    lm, inputs = perturbed("gemma2"), prompts()
    lm.base.bfloat16()
    first, _ = recorded_scores(lm, inputs)
    expected = mean_probs(lm, *inputs.values(), [0])
    torch.testing.assert_close(first.softmax(-1), expected.float(), rtol=0.1, atol=0.01)


def word_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number:02}": number for number in range(V - 1)}
    words["abcdef"] = V - 1  # which transformers' stop strings want to be able to spell
    model = tokenizers.models.WordLevel(words, unk_token="w00")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w00")


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_the_text(mode):
    lm, tokenizer = perturbed(), word_tokenizer()
    ids = prompts(padding=False)["input_ids"][:1]
    options = {**MODES[mode], "seed": SEED, "tokenizer": tokenizer}
    free = lm.generate(ids, max_new_tokens=STEPS, **options)
    third = tokenizer.decode(free[0, 7 + 2])
    first = free[0, 7:].tolist().index(int(free[0, 7 + 2]))
    stopped = lm.generate(ids, max_new_tokens=STEPS, stop_strings=[third], **options)
    assert stopped.equal(free[:, : 7 + first + 1])
    config = transformers.GenerationConfig(max_new_tokens=STEPS, stop_strings=third)
    assert lm.generate(ids, generation_config=config, **options).equal(stopped)
    with pytest.raises(ValueError, match="stop_strings need tokenizer="):
        lm.generate(ids, generation_config=config, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_without_a_padding_token_leave_a_batch_as_transformers_does(mode):
    lm, inputs = perturbed(), prompts()
    torch.nn.init.zeros_(lm.transform.U)
    stop = [f"w{number:02}" for number in range(30)]
    options = {"max_new_tokens": 12, "stop_strings": stop, "tokenizer": word_tokenizer()}
    expected = lm.base.generate(**inputs, **options)
    for use_cache in (True, False):
        assert lm.generate(**inputs, **MODES[mode], **options, use_cache=use_cache).equal(expected)


class Collector(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", MODES)
def test_a_streamer_gets_the_prompt_and_then_each_token(mode):
    lm, inputs, streamer = perturbed(), prompts(), Collector()
    ids = lm.generate(**inputs, **MODES[mode], seed=SEED, max_new_tokens=STEPS, streamer=streamer)
    assert streamer.ended and len(streamer.pieces) == 1 + STEPS
    prompt, *tokens = streamer.pieces
    assert torch.cat([prompt, torch.stack(tokens, 1)], 1).equal(ids)


def test_text_streams_as_it_does_from_transformers(capsys):
    lm, tokenizer = perturbed(), word_tokenizer()
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    ids = prompts(padding=False)["input_ids"][:1]
    generated = lm.generate(ids, seed=SEED, max_new_tokens=STEPS, streamer=streamer)
    assert capsys.readouterr().out.split() == tokenizer.decode(generated[0, 7:]).split()


def test_the_seed_comes_from_torchs_generator_where_none_is_given():
    lm, inputs = perturbed(), prompts()
    torch.manual_seed(3)
    one = lm.generate(**inputs, max_new_tokens=STEPS)
    torch.manual_seed(3)
    assert lm.generate(**inputs, max_new_tokens=STEPS).equal(one)
    assert not lm.generate(**inputs, max_new_tokens=STEPS).equal(one)


# --- samples against the enumerated marginals ----------------------------------------------

WORDS, LENGTH, LATENTS = 5, 3, 2


def tiny_lm(scope):
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**shape, "num_attention_heads": 2, "initializer_range": 0.8})
    )
    config = PerturbConfig(
        latent="rademacher", latent_dim=LATENTS, init_scale=1.5, scope=scope, marginal="sequence"
    )
    return wrap(model.eval(), config)


@torch.no_grad()
def enumerated_marginals(lm, first):
    """The probability [V^L] of every continuation of `first`, under either marginal."""
    words = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
    ids = F.pad(words, (1, 0), value=first)
    moving = LENGTH if lm.config.scope == "token" else 1
    log_probs = []
    for signs in itertools.product([-1.0, 1.0], repeat=LATENTS * moving):
        z = torch.tensor(signs).view(moving, LATENTS).expand(LENGTH, LATENTS)
        moved = lm.transform(lm.base.get_input_embeddings()(ids[:, :-1]), z)
        logits = lm.base(inputs_embeds=moved).logits.double()
        log_probs.append(logits.log_softmax(-1).gather(-1, words[..., None])[..., 0])
    probs = torch.stack(log_probs).exp()  # (draws, V^L, L)
    return {"sequence": probs.prod(-1).mean(0), "token": probs.mean(0).prod(-1)}


def chi_square(counts, probabilities):
    """The statistic over its 99.9% quantile, cells that expect under five counted as one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's cube
    return float(statistic) / (freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_samples_follow_their_own_marginal_and_not_the_other(mode, scope):
    lm = tiny_lm(scope)
    marginals = enumerated_marginals(lm, first=2)
    assert marginals[mode].sum().item() == pytest.approx(1, abs=1e-6)
    torch.manual_seed(0)
    ids = lm.generate(
        torch.full((200, 1), 2),
        torch.ones(200, 1),
        mode=mode,
        seed=SEED,
        do_sample=True,
        num_return_sequences=100,
        max_new_tokens=LENGTH,
    )
    code = (ids[:, 1:] * WORDS ** torch.arange(LENGTH).flip(0)).sum(1)
    counts = torch.bincount(code, minlength=WORDS**LENGTH).double()
    other = "token" if mode == "sequence" else "sequence"
    assert chi_square(counts, marginals[mode]) < 1
    assert chi_square(counts, marginals[other]) > 3


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "sequnce"}, ValueError, "mode must be one of .* got 'sequnce' .*'sequence'"),
        ({"num_samples": 4}, ValueError, "num_samples is what mode='mixture' averages"),
        ({"mode": "mixture", "num_samples": 0}, ValueError, "num_samples must be a positive int"),
        ({"num_beams": 2}, ValueError, "asks for beam_search, .* use num_beams=1"),
        ({"prompt_lookup_num_tokens": 2}, ValueError, "asks for assisted_generation"),
        ({"guidance_scale": 1.5}, ValueError, "guidance_scale=1.5 is not supported"),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate=True is not"),
        ({"prefill_chunk_size": 2}, ValueError, "prefill_chunk_size=2 is not supported"),
        ({"inputs_embeds": torch.zeros(3, 7, 32)}, ValueError, "inputs_embeds is not .*input_ids"),
        ({"position_ids": torch.zeros(3, 7).long()}, ValueError, "position_ids is not supported"),
        ({"past_key_values": ()}, ValueError, "past_key_values is not supported .* whole prefix"),
        ({"assistant_model": base_model}, ValueError, "assistant_model is not supported"),
        ({"custom_generate": "x"}, ValueError, "custom_generate is not supported .* mode="),
        ({"synced_gpus": True}, ValueError, "synced_gpus is not supported"),
        ({"input_ids": torch.full((3, 7), V)}, IndexError, r"input_ids must lie in \[0, 97\)"),
        ({"input_ids": torch.zeros(3, 7)}, ValueError, "input_ids must be .*got torch.float32"),
        ({"attention_mask": torch.ones(3, 8)}, ValueError, r"attention_mask must be \[B, T\]"),
        ({"perturb_mask": torch.ones(3, 7)}, ValueError, "perturb_mask must be .*torch.bool"),
        ({"rows": torch.arange(2)}, ValueError, r"rows must be \[B\] = \[3\]"),
        ({"rows": torch.zeros(3, 7).long()}, ValueError, r"rows must be \[B\] of torch.int64"),
        ({"seed": 1.5}, ValueError, "seed must be an int"),
        ({"max_new_token": 3}, ValueError, "max_new_token"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, error, message):
    lm = perturbed()
    with pytest.raises(error, match=message):
        lm.generate(**{**prompts(), "max_new_tokens": 2, **changes})


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 0, 0]])
def test_prompts_that_are_not_padded_on_the_left_are_refused(mask):
    with pytest.raises(ValueError, match="must pad on the left.*padding_side='left'"):
        perturbed().generate(torch.tensor([[5, 6, 7]]), torch.tensor([mask]), max_new_tokens=2)


def test_a_cache_that_stays_empty_is_an_error_and_not_a_wrong_text():
    lm = perturbed().train()
    enable = getattr(lm.base, "activation_checkpointing_enable", None)  # its name from 5.2x on
    (enable or lm.base.gradient_checkpointing_enable)({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="filled no cache.*call lm.eval"):
        lm.generate(**prompts(), max_new_tokens=2)
    assert lm.eval().generate(**prompts(), max_new_tokens=2).shape == (3, 9)
