"""Options of `fastperturb rank`, validated."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastperturb.data.domains import TextOptions
from fastperturb.eval.options import named
from fastperturb.runs import option_files

_SMALLEST = {
    "histories": 80,  # a quarter of them makes the smallest matrix whose exponent is fitted
    "history_tokens": 1,
    "futures": 4,
    "future_tokens": 1,
    "top_k": 2,
    "num_samples": 1,
    "targets": 0,
    "steps": 1,
    "continuations": 1,
    "batch_tokens": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class RankOptions(TextOptions):
    """Measure the logit rank of language models, and write with linear combinations of prompts."""

    models: tuple[str, ...]
    """Models to measure, each as NAME=WHERE or WHERE, where WHERE is a folder written by train or
    save_pretrained, or the folder or Hugging Face id of a plain model."""

    text: str
    """Text from which histories and futures are cut: a file, folder or dataset that train reads, or
    a text that eval knows by name."""

    base: str | None = None
    """Folder or Hugging Face id of the base model, if it is not where the checkpoints say."""

    trust_remote_code: bool = False
    """Allow Python code from a model's repository to run."""

    histories: int = 256
    """Number of histories: pieces of the text, without overlap, that give the rows of the logit
    matrix."""

    history_tokens: int = 32
    """Length of each history in tokens."""

    futures: int = 32
    """Number of further pieces of the text, whose prefixes are the futures: tokens that follow a
    history and give the columns of the logit matrix."""

    future_tokens: int = 8
    """Length in tokens of each of these pieces, and so of the longest futures."""

    top_k: int | None = 1024
    """Number of next tokens to keep for each future, the most probable under the first model; None
    keeps the whole vocabulary."""

    num_samples: int = 32
    """Number M of Monte-Carlo samples whose mean prediction is measured, for a perturbed model."""

    targets: int = 16
    """Number of prompts, from documents that give no history, to continue by linear combinations of
    the histories; 0 skips this, and a good match takes a thousand histories or more."""

    steps: int = 15
    """Number of tokens to write after each target prompt."""

    continuations: int = 4
    """Number of continuations sampled from the model for each target, on which predictions are
    compared."""

    earlier: str | None = None
    """Earlier checkpoint of the first model, to compare with the linear combinations."""

    batch_tokens: int = 8192
    """Approximate number of tokens in one forward pass."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the models; bf16 loads the base in bf16 and computes under autocast."""

    seed: int = 0
    """Seed of the choice of pieces, the noise, the continuations and the intervals."""

    device: Literal["cpu", "cuda"] | None = None
    """Device that models run on; default: cuda where there is one, else cpu."""

    output_dir: Path = Path("runs/rank")
    """Folder for results.json, table.md, spectrum.png and generation.png."""

    overwrite: bool = False
    """Write into an output_dir that already holds files; files of the same names are replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named("models", self.models)
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.targets == 1:
            raise ValueError("targets must be 0, or at least 2 to give an interval, got 1")
        if self.earlier is not None and not self.targets:
            raise ValueError("earlier is compared on targets: set targets to 2 or more, got 0")
        for package in ("matplotlib", "scipy"):
            if find_spec(package) is None:
                raise ValueError(
                    f"rank needs the package {package}: pip install 'fastperturb[rank]'"
                )

    @property
    def lengths(self) -> dict[str, int]:
        """The longest context in tokens, by the options that determine it."""
        written = max(self.future_tokens, self.steps)
        return {"history_tokens + future_tokens or steps": 1 + self.history_tokens + written}

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return option_files.plain(self)
