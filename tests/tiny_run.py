"""A tiny model folder, a text and a training run on them."""

import random
from pathlib import Path

import tiny
import tokenizers
import torch
import transformers

from fastperturb import PerturbConfig
from fastperturb.data import training_data
from fastperturb.train import LoraOptions, TrainOptions, distributed, held_out_blocks
from fastperturb.train.loop import Loop
from fastperturb.train.report import Report

WORDS = [f"w{number}" for number in range(60)]


def model_folder(folder: Path, *, kind: str = "llama") -> Path:
    """Write a random Llama with tied embeddings, or GPT-2 with dropout, and a word tokenizer."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    if kind == "gpt2":
        model = tiny.gpt2(
            vocab_size=len(vocabulary), attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1
        )
    else:
        model = tiny.llama(
            vocab_size=len(vocabulary),
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            pad_token_id=None,
        )
    model.save_pretrained(folder)
    return folder


def text_file(path: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Write documents of 5 to 30 words; each word allows one of three to follow it."""
    generator = random.Random(seed)
    lines = []
    for _ in range(documents):
        words = [generator.randrange(60)]
        for _ in range(generator.randint(4, 29)):
            words.append((words[-1] * 7 + generator.choice((1, 2, 3))) % 60)
        lines.append(" ".join(WORDS[word] for word in words))
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def options(folder: Path, **changes) -> TrainOptions:
    """Options of a run of six steps, on four blocks of 16 tokens each, with M = 4."""
    defaults = {
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
    return TrainOptions(**{**defaults, **changes})


def loop_of(options: TrainOptions) -> Loop:
    """The loop of a run before its first step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    held_out = held_out_blocks(options, tokenizer) if options.eval_data else ()
    data = training_data(options, tokenizer, seed=options.seed)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    return Loop(options, distributed.start(), data, held_out, tokenizer, options.output_dir)


def report_of(loop: Loop) -> Report:
    """The report of a loop, without trackers."""
    return Report(loop.folder, total_steps=loop.total_steps, config={}, start_step=loop.step)


def finished_loop(options: TrainOptions) -> Loop:
    """The loop of a run after its last step."""
    loop = loop_of(options)
    with report_of(loop) as report:
        loop.run(report)
    return loop


def trained(loop: Loop) -> dict[str, torch.Tensor]:
    """Copies of the parameters that a run trains."""
    return {name: p.detach().clone() for name, p in loop.lm.named_parameters() if p.requires_grad}


def assert_close(tensors, expected, **tolerance) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def assert_equal(tensors, expected) -> None:
    assert_close(tensors, expected, rtol=0, atol=0)
