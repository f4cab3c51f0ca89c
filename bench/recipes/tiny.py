"""The recipes' model and text: given ones, or a random tiny Llama and the bytes of README.md."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

LENGTH = 32


def base_and_tokenizer(model: str | None) -> tuple[Any, Any]:
    """A pretrained causal LM and its tokenizer, by folder or Hugging Face id."""
    if model is not None:
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        return base, transformers.AutoTokenizer.from_pretrained(model)
    tokenizer = transformers.ByT5Tokenizer()  # bytes, so it needs no files
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config), tokenizer


def text(path: Path | None) -> str:
    """A text file, or how the recipes are run."""
    return (path or Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def examples(text: str, tokenizer: Any) -> list[dict[str, Tensor]]:
    """The text in blocks; `rows` is an example's number, by which its noise is keyed."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [
        {"input_ids": block, "labels": block, "rows": torch.tensor(number)}
        for number, block in enumerate(blocks)
    ]
