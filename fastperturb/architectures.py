"""What the engine must know of a Hugging Face causal LM: its embedding, trunk and head.

The wrapper replaces the model's own forward from the last hidden state on, so it must know
exactly how that model turns hidden states into logits. A model whose head is not listed here,
or was changed, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class CausalLM:
    """The parts of a causal LM: trunk(inputs_embeds) -> hidden, then a linear head."""

    embed: nn.Module
    trunk: nn.Module
    head: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def head_options(self) -> dict[str, Any]:
        """What the head ops take besides hidden, weight and target."""
        bias: Tensor | None = self.head.bias
        return {"bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def _plain(config: Any) -> dict[str, Any]:
    return {}


def _final_softcap(config: Any) -> dict[str, Any]:
    return {"softcap": config.final_logit_softcapping}


_HEADS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "GPT2LMHeadModel": _plain,
    "LlamaForCausalLM": _plain,
    "MistralForCausalLM": _plain,
    "Qwen2ForCausalLM": _plain,
    "Gemma2ForCausalLM": _final_softcap,
}


def understand(model: nn.Module) -> CausalLM:
    """The parts of a supported model, with or without PEFT adapters; others are refused."""
    base = _without_adapters(model)
    known: Any = next((cls for cls in type(base).__mro__ if cls.__name__ in _HEADS), None)
    if known is None or not known.__module__.startswith("transformers."):
        raise ValueError(
            f"model {type(base).__name__} is not supported: how it turns hidden states into "
            f"logits is not known; supported are {', '.join(_HEADS)} and PEFT models of these"
        )
    if type(base).forward is not known.forward or "forward" in vars(base):
        raise ValueError(
            f"model {type(base).__name__} overrides the forward of {known.__name__}, so its "
            f"head is not known; wrap a {known.__name__} itself"
        )
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the LM head of {type(base).__name__} is a {type(head).__module__}."
            f"{type(head).__name__}, not a plain torch.nn.Linear; keep adapters and "
            "quantisation off the head"
        )
    if head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
        raise ValueError(
            f"the LM head of {type(base).__name__} carries forward hooks (offloading, for "
            "example), which the fused head would skip; remove them"
        )
    return CausalLM(
        embed=base.get_input_embeddings(),
        trunk=base.base_model,
        head=head,
        **_HEADS[known.__name__](base.config),
    )


def _without_adapters(model: Any) -> Any:
    if not type(model).__module__.startswith("peft."):
        return model
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is not supported; wrap a PeftModel")
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(
            f"PEFT type {config.peft_type.value} adds virtual tokens in the PEFT model's own "
            "forward, which the engine does not run; use an adapter that lives inside the "
            "layers, such as LoRA"
        )
    if type(model.base_model).forward is not BaseTuner.forward:
        raise ValueError(
            f"PEFT type {config.peft_type.value} adds to the loss in its own forward, which the "
            "engine does not run; use an adapter that lives inside the layers, such as LoRA"
        )
    return model.get_base_model()
