"""Models whose forward the wrapper does not understand are rejected, with what to do instead."""

import pytest
import torch
import transformers
from batches import batch
from tiny import SMALL, Doubled, base_model, perturbed, with_lora
from torch import nn
from torch.nn.utils import parametrize

from fastperturb import PerturbConfig, wrap
from fastperturb.engine.architectures import understand

# peft 0.18 takes every model that can tie its head for one that does.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


class OverriddenLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' layers, which are subclasses too."""


class PackedWeight(torch.Tensor):
    """Stands in for torchao's weights: a floating dtype outside, something else inside."""


def with_head(head):
    model = base_model()
    model.lm_head = head
    return model


def head_with_weight(weight):
    head = nn.Linear(32, 97, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return with_head(head)


def embedding_with_weight(weight):
    model = base_model()
    model.model.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
    return model


def hooked(find, register="register_forward_hook"):
    model = base_model()
    getattr(find(model), register)(lambda *args: None)
    return model


def parametrized_head():
    model = base_model()
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    return model


def changed_instance():
    model = base_model()
    model.forward = lambda *args, **kwargs: None
    return model


def head_with_a_forward():
    model = base_model()
    model.lm_head.forward = lambda hidden: hidden
    return model


def with_adapter(make_config, **options):
    peft = pytest.importorskip("peft", reason="PEFT tests need peft")
    return peft.get_peft_model(base_model(), make_config(peft), **options)


def adalora(peft):
    return peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]
    )


REJECTED = {
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=1
            )
        ),
        "model OPTForCausalLM is not supported.*LlamaForCausalLM",
    ),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SMALL, num_labels=2)
        ),
        "model LlamaForSequenceClassification is not supported",
    ),
    "trunk": (lambda: base_model().model, "model LlamaModel is not supported"),
    "no lm": (lambda: nn.Linear(3, 3), "model Linear is not supported"),
    "compiled": (
        lambda: torch.compile(base_model()),
        "OptimizedModule holds a LlamaForCausalLM: wrap that one, then compile or distribute",
    ),
    "parallel": (lambda: nn.DataParallel(base_model()), "DataParallel holds a LlamaForCausalLM"),
    "overridden": (
        lambda: OverriddenLlama(transformers.LlamaConfig(**SMALL)),
        "OverriddenLlama overrides the forward of LlamaForCausalLM",
    ),
    "changed instance": (changed_instance, "LlamaForCausalLM overrides the forward.*Liger"),
    "hooked model": (
        lambda: hooked(lambda model: model),
        "model LlamaForCausalLM carries hooks .*hook or shard the wrapper",
    ),
    "router loss": (
        lambda: base_model("Mixtral", output_router_logits=True),
        "MixtralForCausalLM has config.output_router_logits=True.*set it to False",
    ),
    "bidirectional": (
        lambda: base_model("Gemma3", use_bidirectional_attention=True),
        "Gemma3ForCausalLM is configured to attend to later tokens",
    ),
    "not causal": (lambda: base_model(is_causal=False), "is configured to attend to later tokens"),
    "prompt tuning": (
        lambda: with_adapter(
            lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ),
        "PROMPT_TUNING adds virtual tokens",
    ),
    "adalora": (lambda: with_adapter(adalora), "PEFT type ADALORA adds to .*the loss"),
    "alora": (
        lambda: with_adapter(
            lambda peft: peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]
            )
        ),
        "PEFT type LORA looks for alora_invocation_tokens",
    ),
    "mixed adapters": (
        lambda: with_adapter(lambda peft: peft.LoraConfig(target_modules=["q_proj"]), mixed=True),
        "PeftMixedModel is not supported; wrap a PeftModel",
    ),
    "lora head": (
        lambda: with_lora(base_model(), target_modules=["lm_head"]),
        r"LM head of LlamaForCausalLM is a peft\..*Linear.*modules_to_save=\['lm_head'\]",
    ),
    "hooked head": (
        lambda: hooked(lambda model: model.lm_head),
        "LM head of LlamaForCausalLM carries hooks .*remove them",
    ),
    "head with a pre-hook": (
        lambda: hooked(lambda model: model.lm_head, "register_forward_pre_hook"),
        "LM head of LlamaForCausalLM carries hooks",
    ),
    "head with a backward hook": (
        lambda: hooked(lambda model: model.lm_head, "register_full_backward_hook"),
        "LM head of LlamaForCausalLM carries hooks",
    ),
    "hooked copy of the head": (
        lambda: hooked(
            lambda model: with_lora(model, modules_to_save=["lm_head"]).base_model.model.lm_head
        ),
        "LM head of LlamaForCausalLM carries hooks",
    ),
    "head with a forward": (head_with_a_forward, "LM head .* carries hooks or a forward"),
    "parametrized head": (
        parametrized_head,
        "LM head .*ParametrizedLinear, not a plain .*remove_parametrizations makes it one",
    ),
    "4-bit head": (
        lambda: with_head(Linear4bit(32, 97)),
        "LM head .*Linear4bit, not a plain .*llm_int8_skip_modules",
    ),
    "int8 head": (
        lambda: head_with_weight(torch.zeros(97, 32, dtype=torch.int8)),
        r"LM head .* weight of Parameter torch.int8 \[97, 32\].*keep quantisation off the head",
    ),
    "float8 head": (
        lambda: head_with_weight(torch.zeros(97, 32, dtype=torch.float8_e4m3fn)),
        "LM head .* weight of Parameter torch.float8_e4m3fn",
    ),
    "packed head": (
        lambda: head_with_weight(torch.zeros(97, 32).as_subclass(PackedWeight)),
        "LM head .* weight of PackedWeight torch.float32",
    ),
    "int8 embedding": (
        lambda: embedding_with_weight(torch.zeros(97, 32, dtype=torch.int8)),
        "input embedding of LlamaForCausalLM .*torch.int8.*keep quantisation off it",
    ),
    "packed embedding": (
        lambda: embedding_with_weight(torch.zeros(97, 32).as_subclass(PackedWeight)),
        "input embedding of LlamaForCausalLM .*PackedWeight",
    ),
}


