"""A tiny model folder, a text and the options of a run on them, for the training tests."""

import random
from pathlib import Path

import tokenizers
import torch
import transformers

from fastperturb import PerturbConfig
from fastperturb.train import LoraOptions, TrainOptions

WORDS = [f"w{number}" for number in range(60)]


def model_folder(folder: Path, *, kind: str = "llama") -> Path:
    """A random Llama with tied embeddings, or GPT-2 with dropout, and a tokenizer of words."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    common = {"vocab_size": len(vocabulary), "initializer_range": 0.2}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
            **common,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def text_file(path: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Documents of 5 to 30 words, each of which tends to follow the same one."""
    draw = random.Random(seed)
    lines = []
    for _ in range(documents):
        words = [draw.randrange(60)]
        for _ in range(draw.randint(4, 29)):
            words.append((words[-1] * 7 + draw.choice((1, 2, 3))) % 60)
        lines.append(" ".join(WORDS[word] for word in words))
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def options(folder: Path, **changes) -> TrainOptions:
    """Six steps of four blocks of 16 tokens, with M = 4."""
    given = {
        "model": str(folder / "base"),
        "data": (str(folder / "train.txt"),),
        "output_dir": folder / "run",
        "block_size": 16,
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "perturb": PerturbConfig(num_samples=4, latent_dim=4),
        "lora": LoraOptions(rank=2),
        "eval_samples": 8,
        "device": "cpu",
    }
    return TrainOptions(**{**given, **changes})
