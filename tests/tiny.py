"""Tiny random models, one of every architecture, that the tests share."""

import pytest
import torch
import transformers
from torch import nn

from fastperturb import PerturbConfig, wrap

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {**SMALL, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2}
# Each with every option that sets its head, its embedding or its attention apart.
CONFIGS = {
    "Cohere": {**SMALL, "logit_scale": 0.4},
    "GPT2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "GPTNeoX": SMALL,
    "Gemma2": {**WINDOWED, "final_logit_softcapping": 3.0},
    "Gemma3": {**WINDOWED, "final_logit_softcapping": 2.0},
    "Granite": {
        **SMALL,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "Llama": SMALL,
    "Mistral": {**SMALL, "sliding_window": 4},
    "Mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmo2": SMALL,
    "Olmoe": EXPERTS,
    "Phi3": SMALL,
    "Qwen2": SMALL,
    "Qwen3": SMALL,
    "Qwen3Moe": {**EXPERTS, "moe_intermediate_size": 24},
}
LORA_TARGETS = {"GPT2": ["c_attn"], "GPTNeoX": ["query_key_value"], "Phi3": ["qkv_proj"]}


def class_name(architecture):
    """Return the name of the transformers class of this architecture."""
    return "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"


def base_model(architecture="Llama", *, seed=0, **changes):
    """Return a random model in eval mode; `changes` are options of its config."""
    torch.manual_seed(seed)
    kind = "Gemma3Text" if architecture == "Gemma3" else architecture
    config = getattr(transformers, f"{kind}Config")(**{**CONFIGS[architecture], **changes})
    return getattr(transformers, class_name(architecture))(config).eval()


def llama(**changes):
    """Return a random Llama of two layers, 32 wide, in eval mode."""
    return base_model("Llama", **changes)


def gpt2(**changes):
    """Return a random GPT-2 of two layers, 32 wide, without dropout, in eval mode."""
    return base_model("GPT2", **changes)


def perturbed(model, *, seed=2, edits=None, **options):
    """Wrap a model with a random transform; `options` are those of PerturbConfig."""
    torch.manual_seed(seed)
    lm = wrap(model, PerturbConfig(**options), edits=edits)
    if lm.config.transform == "context":  # it starts without one, where A has no gradient
        torch.nn.init.normal_(lm.transform.G)
    return lm


class Doubled(nn.Module):
    """A parametrization that doubles a weight."""

    def forward(self, weight):
        return 2 * weight


def with_lora(model, architecture="Llama", *, adapter_name="default", **changes):
    """Put a random LoRA of rank 4 on the attention; `changes` are options of LoraConfig."""
    peft = pytest.importorskip("peft", reason="LoRA tests need peft")
    targets = LORA_TARGETS.get(architecture, ["q_proj", "v_proj"])
    config = {
        "r": 4,
        "target_modules": targets,
        "fan_in_fan_out": architecture == "GPT2",  # its Conv1D keeps the weight transposed
        "init_lora_weights": False,
        **changes,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name=adapter_name)
