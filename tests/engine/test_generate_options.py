"""Options of transformers' `generate`: ends of a text, stop strings, streamers, caches."""

import pytest
import tiny
import torch
import transformers
from decoding import MODES, SEED, STEPS, perturbed, prompts

V = tiny.SMALL["vocab_size"]


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
def test_zero_perturbation_generates_as_the_base_model_does(options, mode):
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
def test_finished_row_is_padded_while_the_others_go_on(mode):
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
            assert encoded[2][0] < encoded[0][0]  # finished rows are not encoded again
        else:
            assert [length for _, length, _ in encoded] == [7] + [1] * (STEPS - 1)


def test_static_cache_serves_one_sample_and_is_rejected_for_several():
    lm, inputs = perturbed(), prompts()
    options = {"seed": SEED, "max_new_tokens": STEPS}
    static = lm.generate(**inputs, cache_implementation="static", **options)
    assert static.equal(lm.generate(**inputs, **options))
    with pytest.raises(ValueError, match="cache_implementation='static' has no room for the 8"):
        lm.generate(**inputs, mode="mixture", cache_implementation="static", **options)


def word_tokenizer():
    """Return a tokenizer whose every entry is a word of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number:02}": number for number in range(V - 1)}
    words["abcdef"] = V - 1  # stop strings of transformers need its letters
    model = tokenizers.models.WordLevel(words, unk_token="w00")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w00")


@pytest.mark.parametrize("mode", MODES)
def test_stop_string_ends_the_text(mode):
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
def test_stop_strings_without_a_padding_token_end_a_batch_as_in_transformers(mode):
    lm, inputs = perturbed(), prompts()
    torch.nn.init.zeros_(lm.transform.U)
    stop = [f"w{number:02}" for number in range(30)]
    options = {"max_new_tokens": 12, "stop_strings": stop, "tokenizer": word_tokenizer()}
    expected = lm.base.generate(**inputs, **options)
    for use_cache in (True, False):
        assert lm.generate(**inputs, **MODES[mode], **options, use_cache=use_cache).equal(expected)


class Collector(transformers.generation.streamers.BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", MODES)
def test_streamer_gets_the_prompt_and_then_each_token(mode):
    lm, inputs, streamer = perturbed(), prompts(), Collector()
    ids = lm.generate(**inputs, **MODES[mode], seed=SEED, max_new_tokens=STEPS, streamer=streamer)
    assert streamer.ended and len(streamer.pieces) == 1 + STEPS
    prompt, *tokens = streamer.pieces
    assert torch.cat([prompt, torch.stack(tokens, 1)], 1).equal(ids)


def test_text_streamer_prints_the_generated_text(capsys):
    lm, tokenizer = perturbed(), word_tokenizer()
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    ids = prompts(padding=False)["input_ids"][:1]
    generated = lm.generate(ids, seed=SEED, max_new_tokens=STEPS, streamer=streamer)
    assert capsys.readouterr().out.split() == tokenizer.decode(generated[0, 7:]).split()
