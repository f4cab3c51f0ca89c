"""Saving: exact round trips, which files are written, and models that are not saved."""

import pytest
import torch
import transformers
from checkpoint_cases import (
    ADAPTER,
    CONFIG,
    TENSORS,
    VOCAB,
    WIDTH,
    assert_same,
    manifest,
    perturbed,
    plain,
    with_lora,
)
from safetensors.torch import load_file

import fastperturb
from fastperturb import PerturbConfig
from fastperturb.config import TRANSFORMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_loaded_model_computes_the_same_bits(transform, lora, dtype, tmp_path):
    base = plain(dtype=dtype)
    lm = perturbed(with_lora(base) if lora else base, transform=transform)
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(plain(dtype=dtype), tmp_path)
    assert_same(loaded, lm)
    assert all(p.dtype == torch.float32 for p in loaded.transform.parameters())
    expected = {CONFIG, TENSORS} | ({"adapter_config.json", ADAPTER} if lora else set())
    assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize(
    "options",
    [
        {"latent": "rademacher", "scope": "sequence", "antithetic": True},
        {"estimator": "quadratic", "plan": "chunked", "chunk_size": 1},
        {"estimator": "resample", "num_samples": 4, "backward_samples": 2},
        {"min_scale": 0.7, "init_scale": 0.05, "marginal": "sequence", "latent": "uniform"},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_every_option_survives_a_round_trip(options, tmp_path):
    lm = perturbed(**options)
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_files_hold_the_documented_tensors_and_keys(tmp_path):
    lm = perturbed(transform="gated")
    lm.save_pretrained(tmp_path / "new" / "folder")
    tensors = load_file(tmp_path / "new" / "folder" / TENSORS)
    assert {name: value.dtype for name, value in tensors.items()} == dict.fromkeys(
        ("U", "A", "C", "embed_rms"), torch.float32
    )
    values = manifest(tmp_path / "new" / "folder")
    assert PerturbConfig.from_dict(values["config"]) == lm.config
    assert values["embed_dim"] == WIDTH and values["format_version"] == 1
    assert values["base"]["embedding"] == [VOCAB, WIDTH]


def test_trained_embed_rms_is_kept_rather_than_measured_again(tmp_path):
    lm = perturbed()
    lm.transform.embed_rms.mul_(1.5)
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_half_precision_transform_is_saved_without_rounding(tmp_path):
    lm = perturbed()
    lm.transform.bfloat16()
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(plain(), tmp_path)
    assert torch.equal(loaded.transform.U, lm.transform.U.float())
    lm.transform.double()
    with pytest.raises(ValueError, match="U is torch.float64, which fp32 would round"):
        lm.save_pretrained(tmp_path)


def test_half_precision_adapter_keeps_its_dtype(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = peft.get_peft_model(plain(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    lm = perturbed(base)
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(plain(dtype=torch.bfloat16), tmp_path)
    assert_same(loaded, lm)
    assert {p.dtype for p in loaded.base.parameters()} == {torch.bfloat16}


def test_adapter_of_another_name_is_saved_and_loaded(tmp_path):
    lm = perturbed(with_lora(plain(), adapter_name="mine"))
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_modules_to_save_survive_a_round_trip(tmp_path):
    base = with_lora(plain(), modules_to_save=["norm"])
    with torch.no_grad():
        base.base_model.model.model.norm.weight.mul_(1.5)
    lm = perturbed(base)
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_adapter_added_after_wrapping_is_saved_once_lm_base_is_the_peft_model(tmp_path):
    base = plain()
    lm = perturbed(base)
    adapted = with_lora(base)
    with pytest.raises(ValueError, match="set lm.base to the PeftModel"):
        lm.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    lm.base = adapted
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_trained_base_is_saved_too(tmp_path):
    lm = perturbed(plain(frozen=False))
    with torch.no_grad():
        for parameter in lm.base.parameters():
            parameter.mul_(1.1)
    lm.save_pretrained(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(fastperturb.load(base, tmp_path), lm)
    lm.save_pretrained(tmp_path / "without", save_base=False)
    assert {path.name for path in (tmp_path / "without").iterdir()} == {CONFIG, TENSORS}


def test_files_of_an_older_base_are_removed(tmp_path):
    lm = perturbed(plain(frozen=False))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    lm.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_later_save_replaces_an_earlier_one(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my card")
    later = perturbed(transform="mlp")
    later.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), later)  # and without the stale adapter
    again = perturbed(with_lora(plain()), transform="affine")
    again.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), again)
    assert (tmp_path / "README.md").read_text() == "my card"
    with pytest.raises(ValueError, match="holds the adapter of another model"):
        perturbed(plain(frozen=False)).save_pretrained(tmp_path)


def test_only_the_main_process_writes(tmp_path):
    perturbed().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_weights_that_would_be_lost_are_rejected_by_name(tmp_path):
    base = with_lora(plain())
    base.base_model.model.lm_head.weight.requires_grad_(True)
    lm = perturbed(base)
    with pytest.raises(ValueError, match="1 parameters train outside the adapter.*lm_head.weight"):
        lm.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    lm.save_pretrained(tmp_path, save_base=False)
    base.add_adapter("second", base.peft_config["default"])
    with pytest.raises(ValueError, match="the adapters .'default', 'second'. and a checkpoint"):
        lm.save_pretrained(tmp_path)


@pytest.mark.parametrize("where", ["transform", "base"])
def test_diverged_model_does_not_replace_a_good_one(where, saved):
    lm = perturbed(plain(frozen=False))
    with torch.no_grad():
        name = {"transform": "U", "base": "lm_head.weight"}[where]
        getattr(lm, where).get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(ValueError, match="training diverged: .* holds nan or inf"):
        lm.save_pretrained(saved)
    assert_same(fastperturb.load(plain(), saved), perturbed())


def test_config_that_does_not_describe_the_transform_is_rejected(tmp_path):
    lm = perturbed()
    lm.config = PerturbConfig(latent_dim=3, latent="uniform")
    with pytest.raises(ValueError, match="lm.config no longer describes lm.transform"):
        lm.save_pretrained(tmp_path)
