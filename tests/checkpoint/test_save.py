"""Checkpoints: exact round trips, clear errors on bad files, and models left as they were."""

import contextlib
import errno
import hashlib
import json
import os
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fastperturb
from fastperturb import PerturbConfig, wrap
from fastperturb.config import TRANSFORMS

CONFIG, TENSORS = "perturbation_config.json", "perturbation.safetensors"
ADAPTER = "adapter_model.safetensors"
WIDTH = 16
IDS = torch.arange(12).view(2, 6)


def plain(*, seed=0, width=WIDTH, scale=0.2, dtype=torch.float32, frozen=True):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=scale,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    return model.requires_grad_(not frozen)


def with_lora(model, *, name="default", **options):
    peft = pytest.importorskip("peft", reason="LoRA tests need peft")
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config, adapter_name=name)


def perturbed(base=None, **options):
    """A wrapped model whose transform has moved away from any fresh one."""
    options = {"num_samples": 2, "latent_dim": 3, "hidden_dim": 4} | options
    lm = wrap(plain() if base is None else base, PerturbConfig(**options))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in lm.transform.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return lm.eval()


def outputs(lm):
    with torch.no_grad():
        out = lm(input_ids=IDS, labels=IDS, seed=3)
    return out.log_probs, out.loss, out.shift


def assert_same(ours, theirs):
    for name, value in theirs.transform.state_dict().items():
        assert torch.equal(ours.transform.state_dict()[name], value.float()), name
    assert ours.config == theirs.config
    for mine, other in zip(outputs(ours), outputs(theirs), strict=True):
        assert torch.equal(mine, other)


def anatomy(model):
    """Everything of a model that loading could leave changed."""
    modules = {
        name: (id(module), {k: (id(v), list(v) if isinstance(v, dict) else None) for k, v in items})
        for name, module in model.named_modules()
        if (items := [*vars(module).items()])
    }
    weights = {
        name: (id(p), p.data_ptr(), p.requires_grad, p.detach().clone().view(torch.uint8).tolist())
        for name, p in model.named_parameters()
    }
    return modules, weights, model.config.to_dict()


def refuses(model, folder, match, error=ValueError):
    """Loading fails clearly, and the model is as it was."""
    before = anatomy(model)
    with pytest.raises(error, match=match):
        fastperturb.load(model, folder)
    assert anatomy(model) == before


def manifest(folder):
    return json.loads((folder / CONFIG).read_text())


