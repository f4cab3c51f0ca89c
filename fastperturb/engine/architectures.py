"""The parts of a Hugging Face causal LM that the engine uses: its embedding, trunk and head.

The engine never calls the model's own forward. It perturbs the outputs of the embedding module,
gives them to the trunk as `inputs_embeds`, and turns the trunk's last hidden states into log-probs
itself. So it must know exactly how that model makes logits of hidden states. A model that is not
listed here, or was changed where the engine would not see it, is rejected by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized

from fastperturb.engine.sharding import is_shard, reject_foreign

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class CausalLM:
    """The parts of a causal LM: trunk(inputs_embeds) -> hidden, then a linear head."""

    embed: nn.Module
    trunk: nn.Module
    head: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    def at_temperature(self, temperature: float) -> CausalLM:
        """Return the same model with logits / temperature: a soft cap c becomes c / temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, logit_scale=self.logit_scale / temperature, softcap=softcap)

    @property
    def head_options(self) -> dict[str, Any]:
        """Return the head ops' arguments besides hidden, weight and target."""
        bias: Tensor | None = self.head.bias
        return {"bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def _plain(model: Any) -> dict[str, Any]:
    return {}


def _softcapped(model: Any) -> dict[str, Any]:
    return {"softcap": model.config.final_logit_softcapping}


def _multiplied(model: Any) -> dict[str, Any]:
    return {"logit_scale": model.logit_scale}


def _divided(model: Any) -> dict[str, Any]:
    return {"logit_scale": 1.0 / model.config.logits_scaling}


# How each model's forward changes hidden W^T + b. All else that sets models apart lies in the
# embedding module (Gemma's scale) or in the trunk after `inputs_embeds` come in (GPT-2's
# positions, Granite's multiplier, embedding dropout), and runs as the model wrote it.
_HEADS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "CohereForCausalLM": _multiplied,
    "GPT2LMHeadModel": _plain,
    "GPTNeoXForCausalLM": _plain,
    "Gemma2ForCausalLM": _softcapped,
    "Gemma3ForCausalLM": _softcapped,
    "GraniteForCausalLM": _divided,
    "LlamaForCausalLM": _plain,
    "MistralForCausalLM": _plain,
    "MixtralForCausalLM": _plain,
    "Olmo2ForCausalLM": _plain,
    "OlmoeForCausalLM": _plain,
    "Phi3ForCausalLM": _plain,
    "Qwen2ForCausalLM": _plain,
    "Qwen3ForCausalLM": _plain,
    "Qwen3MoeForCausalLM": _plain,
}


def understand(model: nn.Module) -> CausalLM:
    """Return the parts of a supported model, with or without PEFT adapters; reject others."""
    base = _inside_peft(model)
    known, name = _known_class(base), type(base).__name__
    reject_foreign(base.get_input_embeddings())
    for outer in (model, base):
        if _is_hooked(outer):
            raise ValueError(
                f"model {type(outer).__name__} carries hooks (of a device_map over devices, "
                "offloading, FSDP or ZeRO-3, for example), which the engine would skip; load it on "
                "one device, and hook or shard the wrapper instead"
            )
    if not _runs_the_forward_of(known, base):
        raise ValueError(
            f"model {name} overrides the forward of {known.__name__}, so its head is not known; "
            f"wrap a {known.__name__} itself (under Liger, fused_linear_cross_entropy=False)"
        )
    _check_config(name, base.config)
    embed, head = base.get_input_embeddings(), base.get_output_embeddings()
    _check_embedding(name, embed)
    return CausalLM(
        embed=embed,
        trunk=base.base_model,
        head=_plain_head(name, head),
        **_HEADS[known.__name__](base),
    )


@torch.no_grad()
def embedding_rms(embed: Any) -> tuple[Tensor, int]:
    """Return the root mean square of the embedding's outputs, scaling included, and their width."""
    if embed.weight.is_meta:
        raise ValueError("model is on the meta device: load its weights before wrapping it")
    total, count, width = torch.zeros((), device=embed.weight.device), 0, 0
    for ids in torch.arange(embed.weight.shape[0], device=embed.weight.device).split(4096):
        chunk = embed(ids).float()
        total += chunk.square().sum()
        count += chunk.numel()
        width = chunk.shape[-1]
    return (total / count).sqrt(), width


def dropout_sources(model: nn.Module) -> list[str]:
    """Return the modules that draw random numbers in their present mode, with their rates.

    These are dropout (LoRA's too, and the function that attention calls) and a router's jitter.
    Each Monte-Carlo sample has its own, as each row of a batch does; a plan that runs a pass twice
    without the random state of the first must reject them.
    """
    sources = []
    for name, module in model.named_modules():
        rates = [f"{key}={rate:g}" for key, rate in _drop_rates(module) if rate > 0]
        if module.training and rates:
            sources.append(f"{name} ({', '.join(rates)})")
    return sources


def reject_dropout(model: nn.Module, why: str, *, remedy: str = "call lm.eval() first") -> None:
    """Raise if any module draws random numbers in its present mode; `why` says what they harm."""
    sources = dropout_sources(model)
    if sources:
        raise ValueError(
            f"dropout is active in {', '.join(sources[:3])}, and {why}: set it to 0 or {remedy}"
        )


def _drop_rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    is_dropout = isinstance(module, _DropoutNd) or "drop" in type(module).__name__.lower()
    for key, value in vars(module).items():
        if not (is_dropout or "drop" in key or "jitter" in key):
            continue
        # Some adapters keep a rate for each adapter's name.
        for rate in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(rate, (int, float)) and not isinstance(rate, bool):
                yield key, rate