@pytest.mark.parametrize(("make", "message"), REJECTED.values(), ids=REJECTED)
def test_unsupported_model_is_rejected_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        wrap(make(), PerturbConfig())


def test_forward_patched_into_the_class_is_rejected(monkeypatch):
    model = base_model()
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM overrides the forward"):
        understand(model)


def test_offloaded_model_is_rejected():
    accelerate = pytest.importorskip("accelerate", reason="dispatching needs accelerate")
    model = accelerate.cpu_offload(base_model(), execution_device="cpu")
    with pytest.raises(ValueError, match="carries hooks .*device_map.*load it on one device"):
        understand(model)


def test_hook_added_after_wrapping_is_rejected_by_the_next_forward():
    lm = perturbed(base_model())
    lm(**batch())
    lm.base.lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="carries hooks"):
        lm(**batch())


def test_base_sharded_instead_of_its_wrapper_is_rejected(one_process_mesh):
    from torch.distributed.fsdp import fully_shard

    model = with_lora(base_model())
    fully_shard(model, mesh=one_process_mesh)
    with pytest.raises(ValueError, match="carries hooks .*FSDP.*shard the wrapper"):
        understand(model)


def test_head_sharded_by_itself_is_rejected(one_process_mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = base_model()
    fully_shard(model.lm_head, mesh=one_process_mesh)
    with pytest.raises(ValueError, match="FSDPLinear.* make no unit of the head"):
        understand(model)
    model = base_model()
    model.lm_head.weight = nn.Parameter(
        distribute_tensor(model.lm_head.weight.data, one_process_mesh)
    )
    with pytest.raises(ValueError, match="weight sharded by itself .*shard the wrapper"):
        understand(model)
