"""The options of `fastperturb eval`, validated."""

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
    """Compare models on texts: perplexities, differences with intervals, and continuations."""

    models: tuple[str, ...]
    """Models to compare, each NAME=WHERE or WHERE alone; WHERE is a folder written by train or
    save_pretrained, or a plain model's folder or Hugging Face id, which is scored unperturbed."""

    domains: tuple[str, ...]
    """Texts to score, each NAME=WHERE or WHERE alone; WHERE is anything that train reads, or a
    known text: wikitext2, wikitext103, writingprompts, codeparrot, germanquad or openwebtext."""

    base: str | None = None
    """Folder or Hugging Face id of the base model, if it is not where the checkpoints say."""

    trust_remote_code: bool = False
    """Allow Python code from a model's repository to run."""

    baseline: str | None = None
    """Name of the model that all others are compared with; the default is the first model."""

    num_samples: int = 32
    """Number M of Monte-Carlo samples that each probability is averaged over."""

    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures that the logits are divided by; every model is scored at each of them."""

    tune_on: str | None = None
    """Validation text on which each model's best temperature is found; every model is then also
    scored at its own best temperature, and compared with the baseline at the baseline's."""

    batch_size: int = 8
    """Number of blocks, or of prompts to continue, that go through a model at a time."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the models; bf16 loads the base in bf16 and computes under autocast."""

    continuations: int = 0
    """Number of documents of each domain that every model continues from their first tokens."""

    prompt_tokens: int = 32
    """Length in tokens of the beginning that is given to a model to continue."""

    continuation_tokens: int = 64
    """Length in tokens of each continuation."""

    continuation_mode: Literal["mixture", "sequence", "token"] = "mixture"
    """Sampling of continuations: mixture averages num_samples samples at every step, sequence keeps
    one sample for all steps, and token draws a fresh one for each step."""

    mauve_features: Path | None = None
    """Folder of a model whose last hidden states are the features for MAUVE, which then also
    compares continuations with the texts."""

    seed: int = 0
    """Seed of the noise, of sampling continuations and of resampling documents."""

    device: Literal["cpu", "cuda"] | None = None
    """Device that models run on; default: cuda where there is one, else cpu."""

    output_dir: Path = Path("runs/eval")
    """Folder for results.json, table.md, evaluation.png and continuations.jsonl."""

    overwrite: bool = False
    """Write into an output_dir that already holds files; files of the same names are replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        models = named("models", self.models)
        if self.tune_on in named("domains", self.domains).values():
            raise ValueError(
                f"tune_on {self.tune_on!r} is one of domains too: give a validation text of its own"
            )
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
                raise ValueError(
                    "mauve_features needs continuations: set continuations to a number of documents"
                )
            if not (self.mauve_features / "config.json").is_file():
                raise ValueError(
                    f"mauve_features {self.mauve_features} is not the folder of a model: it has no "
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
        distributions = {"rouge_score": "rouge-score", "mauve": "mauve-text"}
        for package, (option, extra, is_needed) in needed.items():
            if is_needed and find_spec(package) is None:
                raise ValueError(
                    f"{option} needs the package {distributions.get(package, package)}: "
                    f"pip install 'fastperturb[{extra}]'"
                )

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of text that a model must have positions for, by option."""
        lengths = {"block_size": self.block_size}
        if self.continuations:
            longest = self.prompt_tokens + self.continuation_tokens
            lengths["prompt_tokens + continuation_tokens"] = longest
        return lengths

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return option_files.plain(self)


def named(option: str, entries: Sequence[str]) -> dict[str, str]:
    """Return {name: where} of an option's entries NAME=WHERE; WHERE alone is its own name."""
    if not entries:
        raise ValueError(f"{option} must have at least one entry, NAME=WHERE")
    by_name: dict[str, str] = {}
    for entry in entries:
        name, separated, where = entry.partition("=")
        where = where if separated else name
        if not name or not where:
            raise ValueError(f"{option} must be NAME=WHERE, got {entry!r}")
        if name in by_name:
            raise ValueError(f"{option} has the name {name!r} twice: rename one of them")
        by_name[name] = where
    return by_name
