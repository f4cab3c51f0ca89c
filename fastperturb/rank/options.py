"""What a rank study is told: the options of `fastperturb rank`, validated."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastperturb.data.domains import TextOptions
from fastperturb.eval.options import named
from fastperturb.runs import option_files


@dataclass(frozen=True, kw_only=True)
class RankOptions(TextOptions):
    """Measure the logit rank of models, and write by combinations of other prompts."""

    models: tuple[str, ...]
    """NAME=WHERE, or WHERE alone: a folder that train or save_pretrained wrote, or a plain model,
    by its folder or Hugging Face id, which is asked on exact prefixes."""

    text: str
    """Where histories and futures come from: all that train reads, or a text that eval knows."""

    base: str | None = None
    """What checkpoints were saved over, where that has moved: a folder or an id."""

    trust_remote_code: bool = False
    """Run code that a model's repository brings."""

    histories: int = 256
    """Rows of the matrix: pieces of the text that share no token."""

    history_tokens: int = 32
    """How long they are."""

    futures: int = 32
    """Other pieces of the text, whose prefixes, all of them, are the futures of the matrix."""

    future_tokens: int = 8
    """How long these pieces are."""

    top_k: int | None = 1024
    """Columns a future: so many of its likeliest tokens by the first model, or all, if there are
    fewer."""

    num_samples: int = 32
    """Draws of the noise, of which a perturbed model's law is the mean."""

    targets: int = 16
    """Prompts of documents that give no history, each written on by a linear combination of the
    histories; 0: none. It takes many histories to be close: a thousand, say."""

    steps: int = 15
    """How many tokens are written on."""

    continuations: int = 4
    """How often, from each target, for the comparison with the model itself."""

    earlier: str | None = None
    """An earlier checkpoint of the first model, compared with its combinations."""

    batch_tokens: int = 8192
    """About how many tokens a pass holds."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 holds the base in bf16 and computes under autocast."""

    seed: int = 0
    """Of pieces, noise, continuations and intervals."""

    device: Literal["cpu", "cuda"] | None = None
    """Default: cuda where there is one."""

    output_dir: Path = Path("runs/rank")
    """Where results.json, table.md, spectrum.png and generation.png go."""

    overwrite: bool = False
    """Let output_dir be a folder that already holds files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named("models", self.models)
        least = {
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
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.targets == 1:
            raise ValueError("targets must be 0, or at least 2 to have an interval, got 1")
        if self.earlier is not None and not self.targets:
            raise ValueError("earlier is compared on targets: say how many")
        for package in ("matplotlib", "scipy"):
            if find_spec(package) is None:
                raise ValueError(
                    f"rank needs the package {package}: pip install 'fastperturb[rank]'"
                )

    @property
    def lengths(self) -> dict[str, int]:
        """How long a text gets, by the options that make it so."""
        after = max(self.future_tokens, self.steps)
        return {"history_tokens + future_tokens or steps": 1 + self.history_tokens + after}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return option_files.plain(self)
