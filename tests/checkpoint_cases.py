"""Tiny models to save and load, and ways to look at and to damage their files."""

import hashlib
import json

import pytest
import tiny
import torch

import fastperturb

CONFIG, TENSORS = "perturbation_config.json", "perturbation.safetensors"
ADAPTER = "adapter_model.safetensors"
VOCAB, WIDTH = 23, 16
IDS = torch.arange(12).view(2, 6)


def plain(*, seed=0, width=WIDTH, scale=0.2, dtype=torch.float32, frozen=True):
    """Return a Llama of one layer, frozen unless told otherwise."""
    model = tiny.llama(
        seed=seed,
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=scale,
    )
    return model.to(dtype).requires_grad_(not frozen)


def with_lora(model, **options):
    """Put on a LoRA of rank 2 that knows its base as a causal LM."""
    return tiny.with_lora(model, **{"r": 2, "task_type": "CAUSAL_LM", **options})


def perturbed(base=None, **options):
    """Return a wrapped model whose transform differs from any fresh one."""
    options = {"num_samples": 2, "latent_dim": 3, "hidden_dim": 4} | options
    lm = tiny.perturbed(plain() if base is None else base, **options)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in lm.transform.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return lm.eval()


def outputs(lm):
    """Return the tensors of one seeded call."""
    with torch.no_grad():
        out = lm(input_ids=IDS, labels=IDS, seed=3)
    return out.log_probs, out.loss, out.shift


def assert_same(lm, expected):
    """Assert equal transforms, configs and outputs, bit by bit."""
    for name, value in expected.transform.state_dict().items():
        assert torch.equal(lm.transform.state_dict()[name], value.float()), name
    assert lm.config == expected.config
    for ours, right in zip(outputs(lm), outputs(expected), strict=True):
        assert torch.equal(ours, right)


def anatomy(model):
    """Return everything of a model that loading could leave changed."""
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


def assert_rejects(model, folder, match, error=ValueError):
    """Assert that loading raises and leaves the model as it was."""
    before = anatomy(model)
    with pytest.raises(error, match=match):
        fastperturb.load(model, folder)
    assert anatomy(model) == before


def manifest(folder):
    """Return the values of a checkpoint's config."""
    return json.loads((folder / CONFIG).read_text())


def write_signed(folder, values):
    """Write a config with the right digest of itself."""
    values.pop("sha256", None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(values))


def sign(folder):
    """Update every digest in a folder, as somebody with intent would."""
    values = manifest(folder)
    for name in values["files"]:
        values["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_signed(folder, values)
