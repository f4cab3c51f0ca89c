"""Loading: onto which base, with which adapter, frozen or trainable."""

import pytest
import torch
from checkpoint_cases import IDS, assert_rejects, assert_same, perturbed, plain, with_lora

import fastperturb


def test_loaded_model_is_frozen_unless_is_trainable(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    frozen = fastperturb.load(plain(), tmp_path)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    learning = fastperturb.load(plain(), tmp_path, is_trainable=True)
    learning(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in learning.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name or "transform" in name for name in trained)
    assert sum("lora_" in name for name in trained) == 4


def test_model_that_carries_the_adapter_already_is_used_as_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    lm = perturbed(with_lora(plain()))
    lm.save_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(plain(), tmp_path)
    loaded = fastperturb.load(adapted, tmp_path)
    assert loaded.base is adapted
    assert_same(loaded, lm)


def test_model_with_another_adapter_is_rejected(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    other = plain()
    torch.manual_seed(5)
    assert_rejects(with_lora(other), tmp_path, "differ in 4 of 4 tensors.*without an adapter")


def test_second_adapter_on_one_base_is_rejected_until_the_first_is_unloaded(tmp_path):
    first, second = perturbed(with_lora(plain())), perturbed(with_lora(plain(), r=3))
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    base = plain()
    loaded = fastperturb.load(base, tmp_path / "first")
    assert_rejects(base, tmp_path / "second", "a base of its own, or .* lm.base.unload")
    assert_same(loaded, first)
    assert_same(fastperturb.load(loaded.base.unload(), tmp_path / "second"), second)


def test_native_adapter_of_transformers_is_rejected(saved):
    peft = pytest.importorskip("peft")
    model = plain()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries an adapter that transformers put on it"):
        fastperturb.load(model, saved)
    with pytest.raises(ValueError, match="carries an adapter that transformers put on it"):
        perturbed(model).save_pretrained(saved)


def test_embeddings_of_another_width_or_base_are_rejected(saved):
    assert_rejects(
        plain(width=32), saved, "perturbs embeddings 16 wide, and those of this Llama.* are 32"
    )
    assert_rejects(plain(scale=0.3), saved, "another base, whose embeddings it was not trained for")


def test_other_weights_behind_the_same_embeddings_warn(saved):
    merged = plain()
    with torch.no_grad():
        merged.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="does not have the weights that") as caught:
        fastperturb.load(merged, saved)
    assert caught[0].filename == __file__  # it shows the line that called load
    fastperturb.load(plain(dtype=torch.bfloat16), saved)  # rounding is no other model