def sign(folder, values):
    """Write a config whose digests all agree, as somebody with intent would."""
    values.pop("sha256", None)
    for name in values["files"]:
        values["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(values))


@pytest.fixture
def saved(tmp_path):
    perturbed().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_loaded_model_computes_the_same_bits(transform, lora, dtype, tmp_path):
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
def test_every_option_comes_back(options, tmp_path):
    lm = perturbed(**options)
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_the_files_are_what_the_readme_says(tmp_path):
    lm = perturbed(transform="gated")
    lm.save_pretrained(tmp_path / "new" / "folder")
    tensors = load_file(tmp_path / "new" / "folder" / TENSORS)
    assert {name: value.dtype for name, value in tensors.items()} == dict.fromkeys(
        ("U", "A", "C", "embed_rms"), torch.float32
    )
    values = manifest(tmp_path / "new" / "folder")
    assert PerturbConfig.from_dict(values["config"]) == lm.config
    assert values["embed_dim"] == WIDTH and values["format_version"] == 1
    assert values["base"]["embedding"] == [23, WIDTH]


def test_the_scale_that_was_trained_with_is_kept_rather_than_measured_again(tmp_path):
    lm = perturbed()
    lm.transform.embed_rms.mul_(1.5)
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_what_is_loaded_is_frozen_unless_it_is_to_go_on_learning(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    frozen = fastperturb.load(plain(), tmp_path)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    learning = fastperturb.load(plain(), tmp_path, is_trainable=True)
    learning(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in learning.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name or "transform" in name for name in trained)
    assert sum("lora_" in name for name in trained) == 4


def test_a_half_precision_transform_is_saved_without_rounding(tmp_path):
    lm = perturbed()
    lm.transform.bfloat16()
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(plain(), tmp_path)
    assert torch.equal(loaded.transform.U, lm.transform.U.float())
    lm.transform.double()
    with pytest.raises(ValueError, match="U is torch.float64, which fp32 would round"):
        lm.save_pretrained(tmp_path)


def test_an_adapter_of_half_precision_stays_one(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = peft.get_peft_model(plain(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    lm = perturbed(base)
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(plain(dtype=torch.bfloat16), tmp_path)
    assert_same(loaded, lm)
    assert {p.dtype for p in loaded.base.parameters()} == {torch.bfloat16}


def test_an_adapter_by_another_name_is_saved_and_loaded(tmp_path):
    lm = perturbed(with_lora(plain(), name="mine"))
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_modules_that_peft_trains_whole_come_back(tmp_path):
    base = with_lora(plain(), modules_to_save=["norm"])
    with torch.no_grad():
        base.base_model.model.model.norm.weight.mul_(1.5)
    lm = perturbed(base)
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def test_a_model_that_carries_the_adapter_already_is_taken_as_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    lm = perturbed(with_lora(plain()))
    lm.save_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(plain(), tmp_path)
    loaded = fastperturb.load(adapted, tmp_path)
    assert loaded.base is adapted
    assert_same(loaded, lm)


def test_a_model_with_another_adapter_is_refused(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    other = plain()
    torch.manual_seed(5)
    refuses(with_lora(other), tmp_path, "differ in 4 of 4 tensors.*without an adapter")


def test_a_base_that_trained_is_saved_too(tmp_path):
    lm = perturbed(plain(frozen=False))
    with torch.no_grad():
        for parameter in lm.base.parameters():
            parameter.mul_(1.1)
    lm.save_pretrained(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(fastperturb.load(base, tmp_path), lm)
    lm.save_pretrained(tmp_path / "without", save_base=False)
    assert {path.name for path in (tmp_path / "without").iterdir()} == {CONFIG, TENSORS}


def test_shards_of_an_older_base_do_not_stay_beside_a_new_one(tmp_path):
    lm = perturbed(plain(frozen=False))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    lm.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_weights_that_would_be_lost_are_refused_by_name(tmp_path):
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
def test_a_diverged_model_does_not_replace_a_good_one(where, saved):
    lm = perturbed(plain(frozen=False))
    with torch.no_grad():
        getattr(lm, where).get_parameter({"transform": "U", "base": "lm_head.weight"}[where])[
            0, 0
        ] = torch.nan
    with pytest.raises(ValueError, match="training diverged: .* holds nan or inf"):
        lm.save_pretrained(saved)
    assert_same(fastperturb.load(plain(), saved), perturbed())


def test_a_config_that_was_exchanged_is_not_saved_over_another_transform(tmp_path):
    lm = perturbed()
    lm.config = PerturbConfig(latent_dim=3, latent="uniform")
    with pytest.raises(ValueError, match="lm.config no longer describes lm.transform"):
        lm.save_pretrained(tmp_path)


def test_only_the_main_process_writes(tmp_path):
    perturbed().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_later_save_replaces_an_earlier_one(tmp_path):
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


def test_embeddings_of_another_width_or_size_are_refused(saved):
    refuses(plain(width=32), saved, "moves embeddings 16 wide, and those of this Llama.* are 32")
    refuses(plain(scale=0.3), saved, "another base, whose embeddings it was not trained for")


def test_other_weights_behind_the_same_embeddings_are_warned_of(saved):
    merged = plain()
    with torch.no_grad():
        merged.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="does not have the weights that"):
        fastperturb.load(merged, saved)
    fastperturb.load(plain(dtype=torch.bfloat16), saved)  # rounding is no other model


def test_a_native_adapter_of_transformers_is_refused(saved):
    peft = pytest.importorskip("peft")
    model = plain()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries an adapter that transformers put on it"):
        fastperturb.load(model, saved)
    with pytest.raises(ValueError, match="carries an adapter that transformers put on it"):
        perturbed(model).save_pretrained(saved)


def test_a_second_adapter_on_one_base_is_refused_until_the_first_is_taken_off(tmp_path):
    first, second = perturbed(with_lora(plain())), perturbed(with_lora(plain(), r=3))
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    base = plain()
    loaded = fastperturb.load(base, tmp_path / "first")
    refuses(base, tmp_path / "second", "a base of its own, or .* lm.base.unload")
    assert_same(loaded, first)
    assert_same(fastperturb.load(loaded.base.unload(), tmp_path / "second"), second)


def test_an_adapter_put_on_after_wrapping_is_saved_once_lm_base_is_the_peft_model(tmp_path):
    base = plain()
    lm = perturbed(base)
    adapted = with_lora(base)
    with pytest.raises(ValueError, match="set lm.base to the PeftModel"):
        lm.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    lm.base = adapted
    lm.save_pretrained(tmp_path)
    assert_same(fastperturb.load(plain(), tmp_path), lm)


def cut(content, at):
    return content[: int(len(content) * at)]


def flip(content, at, bit=0):
    index = int(len(content) * at) if at < 1 else int(at)
    return content[:index] + bytes([content[index] ^ (1 << bit)]) + content[index + 1 :]


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (TENSORS, lambda c: b"", "is truncated"),
        (TENSORS, lambda c: cut(c, 0.5), "is truncated"),
        (TENSORS, lambda c: c[:-1], "is truncated|is not the file"),
        (TENSORS, lambda c: c + b"\0", "is truncated|is not the file"),
        (TENSORS, lambda c: flip(c, 0.99), "is not the file that"),
        (TENSORS, lambda c: flip(c, 12), "truncated, damaged or no safetensors"),
        (TENSORS, lambda c: flip(c, 2), "is truncated, damaged"),
        (TENSORS, lambda c: (2**62).to_bytes(8, "little") + c[8:], "header too large"),
        (TENSORS, lambda c: c + bytes(1 << 20), "bytes, and the tensors of its config take"),
        (TENSORS, lambda c: c.replace(b"F32", b"I32"), r"must hold \('F32', .* holds \('I32'"),
        (TENSORS, lambda c: c.replace(b'"U"', b'"V"'), "must hold .* as 'U'.* and holds nothing"),
        (TENSORS, lambda c: c.replace(b"[3,16]", b"[16,3]"), r"and holds \('F32', \[16, 3\]\)"),
        (CONFIG, lambda c: b"", "is truncated, damaged or no JSON"),
        (CONFIG, lambda c: cut(c, 0.9), "is truncated, damaged or no JSON"),
        (CONFIG, lambda c: b"\xff" + c, "is truncated, damaged or no JSON"),
        (CONFIG, lambda c: b"[" * 100_000, "is truncated, damaged or no JSON"),
        (CONFIG, lambda c: b"[1]", "must hold a JSON object, and holds a list"),
        (CONFIG, lambda c: b'{"a": 1}', "was not written by fastperturb: it has format None"),
        (CONFIG, lambda c: c + b" " * (1 << 20), "is longer than 1048576 bytes"),
        (CONFIG, lambda c: c.replace(b'num_samples": 2', b'num_samples": 3'), "was changed after"),
        (CONFIG, lambda c: c.replace(b'_version": 1', b'_version": 2'), "upgrade fastperturb"),
    ],
)
def test_a_damaged_file_is_refused_by_name(name, damage, message, saved):
    content = (saved / name).read_bytes()
    damaged = damage(content)
    assert damaged != content
    (saved / name).write_bytes(damaged)
    refuses(plain(), saved, f"{name}.*({message})")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "adapter_config.json", ADAPTER])
def test_a_missing_file_is_named(name, tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    refuses(plain(), tmp_path, f"there is no .*{name}", FileNotFoundError)
    (tmp_path / name).mkdir()
    refuses(plain(), tmp_path, f"there is no .*{name}", FileNotFoundError)


@pytest.mark.parametrize("name", ["adapter_config.json", ADAPTER])
def test_a_damaged_adapter_is_refused(name, tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(flip((tmp_path / name).read_bytes(), 0.9))
    refuses(plain(), tmp_path, f"{name} is not the file that")


def forge_tensors(folder, **changes):
    tensors = load_file(folder / TENSORS) | changes
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, folder / TENSORS
    )
    sign(folder, manifest(folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"U": None, "V": torch.zeros(3, WIDTH)}, "must hold .* as 'U'"),
        ({"extra": torch.zeros(1)}, "must hold nothing as 'extra'"),
        ({"U": torch.zeros(WIDTH, 3)}, r"holds \('F32', \[16, 3\]\)"),
        ({"U": torch.zeros(3, WIDTH, dtype=torch.int32)}, r"holds \('I32', \[3, 16\]\)"),
        ({"U": torch.full((3, WIDTH), torch.nan)}, "U holds nan or inf"),
        ({"embed_rms": torch.tensor(-1.0)}, "embed_rms=-1.0, not above 0"),
        ({"embed_rms": torch.tensor(torch.inf)}, "embed_rms holds nan or inf"),
    ],
)
def test_forged_tensors_with_right_digests_are_refused(changes, message, saved):
    forge_tensors(saved, **changes)
    refuses(plain(), saved, message)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("config", {"transform": "lowrnk"}, "did you mean 'lowrank'"),
        ("config", {"temperature": 1}, "PerturbConfig has no key 'temperature'"),
        ("config", [], "must be a mapping"),
        ("config", {"latent_dim": 10**12}, "bytes, and the tensors of its config take"),
        ("config", {"transform": "mlp", "latent_dim": 10**30}, "not understood|bytes, and"),
        ("embed_dim", "16", "embed_dim must be a positive int"),
        ("embed_dim", 17, "bytes, and the tensors|must hold"),
        ("base", {"embed_rms": "big"}, "is not understood"),
        ("base", None, "is not understood"),
        ("files", {}, "its files are"),
        ("files", {TENSORS: "", "../outside.bin": ""}, "its files are"),
        ("files", "perturbation", "its files are|is not understood"),
    ],
)
def test_forged_configs_with_right_digests_are_refused(key, value, message, saved):
    values = manifest(saved)
    values[key] = values[key] | value if key in ("config", "base") and value else value
    values.pop("sha256")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (saved / CONFIG).write_text(json.dumps(values))
    refuses(plain(), saved, f"(?s){message}")


