"""A prefix that nothing moves is encoded once for all samples, and nothing else changes."""

import peft
import pytest
import torch
import transformers

import fastperturb
from fastperturb import PerturbConfig
from fastperturb.engine import shared_prefix

B, T, P, V = 3, 12, 5, 97


def base_model(architecture):
    torch.manual_seed(0)
    if architecture == "gpt2":
        rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": V}
        config = transformers.GPT2Config(**shape, **rates, initializer_range=0.2)
        return transformers.GPT2LMHeadModel(config)
    shape = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }
    if architecture == "mistral":
        config = transformers.MistralConfig(**shape, sliding_window=4)
        return transformers.MistralForCausalLM(config)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    if architecture == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        torch.nn.init.normal_(model.get_parameter(last_adapter(model)), std=0.1)
    return model


def last_adapter(model):
    return [name for name, _ in model.named_parameters() if "lora_B" in name][-1]


def batch(padding="right"):
    torch.manual_seed(1)
    ids = torch.randint(3, V, (B, T))
    mask = torch.ones_like(ids)
    mask[1, -3:] = mask[2, :2] = 0
    moving = torch.arange(T).expand(B, T) >= P
    labels = ids.where(mask.bool(), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "perturb_mask": moving}


def run(base, **options):
    torch.manual_seed(2)
    lm = fastperturb.wrap(base, PerturbConfig(num_samples=4, **options))
    lm.zero_grad()
    out = lm(**batch(), seed=5, return_logits=True)
    out.loss.backward()
    return out, {
        name: value.grad.clone() for name, value in lm.named_parameters() if value.grad is not None
    }


@pytest.fixture
def lengths(monkeypatch):
    """How many positions each pass of the trunk ran."""
    seen = []

    def watch(base):
        trunk = getattr(base, "get_base_model", lambda: base)().base_model
        trunk.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])),
            with_kwargs=True,
        )
        return seen

    return watch


PLANS = {
    "batched": {"plan": "batched"},
    "chunked": {"plan": "chunked", "chunk_size": 2},
    "resample": {"plan": "resample", "backward_samples": 2},
    "quadratic": {"plan": "batched", "estimator": "quadratic"},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "lora"])
def test_the_results_are_those_of_whole_passes(architecture, options, lengths, monkeypatch):
    base = base_model(architecture)
    seen = lengths(base)
    ours, grads = run(base, **options)
    assert seen[0] == (B, P) and all(length == T - P for _, length in seen[1:])
    monkeypatch.setattr(shared_prefix, "_cacheable", lambda trunk: False)
    plain, expected = run(base, **options)
    for name in ("loss", "log_marginal", "log_probs", "ess", "shift", "logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_windowed_cache_is_left_alone(lengths):
    base = base_model("mistral")
    seen = lengths(base)
    run(base, plan="batched")
    assert seen == [(4 * B, T)]


def test_a_batch_in_which_all_moves_has_no_prefix(lengths):
    base = base_model("llama")
    seen = lengths(base)
    lm = fastperturb.wrap(base, PerturbConfig(num_samples=4, plan="batched"))
    lm(**{**batch(), "perturb_mask": torch.ones(B, T).bool()})
    assert seen == [(4 * B, T)]


def test_angles_that_depend_on_the_length_have_no_prefix(lengths):
    base = base_model("llama")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base.model.config.rope_parameters = rope
    seen = lengths(base)
    run(base, plan="batched")
    assert seen == [(4 * B, T)]
