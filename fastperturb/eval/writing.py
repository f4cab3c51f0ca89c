"""The continuations of every domain by every model, and their comparison with the texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastperturb import runs
from fastperturb.data.domains import Domain
from fastperturb.eval.continuations import (
    Mauve,
    Prompts,
    diversity,
    generate,
    prompts_of,
    rouge1,
    texts,
)
from fastperturb.eval.options import EvalOptions
from fastperturb.model import PerturbedLM


class Writing:
    """Prompts from every domain, and the continuations that each model wrote."""

    def __init__(self, options: EvalOptions, domains: Sequence[Domain], tokenizer: Any) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._prompts: dict[str, Prompts] = {
            text.name: prompts_of(
                text,
                documents=options.continuations,
                prompt_tokens=options.prompt_tokens,
                continuation_tokens=options.continuation_tokens,
            )
            for text in domains
        }
        self._written: dict[str, dict[str, list[str]]] = {text.name: {} for text in domains}

    def add(self, model: str, lm: PerturbedLM) -> None:
        """Let a model continue the prompts of every domain."""
        options = self._options
        for domain, prompts in self._prompts.items():
            self._written[domain][model] = generate(
                lm,
                prompts,
                self._tokenizer,
                mode=options.continuation_mode,
                num_samples=options.num_samples,
                seed=options.seed,
                batch_size=options.batch_size,
            )
            print(f"{model} has continued {len(prompts.documents)} documents of {domain}")

    def evaluated(self) -> list[dict[str, Any]]:
        """Return a row of results for each domain and model; model None is the text itself."""
        options, rows = self._options, []
        mauve = None
        if options.mauve_features is not None:
            mauve = Mauve(options.mauve_features, device=runs.torch_device(options.device))
        for domain, prompts in self._prompts.items():
            truths = self._texts(prompts.truths)
            own: dict[str, Any] = {"domain": domain, "documents": len(truths)}
            rows.append({**own, "model": None, "rouge1": None, **diversity(truths), "mauve": None})
            beginnings = self._texts(prompts.tokens)
            features = None if mauve is None else mauve.features(_joined(beginnings, truths))
            for model, written in self._written[domain].items():
                row = {**own, "model": model, **diversity(written), "mauve": None}
                row["rouge1"] = rouge1(written, truths, seed=options.seed).to_dict()
                if mauve is not None and features is not None:
                    written_features = mauve.features(_joined(beginnings, written))
                    row["mauve"] = mauve.score(features, written_features, seed=options.seed)
                rows.append(row)
        return rows

    def save(self, path: Path) -> None:
        """Write one JSON line per prompt: the prompt, its truth and each model's continuation."""
        with open(path, "w", encoding="utf-8") as file:
            for domain, prompts in self._prompts.items():
                beginnings, truths = self._texts(prompts.tokens), self._texts(prompts.truths)
                for number, document in enumerate(prompts.documents):
                    written = self._written[domain].items()
                    line = {
                        "domain": domain,
                        "document": document,
                        "prompt": beginnings[number],
                        "truth": truths[number],
                        "written": {model: texts[number] for model, texts in written},
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _texts(self, tokens: Any) -> list[str]:
        return texts(tokens, self._tokenizer)


def _joined(beginnings: Sequence[str], continuations: Sequence[str]) -> list[str]:
    return [first + second for first, second in zip(beginnings, continuations)]
