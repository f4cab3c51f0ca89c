"""Base models and tokenizers of transformers, loaded by the same rules everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> nn.Module:
    """Load a causal language model from a folder or the Hugging Face hub, safetensors only.

    attn_implementation: default, the model's own.
    Raises ValueError, with the name, where transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer from a folder or the Hugging Face hub.

    Raises ValueError, with the name, where transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {error}") from error


def check_positions(name: str, base: Any, tokens: int, option: str = "block_size") -> None:
    """Raise ValueError if `option` asks for more tokens than the base model has positions."""
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"{option} = {tokens} is more than the {positions} positions that model {name!r} was "
            "made for; lower it"
        )
