"""The model and the pieces of text: stories260K with its own tokenizer, texts it never saw."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fastperturb import ops
from fastperturb.config import PerturbConfig
from fastperturb.estimators import combine
from fastperturb.transforms import Transform, make_transform

TEXTS = {"wikipedia": "wikipedia_en", "stories": "stories"}
LENGTH = 128
PIECES = 2  # in a batch
# Training of the transform alone, for the variants after training.
STEPS, STEP_PIECES, STEP_SAMPLES, STEP_RATE = 150, 4, 8, 1e-2


def data_folder() -> Path:
    return Path(os.environ.get("FASTPERTURB_DATA", "../shared/data"))


def are_there() -> bool:
    """Return True if there are texts and a model; else say that the bench is skipped."""
    if (data_folder() / "models" / "stories260K-hf").exists():
        return True
    print(f"skipped: {data_folder()} lacks the model and texts; set FASTPERTURB_DATA")
    return False


@dataclass(frozen=True)
class Model:
    """The base and the transform, with a pass that returns hidden states of every sample."""

    base: Any
    transform: Transform

    @classmethod
    def load(cls, scope: str) -> Model:
        """Load the base, and make a transform of the default scale that is always the same."""
        base = transformers.AutoModelForCausalLM.from_pretrained(
            data_folder() / "models" / "stories260K-hf", dtype=torch.float32
        )
        table = base.get_input_embeddings().weight
        rms = table.detach().square().mean().sqrt().item()
        config = PerturbConfig(transform="lowrank", latent_dim=16, init_scale=0.2, scope=scope)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(base.eval(), make_transform(config, table.shape[1], embed_rms=rms))

    @property
    def head(self) -> Tensor:
        return self.base.get_output_embeddings().weight

    def hidden(self, ids: Tensor, seed: int, samples: int | Tensor, **joint_law: Any) -> Tensor:
        """Return the hidden states that predict the next token: ids [B, T] to [M, B, T - 1, D]."""
        table = self.base.get_input_embeddings().weight
        perturbed = ops.perturb_embed(ids, table, self.transform, seed, samples, **joint_law)
        states = self.base.model(inputs_embeds=perturbed.flatten(0, 1), use_cache=False)
        return states.last_hidden_state[:, :-1].unflatten(0, perturbed.shape[:2])

    def log_probs(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the log-prob of every next token under each sample: [M, B, T - 1]."""
        labels = ids[:, 1:].expand(len(hidden), -1, -1)
        flat = ops.linear_logprob(hidden.flatten(0, 2), self.head, labels.flatten())
        return flat.view_as(labels)


@functools.cache
def pieces(text: str, split: str) -> Tensor:
    """Return a text as pieces of LENGTH tokens, the first of them bos: [pieces, LENGTH]."""
    folder = data_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "models" / "stories260K-hf")
    words = (folder / TEXTS[text] / f"{split}.txt").read_text(encoding="utf-8")[:120_000]
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)
    whole = tokens[: len(tokens) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1)
    return torch.cat([torch.full((len(whole), 1), tokenizer.bos_token_id), whole], 1)


def batch(text: str, number: int, batches: int) -> Tensor:
    """Return the pieces of one of several batches, which lie evenly over the text."""
    every = pieces(text, "test")
    first = number * PIECES * (len(every) // (batches * PIECES))
    return every[first : first + PIECES]


def train(model: Model, text: str) -> None:
    """Train the transform alone on the training split, by iwae with stratified samples."""
    model.base.requires_grad_(False)
    every = pieces(text, "train")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.transform.parameters(), lr=STEP_RATE)
    for step in range(STEPS):
        ids = every[torch.randint(len(every), (STEP_PIECES,), generator=generator)]
        hidden = model.hidden(ids, step, STEP_SAMPLES, strata=STEP_SAMPLES)
        value, _ = combine(model.log_probs(hidden, ids), "iwae")
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
    model.base.requires_grad_(True)