def forge_adapter(folder, change):
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    sign(folder, manifest(folder))


def first_shrinks(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:, :-1].contiguous()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    "change, message",
    [
        (first_shrinks, "adapter .* does not fit this LlamaForCausalLM"),
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "differ in 1 of 4 tensors"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "differ in 1 of 5 tensors"),
    ],
)
def test_a_forged_adapter_is_taken_off_the_model_again(change, message, tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    forge_adapter(tmp_path, change)
    for frozen in (True, False):
        refuses(plain(frozen=frozen).train(), tmp_path, message)


def test_an_adapter_that_overwrote_embeddings_gives_them_back(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    table = {"base_model.model.model.embed_tokens.weight": torch.ones(23, WIDTH)}
    forge_adapter(tmp_path, lambda tensors: tensors.update(table))
    refuses(plain(), tmp_path, "another base, whose embeddings")


def test_an_adapter_for_other_layers_leaves_the_model_as_it_was(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("v_proj", "mixer").replace("q_proj", "gates"))
    sign(tmp_path, manifest(tmp_path))
    refuses(plain(), tmp_path, "adapter .* does not fit this LlamaForCausalLM: Target modules")


def test_an_adapter_config_that_reaches_out_of_the_folder_is_refused(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"megatron_config": {"a": 1}, "megatron_core": "os"}
    path.write_text(json.dumps(values))
    sign(tmp_path, manifest(tmp_path))
    refuses(plain(), tmp_path, "adapter_config.json sets megatron_config")


class Crash(BaseException):
    pass


def crash_at(monkeypatch, name, count, error=Crash):
    """The count-th call of os.`name` raises; False once a save no longer comes that far."""
    real, calls = getattr(os, name), []

    def stand_in(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, stand_in)
    return lambda: len(calls) >= count


@pytest.mark.parametrize("kind", ["perturbation", "adapter", "base"])
@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_crash_anywhere_leaves_the_old_the_new_or_an_error(name, kind, tmp_path, monkeypatch):
    def base(seed):
        model = plain(frozen=kind != "base")
        torch.manual_seed(seed)
        if kind == "base":
            model.lm_head.reset_parameters()
        return with_lora(model) if kind == "adapter" else model

    old, new = perturbed(base(1)), perturbed(base(2), num_samples=4)
    with torch.no_grad():
        new.transform.U.add_(1.0)
    reached, outcomes, count = True, [], 0
    while reached:
        count += 1
        folder = tmp_path / f"{count}"
        old.save_pretrained(folder)
        with monkeypatch.context() as patched:
            crashed = crash_at(patched, name, count)
            with contextlib.suppress(Crash):
                new.save_pretrained(folder)
            reached = crashed()
        assert not list(folder.glob(".saving-*"))
        found = plain()
        if kind == "base":
            found = transformers.LlamaForCausalLM.from_pretrained(folder)
        try:
            loaded = fastperturb.load(found, folder)
        except (ValueError, FileNotFoundError) as error:
            assert "save" in str(error)
            outcomes.append("error")
            continue
        outcomes.append("old" if loaded.config == old.config else "new")
        assert_same(loaded, old if outcomes[-1] == "old" else new)
    assert outcomes[-1] == "new" and ("old" in outcomes or (name, kind) == ("replace", "base"))
    assert outcomes == sorted(outcomes, key=["old", "error", "new"].index)


def test_a_full_disk_leaves_the_old_files_and_says_so(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    crash_at(monkeypatch, "fsync", 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="could not save to .*; what was there is as it was") as info:
        perturbed(transform="affine").save_pretrained(saved)
    assert info.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_disk_that_fails_between_files_is_explained_and_the_mix_is_refused(saved, monkeypatch):
    with monkeypatch.context() as patched:
        crash_at(patched, "replace", 2, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match="could not replace every file of .*; save again"):
            perturbed(transform="affine").save_pretrained(saved)
    refuses(plain(), saved, f"{TENSORS} ")
    perturbed(transform="affine").save_pretrained(saved)
    assert_same(fastperturb.load(plain(), saved), perturbed(transform="affine"))


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        perturbed().save_pretrained(tmp_path / "file")


def test_a_checkpoint_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    lm, uploads = perturbed(with_lora(plain())), []

    def upload(*, folder_path, **options):
        os.rename(folder_path, tmp_path / "hub")
        os.mkdir(folder_path)
        uploads.append(options)
        return "commit"

    def create(repo_id, **options):
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def download(repo_id, *, revision, token, allow_patterns):
        assert (repo_id, revision) == ("me/mine", "v1")
        assert set(allow_patterns) >= {path.name for path in (tmp_path / "hub").iterdir()}
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert lm.push_to_hub("mine", private=True, create_pr=True) == "commit"
    assert uploads[0]["repo_id"] == "me/mine" and uploads[0]["create_pr"]
    assert_same(fastperturb.load(plain(), "me/mine", revision="v1"), lm)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refuses(plain(), "me/mine", "no connection.*hf download me/mine", FileNotFoundError)
    for folder in ("a/b/c", tmp_path / "none", "../none", "/none"):
        refuses(plain(), folder, "there is no folder .* to load from", FileNotFoundError)


def test_a_local_folder_comes_before_the_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    folder = str(saved.relative_to(Path.cwd()))
    assert folder.count("/") == 1
    assert_same(fastperturb.load(plain(), folder), perturbed())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint's files, a scratch folder to damage them in, and what should load."""
    folder = tmp_path_factory.mktemp("fuzz")
    lm = perturbed()
    lm.save_pretrained(folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}, lm, plain()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from([CONFIG, TENSORS]),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "insert", "delete"]),
            st.floats(0, 1, exclude_max=True),
            st.binary(min_size=1, max_size=9),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_random_damage_is_refused_or_harmless(whole, name, edits):
    folder, files, lm, model = whole
    content = files[name]
    for kind, at, new in edits:
        start = int(len(content) * at)
        left, right = content[:start], content[start:]
        if kind == "flip":
            right = bytes(a ^ b for a, b in zip(right, new)) + right[len(new) :]
        elif kind == "cut":
            right = b""
        elif kind == "insert":
            right = new + right
        else:
            right = right[len(new) :]
        content = left + right
    (folder / name).write_bytes(content)
    before = anatomy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = fastperturb.load(model, folder)
    except ValueError as error:
        assert name in str(error)
        assert anatomy(model) == before
    else:
        assert loaded.config == lm.config
        for key, value in lm.transform.state_dict().items():
            assert torch.equal(loaded.transform.state_dict()[key], value)
    finally:
        (folder / name).write_bytes(files[name])