def _known_class(base: nn.Module) -> Any:
    for cls in type(base).__mro__:
        if cls.__name__ in _HEADS and cls.__module__.startswith("transformers."):
            return cls
    inner = getattr(base, "_orig_mod", getattr(base, "module", None))
    if isinstance(inner, nn.Module):
        raise ValueError(
            f"model {type(base).__name__} holds a {type(inner).__name__}: wrap that one, then "
            "compile or distribute the wrapper"
        )
    raise ValueError(
        f"model {type(base).__name__} is not supported: how it turns hidden states into "
        f"logits is not known; use one of {', '.join(_HEADS)} or a PEFT model of these, or add "
        "a line to the table of fastperturb/engine/architectures.py"
    )


def _inside_peft(model: Any) -> Any:
    """Return the model inside PEFT's, or itself; reject what PEFT would do in its own forward."""
    if "peft" not in sys.modules:
        return model
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftMixedModel | BaseTuner):
        raise ValueError(f"{type(model).__name__} is not supported; wrap a PeftModel")
    if not isinstance(model, PeftModel):
        return model
    config = model.active_peft_config
    kind = config.peft_type.value
    if config.is_prompt_learning:
        does = "adds virtual tokens"
    elif type(model.base_model).forward is not BaseTuner.forward:
        does = "adds to the work of the layers (to the loss, for example)"
    elif getattr(config, "alora_invocation_tokens", None) is not None:
        does = "looks for alora_invocation_tokens"
    else:
        return model.get_base_model()
    raise ValueError(
        f"PEFT type {kind} {does} in the PEFT model's own forward, which the engine does not "
        "run; use an adapter that lives inside the layers, such as LoRA"
    )


def _runs_the_forward_of(known: Any, base: nn.Module) -> bool:
    """Return whether no subclass, instance or patch replaces the known class's forward."""
    inherited = type(base).forward is known.forward and "forward" not in vars(base)
    return inherited and known.forward.__module__ == known.__module__


def _is_hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or hasattr(module, "_hf_hook")


def _check_config(name: str, config: Any) -> None:
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"model {name} has config.output_router_logits=True, which adds a load-balancing term "
            "to the loss in its own forward; the perturbed loss has no such term: set it to False"
        )
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if bidirectional or not getattr(config, "is_causal", True):
        raise ValueError(
            f"model {name} is configured to attend to later tokens (use_bidirectional_attention "
            "or is_causal=False), so its predictions have seen their labels; use a causal one"
        )


def _check_embedding(name: str, embed: nn.Module) -> None:
    tables = list(embed.parameters())
    # Sharded tables are gathered by the embedding's own hooks, which run.
    known = all(_is_plain(table) or is_shard(table) for table in tables)
    if not tables or not known:
        raise ValueError(
            f"the input embedding of {name} is a {_type_name(embed)} of "
            f"{', '.join(map(_describe, tables)) or 'no parameters'}; keep quantisation off it"
        )
    for module in embed.modules():
        hooks = [getattr(hook, "__name__", "") for hook in module._forward_hooks.values()]
        if module.training and (
            "neftune_noise_alpha" in vars(module) or "neftune_post_forward_hook" in hooks
        ):
            raise ValueError(
                f"NEFTune is switched on for the input embedding of {name} (neftune_noise_alpha): "
                "it would perturb a second time, the same way for all samples and unseen by "
                "the loss; leave it unset (estimator='jensen' is NEFTune's loss)"
            )


def _plain_head(name: str, module: Any) -> nn.Linear:
    """Return the linear layer that runs as the head."""
    label, head = f"the LM head of {name}", _trained_copy(module)
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{label} is a {_type_name(head)}, not a plain torch.nn.Linear; {_advice(head)}"
        )
    if _is_hooked(module) or _is_hooked(head) or "forward" in vars(head):
        raise ValueError(
            f"{label} carries hooks or a forward of its own (of offloading, ZeRO-3 or a quantiser, "
            "for example), which the fused head would skip; remove them"
        )
    if is_shard(head.weight):
        raise ValueError(
            f"{label} has a weight sharded by itself ({_describe(head.weight)}); shard the "
            "wrapper, which gathers the weights of its root unit, and make no unit of the head"
        )
    if not _is_plain(head.weight):
        raise ValueError(
            f"{label} has a weight of {_describe(head.weight)}, which is not a plain "
            "floating-point parameter; keep quantisation off the head"
        )
    return head


def _trained_copy(head: Any) -> Any:
    """Return the module that PEFT's modules_to_save runs in place of the head, if it does."""
    if "peft" in sys.modules:
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            if head.disable_adapters or not head.active_adapters:
                return head.original_module
            return head.modules_to_save[head.active_adapters[0]]
    return head


def _advice(head: Any) -> str:
    if type(head).__module__.startswith("peft."):
        return (
            "take it out of the adapter's targets (modules_to_save=['lm_head'] trains a copy of "
            "the head), or merge_and_unload"
        )
    if isinstance(head, nn.Module) and is_parametrized(head):
        return "torch.nn.utils.parametrize.remove_parametrizations makes it one"
    if type(head).__name__.startswith("FSDP"):
        return "shard the wrapper and make no unit of the head"
    return "keep quantisation off it (llm_int8_skip_modules or modules_to_not_convert)"


def _is_plain(weight: Tensor) -> bool:
    """Return whether the weight is a plain tensor: not quantised, sharded or another subclass."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOATS


def _describe(weight: Tensor) -> str:
    return f"{type(weight).__name__} {weight.dtype} {list(weight.shape)}"


def _type_name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
