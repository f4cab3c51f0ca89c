"""Arguments that `generate` rejects, and what to give instead."""

import pytest
import torch
from decoding import base_model, perturbed, prompts


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "sequnce"}, ValueError, "mode must be one of .* got 'sequnce' .*'sequence'"),
        ({"num_samples": 4}, ValueError, "num_samples is for mode='mixture'"),
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
        ({"input_ids": torch.full((3, 7), 97)}, IndexError, r"input_ids must lie in \[0, 97\)"),
        ({"input_ids": torch.zeros(3, 7)}, ValueError, "input_ids must be .*got torch.float32"),
        ({"attention_mask": torch.ones(3, 8)}, ValueError, r"attention_mask must be \[B, T\]"),
        ({"perturb_mask": torch.ones(3, 7)}, ValueError, "perturb_mask must be .*torch.bool"),
        ({"rows": torch.arange(2)}, ValueError, r"rows must be \[B\] = \[3\]"),
        ({"rows": torch.zeros(3, 7).long()}, ValueError, r"rows must be \[B\] of torch.int64"),
        ({"seed": 1.5}, ValueError, "seed must be an int"),
        ({"max_new_token": 3}, ValueError, "max_new_token"),
    ],
)
def test_bad_generate_argument_is_rejected_by_name(changes, error, message):
    lm = perturbed()
    with pytest.raises(error, match=message):
        lm.generate(**{**prompts(), "max_new_tokens": 2, **changes})


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 0, 0]])
def test_prompt_that_is_not_padded_on_the_left_is_rejected(mask):
    with pytest.raises(ValueError, match="must pad on the left.*padding_side='left'"):
        perturbed().generate(torch.tensor([[5, 6, 7]]), torch.tensor([mask]), max_new_tokens=2)


def test_cache_that_stays_empty_raises():
    lm = perturbed().train()
    enable = getattr(lm.base, "activation_checkpointing_enable", None)  # its name from 5.2x on
    (enable or lm.base.gradient_checkpointing_enable)({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="filled no cache.*call lm.eval"):
        lm.generate(**prompts(), max_new_tokens=2)
    assert lm.eval().generate(**prompts(), max_new_tokens=2).shape == (3, 9)
