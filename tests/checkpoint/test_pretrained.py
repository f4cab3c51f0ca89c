"""Base models and tokenizers of transformers: loaded by one set of rules, errors with names."""

import pytest
import tiny
import tiny_run
import torch

from fastperturb.checkpoint import pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.model_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_dtype_and_the_attention_that_were_asked_for(dtype, folder):
    model = pretrained.load_causal_lm(str(folder), dtype=dtype, attn_implementation="eager")
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "eager"


def test_weights_that_are_pickled_are_not_loaded(folder, tmp_path):
    tiny.llama().config.save_pretrained(tmp_path)
    torch.save(tiny.llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"model '{tmp_path}' cannot be loaded: "):
        pretrained.load_causal_lm(str(tmp_path), dtype=torch.float32)


def test_a_tokenizer_that_cannot_be_loaded_is_named_in_the_error(tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}' cannot be loaded: "):
        pretrained.load_tokenizer(str(tmp_path))


def test_more_tokens_than_positions_raise_with_the_name_of_the_option():
    base = tiny.llama()
    pretrained.check_positions("m", base, 64)
    with pytest.raises(ValueError, match="length = 65 is more than the 64 positions"):
        pretrained.check_positions("m", base, 65, "length")
