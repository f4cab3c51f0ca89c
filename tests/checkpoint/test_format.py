"""Files that are missing, damaged or forged are rejected, and the model stays as it was."""

import json
import warnings

import pytest
import torch
from checkpoint_cases import (
    ADAPTER,
    CONFIG,
    TENSORS,
    VOCAB,
    WIDTH,
    anatomy,
    assert_rejects,
    manifest,
    perturbed,
    plain,
    sign,
    with_lora,
    write_signed,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fastperturb


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
def test_damaged_file_is_rejected_by_name(name, damage, message, saved):
    content = (saved / name).read_bytes()
    damaged = damage(content)
    assert damaged != content
    (saved / name).write_bytes(damaged)
    assert_rejects(plain(), saved, f"{name}.*({message})")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "adapter_config.json", ADAPTER])
def test_missing_file_is_rejected_by_name(name, tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    assert_rejects(plain(), tmp_path, f"there is no .*{name}", FileNotFoundError)
    (tmp_path / name).mkdir()
    assert_rejects(plain(), tmp_path, f"there is no .*{name}", FileNotFoundError)


@pytest.mark.parametrize("name", ["adapter_config.json", ADAPTER])
def test_damaged_adapter_is_rejected(name, tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(flip((tmp_path / name).read_bytes(), 0.9))
    assert_rejects(plain(), tmp_path, f"{name} is not the file that")


def forge_tensors(folder, **changes):
    tensors = load_file(folder / TENSORS) | changes
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, folder / TENSORS
    )
    sign(folder)


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
def test_forged_tensors_with_right_digests_are_rejected(changes, message, saved):
    forge_tensors(saved, **changes)
    assert_rejects(plain(), saved, message)


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
def test_forged_configs_with_right_digests_are_rejected(key, value, message, saved):
    values = manifest(saved)
    values[key] = values[key] | value if key in ("config", "base") and value else value
    write_signed(saved, values)
    assert_rejects(plain(), saved, f"(?s){message}")


def forge_adapter(folder, change):
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    sign(folder)


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
def test_forged_adapter_leaves_the_model_unchanged(change, message, tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    forge_adapter(tmp_path, change)
    for frozen in (True, False):
        assert_rejects(plain(frozen=frozen).train(), tmp_path, message)


def test_adapter_that_overwrites_embeddings_leaves_the_model_unchanged(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    table = {"base_model.model.model.embed_tokens.weight": torch.ones(VOCAB, WIDTH)}
    forge_adapter(tmp_path, lambda tensors: tensors.update(table))
    assert_rejects(plain(), tmp_path, "another base, whose embeddings")


def test_adapter_for_other_layers_leaves_the_model_unchanged(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("v_proj", "mixer").replace("q_proj", "gates"))
    sign(tmp_path)
    assert_rejects(
        plain(), tmp_path, "adapter .* does not fit this LlamaForCausalLM: Target modules"
    )


def test_adapter_config_that_reaches_out_of_the_folder_is_rejected(tmp_path):
    perturbed(with_lora(plain())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"megatron_config": {"a": 1}, "megatron_core": "os"}
    path.write_text(json.dumps(values))
    sign(tmp_path)
    assert_rejects(plain(), tmp_path, "adapter_config.json sets megatron_config")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Give a folder to damage files in, the whole files, and what they load and load onto."""
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
def test_random_damage_is_rejected_or_harmless(whole, name, edits):
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
