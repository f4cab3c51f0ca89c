"""What an evaluation is told: the options of `fastperturb eval`, validated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastperturb.data.domains import DomainOptions
from fastperturb.runs import option_files


@dataclass(frozen=True, kw_only=True)
class EvalOptions(DomainOptions):
    """Judge models on texts: how likely each is, how sure that is, and whether models differ."""

    models: tuple[str, ...]
    """NAME=WHERE, or WHERE alone: a folder that train or save_pretrained wrote, or a plain model,
    by its folder or Hugging Face id, which is judged on exact prefixes."""

    domains: tuple[str, ...]
    """NAME=WHERE, or WHERE alone: all that train reads, or one of wikitext2, wikitext103,
    writingprompts, codeparrot, germanquad and openwebtext on the hub."""

    base: str | None = None
    """What checkpoints were saved over, where that has moved: a folder or an id."""

    trust_remote_code: bool = False
    """Run code that a model's repository brings."""

    baseline: str | None = None
    """The model that the others are compared with; default: the first."""

    num_samples: int = 32
    """Draws of the noise."""

    temperatures: tuple[float, ...] = (1.0,)
    """What logits are divided by; every model is judged at each."""

    tune_on: str | None = None
    """A validation text, read as the domains are: every model is also judged at the temperature
    that makes it likeliest, and compared with the baseline at its own."""

    batch_size: int = 8
    """Blocks, or prompts, at a time."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 holds the base in bf16 and computes under autocast."""

    continuations: int = 0
    """Let every model continue the beginnings of so many documents of each domain."""

    prompt_tokens: int = 32
    """How long these beginnings are."""

    continuation_tokens: int = 64
    """How long continuations are."""

    continuation_mode: Literal["mixture", "sequence", "token"] = "mixture"
    """How they are decoded, by plain sampling: mixture averages num_samples draws at every step,
    sequence takes one draw for all steps, token a fresh one for each."""

    mauve_features: Path | None = None
    """Also compare continuations with the texts by MAUVE: the folder of the model whose last hidden
    states are its features."""

    seed: int = 0
    """Of all noise, of the choice of tokens, and of the resampling of documents."""

    device: Literal["cpu", "cuda"] | None = None
    """Default: cuda where there is one."""

    output_dir: Path = Path("runs/eval")
    """Where results.json, table.md, evaluation.png and continuations.jsonl go."""

    overwrite: bool = False
    """Let output_dir be a folder that already holds files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        models = named("models", self.models)
        places = named("domains", self.domains).values()
        if self.tune_on in places:
            raise ValueError(f"tune_on {self.tune_on!r} is judged on too: give a text of its own")
        if self.baseline is not None and self.baseline not in models:
            raise ValueError(f"baseline must be one of {list(models)}, got {self.baseline!r}")
        for name in ("num_samples", "batch_size", "prompt_tokens", "continuation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("continuations", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        if not self.temperatures or not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"temperatures must be numbers above 0, got {self.temperatures}")
        if self.mauve_features is not None:
            if not self.continuations:
                raise ValueError("mauve_features is about continuations: say of how many documents")
            if not (self.mauve_features / "config.json").is_file():
                raise ValueError(
                    f"mauve_features {self.mauve_features} is no folder of a model: it has no "
                    "config.json"
                )
        self._require_packages()

    def _require_packages(self) -> None:
        needed = {
            "matplotlib": ("matplotlib", "eval", True),
            "scipy": ("tune_on", "eval", self.tune_on is not None),
            "rouge_score": ("continuations", "eval", self.continuations > 0),
            "mauve": ("mauve_features", "mauve", self.mauve_features is not None),
        }
        for package, (what, extra, is_needed) in needed.items():
            if is_needed and find_spec(package) is None:
                named = {"rouge_score": "rouge-score", "mauve": "mauve-text"}.get(package, package)
                raise ValueError(
                    f"{what} needs the package {named}: pip install 'fastperturb[{extra}]'"
                )

    @property
    def lengths(self) -> dict[str, int]:
        """How long a text gets, by the options that make it so."""
        found = {"block_size": self.block_size}
        if self.continuations:
            longest = self.prompt_tokens + self.continuation_tokens
            found["prompt_tokens + continuation_tokens"] = longest
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return option_files.plain(self)


def named(option: str, entries: Sequence[str]) -> dict[str, str]:
    """Where each name lies."""
    if not entries:
        raise ValueError(f"{option} must have at least one entry, NAME=WHERE")
    found: dict[str, str] = {}
    for entry in entries:
        name, separated, where = entry.partition("=")
        where = where if separated else name
        if not name or not where:
            raise ValueError(f"{option} must be NAME=WHERE, got {entry!r}")
        if name in found:
            raise ValueError(f"{option} has the name {name!r} twice: give one of them another")
        found[name] = where
    return found
