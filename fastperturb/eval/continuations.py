"""Continuations of documents, and how they compare with how the documents really went on.

Prompts are the first tokens of documents; a continuation has as many tokens as the part of the
document that it is compared with. ROUGE-1 is the overlap in words with the true continuation (F1).
distinct-n is the share of different n-grams of words among all continuations. repetition is the
share of 4-grams that came before in the same continuation. Words are runs of letters and digits of
any script, in lower case. MAUVE compares the distributions of whole texts, prompt included, by
their features under another model; it is made for thousands of texts, and a few dozen tell little.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastperturb.data.domains import Domain
from fastperturb.eval.likelihood import evaluation_mode
from fastperturb.model import PerturbedLM
from fastperturb.report.bootstrap import Interval, mean_ratio

_REPETITION_N = 4
_DISTINCT_N = (1, 2, 3)
# Overrides the model's generation config: all models must sample in the same way.
_PLAIN_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Prompts:
    """Prompts from the beginnings of a domain's documents, and their true continuations."""

    documents: list[int]  # [N], numbers of the documents in the domain
    tokens: NDArray[np.int64]  # [N, P]
    truths: NDArray[np.int64]  # [N, C]


def prompts_of(
    domain: Domain, *, documents: int, prompt_tokens: int, continuation_tokens: int
) -> Prompts:
    """Return prompts from the first `documents` documents that are long enough."""
    length = prompt_tokens + continuation_tokens
    long_enough = [
        (number, tokens[:length])
        for number, tokens in enumerate(domain.tokens())
        if len(tokens) >= length
    ]
    if not long_enough:
        raise ValueError(
            f"domain {domain.name!r} has no document of prompt_tokens + continuation_tokens = "
            f"{length} tokens to continue: lower them, or leave it out"
        )
    numbers, tokens = zip(*long_enough[:documents])
    stacked = np.stack(tokens)
    return Prompts(list(numbers), stacked[:, :prompt_tokens], stacked[:, prompt_tokens:])


def generate(
    lm: PerturbedLM,
    prompts: Prompts,
    tokenizer: Any,
    *,
    mode: str,
    num_samples: int,
    seed: int,
    batch_size: int,
) -> list[str]:
    """Sample a continuation of each prompt; the result depends on no generator but the seed."""
    device = lm.transform.embed_rms.device
    tokens = torch.from_numpy(prompts.tokens).to(device)
    rows = torch.tensor(prompts.documents, device=device)
    continuations: list[str] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluation_mode(lm):
        torch.manual_seed(seed)
        if lm.has_one_draw:
            mode = "sequence"
        for first in range(0, len(tokens), batch_size):
            chosen = slice(first, first + batch_size)
            written = lm.generate(
                tokens[chosen],
                torch.ones_like(tokens[chosen]),
                mode=mode,
                num_samples=num_samples if mode == "mixture" else None,
                seed=seed,
                rows=rows[chosen],
                max_new_tokens=prompts.truths.shape[1],
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                **_PLAIN_SAMPLING,
            )
            continuations += texts(written[:, tokens.shape[1] :].cpu().numpy(), tokenizer)
    return continuations


def texts(tokens: NDArray[np.int64], tokenizer: Any) -> list[str]:
    """Decode token arrays without special tokens."""
    return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))


def rouge1(continuations: Sequence[str], truths: Sequence[str], *, seed: int = 0) -> Interval:
    """Return the mean F1 overlap in words with the true continuations, with its interval."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], tokenizer=WordTokenizer())
    scores = [scorer.score(*pair)["rouge1"].fmeasure for pair in zip(truths, continuations)]
    return mean_ratio([scores], [np.ones(len(scores))], seed=seed)


def diversity(continuations: Sequence[str]) -> dict[str, float | None]:
    """Return distinct1, distinct2, distinct3 and repetition.

    A value is None where every continuation is too short for n-grams.
    """
    tokenizer = WordTokenizer()
    words = [tokenizer.tokenize(text) for text in continuations]
    shares = {}
    for n in _DISTINCT_N:
        all_grams = [gram for text_words in words for gram in _grams(text_words, n)]
        shares[f"distinct{n}"] = len(set(all_grams)) / len(all_grams) if all_grams else None
    grams = [_grams(text_words, _REPETITION_N) for text_words in words]
    total, different = sum(map(len, grams)), sum(len(set(text_grams)) for text_grams in grams)
    shares["repetition"] = 1 - different / total if total else None
    return shares


class WordTokenizer:
    """A tokenizer for rouge_score that keeps words of any script; its own keeps English only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n))))


class Mauve:
    """MAUVE with the features of one model: the last hidden state at the last token of a text."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModel.from_pretrained(folder, use_safetensors=True)
        self._model = model.to(device).eval()
        self._max_tokens = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:  # [N, D]
        features = []
        for text in texts:
            ids = self._tokenizer(text, return_tensors="pt").input_ids[:, : self._max_tokens]
            hidden = self._model(ids.to(self._model.device)).last_hidden_state
            features.append(hidden[0, -1].float().cpu().numpy())
        return np.stack(features)

    def score(
        self, truths: NDArray[np.float32], written: NDArray[np.float32], *, seed: int
    ) -> float:
        """Return MAUVE: from 0 to 1, and 1 where the two distributions are the same."""
        import mauve

        return float(mauve.compute_mauve(p_features=truths, q_features=written, seed=seed).mauve)
