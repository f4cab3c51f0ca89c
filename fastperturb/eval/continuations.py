"""What models write when they continue documents, beside how these really went on.

Prompts are the first tokens of documents, and a continuation as many tokens as are compared.
ROUGE-1 is the overlap in words with the true continuation (F1); distinct-n, the share of different
n-grams of words in all continuations; repetition, the share of 4-grams that came before in the
same continuation. Words are runs of letters and digits of any script, in lower case. MAUVE compares
the laws of whole texts, prompt included, by their features under another model; it is made for
thousands of texts, and of a few dozen it says little.
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
from fastperturb.eval.likelihood import measured_as_is
from fastperturb.model import PerturbedLM
from fastperturb.report.bootstrap import Interval, mean_ratio

_REPEATED = 4  # the n of the n-grams that count as repeated
_DISTINCT = (1, 2, 3)
# Models may prefer otherwise in their generation config, which would be another comparison.
_PLAIN_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Prompts:
    """The beginnings of a domain's documents, and what came next."""

    documents: list[int]  # their numbers
    tokens: NDArray[np.int64]  # [N, P]
    truths: NDArray[np.int64]  # [N, C]


def prompts_of(
    domain: Domain, *, documents: int, prompt_tokens: int, continuation_tokens: int
) -> Prompts:
    """Of the first so many documents that are long enough."""
    length = prompt_tokens + continuation_tokens
    long = [(n, each[:length]) for n, each in enumerate(domain.tokens()) if len(each) >= length]
    if not long:
        raise ValueError(
            f"domain {domain.name!r} has no document of prompt_tokens + continuation_tokens = "
            f"{length} tokens to continue: lower them, or leave it out"
        )
    numbers, tokens = zip(*long[:documents])
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
    """A continuation of each prompt, sampled; the same whatever torch's generator has done."""
    device = lm.transform.embed_rms.device
    tokens = torch.from_numpy(prompts.tokens).to(device)
    rows = torch.tensor(prompts.documents, device=device)
    found = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), measured_as_is(lm):
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
            found += texts(written[:, tokens.shape[1] :].cpu().numpy(), tokenizer)
    return found


def texts(tokens: NDArray[np.int64], tokenizer: Any) -> list[str]:
    return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))


def rouge1(continuations: Sequence[str], truths: Sequence[str], *, seed: int = 0) -> Interval:
    """Mean F1 of the words that a continuation shares with the true one, over documents."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], tokenizer=Words())
    scores = [scorer.score(*pair)["rouge1"].fmeasure for pair in zip(truths, continuations)]
    return mean_ratio([scores], [np.ones(len(scores))], seed=seed)


def diversity(continuations: Sequence[str]) -> dict[str, float | None]:
    """distinct1, distinct2, distinct3 and repetition; None where no continuation is so long."""
    words = [Words().tokenize(each) for each in continuations]
    found = {}
    for n in _DISTINCT:
        all_grams = [gram for each in words for gram in _grams(each, n)]
        found[f"distinct{n}"] = len(set(all_grams)) / len(all_grams) if all_grams else None
    grams = [_grams(each, _REPEATED) for each in words]
    total, different = sum(map(len, grams)), sum(len(set(each)) for each in grams)
    found["repetition"] = 1 - different / total if total else None
    return found


class Words:
    """What rouge_score asks of a tokenizer; its own drops all letters but English ones."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n))))


class Mauve:
    """MAUVE under the features of one model: its last hidden state at a text's last token."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModel.from_pretrained(folder, use_safetensors=True)
        self._model = model.to(device).eval()
        self._most = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:  # [N, D]
        found = []
        for text in texts:
            ids = self._tokenizer(text, return_tensors="pt").input_ids[:, : self._most]
            hidden = self._model(ids.to(self._model.device)).last_hidden_state
            found.append(hidden[0, -1].float().cpu().numpy())
        return np.stack(found)

    def score(
        self, truths: NDArray[np.float32], written: NDArray[np.float32], *, seed: int
    ) -> float:
        """From 0 to 1, where the two laws are the same."""
        import mauve

        return float(mauve.compute_mauve(p_features=truths, q_features=written, seed=seed).mauve)
