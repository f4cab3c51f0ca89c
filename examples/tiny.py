"""The examples' model and text: yours, or a random tiny Llama and the bytes of README.md."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import fastperturb
from fastperturb import PerturbConfig, PerturbedLM

LENGTH = 32


def base_and_tokenizer(model: str | None) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer by folder or Hugging Face id, or make a random one."""
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


def perturbed_and_tokenizer(model: str | None) -> tuple[PerturbedLM, Any]:
    """Load what train_loop.py saved, or wrap a model with a transform that has not learned."""
    base, tokenizer = base_and_tokenizer(model)
    if model is not None and Path(model, "perturbation_config.json").exists():
        return fastperturb.load(base, model), tokenizer
    return fastperturb.wrap(base, PerturbConfig(transform="diagonal", num_samples=8)), tokenizer


def text(path: Path | None) -> str:
    """Read a text file: the one at `path`, or the page that says how to run the examples."""
    return (path or Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def examples(text: str, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Cut the text into blocks; `rows` is a block's number, which keys its noise."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [
        {"input_ids": block, "labels": block, "rows": torch.tensor(number)}
        for number, block in enumerate(blocks)
    ]
