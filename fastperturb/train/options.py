"""What a training run is told: the options of `fastperturb train`, validated."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastperturb.config import PerturbConfig
from fastperturb.data.options import DataOptions
from fastperturb.runs import option_files

Method = Literal["exact", "neftune", "fixed", "discrete", "learned"]
EditKind = Literal["replace", "insert", "delete", "swap"]


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The adapter that trains while the base is frozen."""

    rank: int = 8
    """Its rank; 0 trains all weights of the base instead."""

    alpha: float = 16.0
    """Its scale, over the rank."""

    dropout: float = 0.0
    """Of its input."""

    targets: tuple[str, ...] = ("all-linear",)
    """Modules it adapts, by the ends of their names; all-linear is every layer but the head."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (full fine-tuning) or above, got {self.rank}")
        _require_positive("lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError("lora.targets must name at least one module, or all-linear")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Adapt a causal language model to text, by learned perturbation or a baseline."""

    model: str
    """A folder or a Hugging Face id; safetensors only."""

    output_dir: Path = Path("runs/train")
    """Where checkpoints, metrics, the model, results.json and curves.png go."""

    overwrite: bool = False
    """Start anew in a folder that already holds files; its checkpoints are deleted."""

    resume: Literal["never", "auto"] = "never"
    """auto continues from the newest whole checkpoint of output_dir, or starts without one."""

    dry_run: bool = False
    """Say what would run, and the memory it would take; write nothing."""

    tokenizer: str | None = None
    """A folder or id; default: the model's."""

    trust_remote_code: bool = False
    """Run code that the model's repository brings."""

    attn_implementation: str | None = None
    """As transformers takes it: sdpa, flash_attention_2, ..."""

    method: Method = "learned"
    """learned: the transform trains too. fixed: isotropic noise of perturb.init_scale under the
    same equation. discrete: random edits of the prefix. neftune: noise in training only, one
    draw. exact: no perturbation."""

    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    """The transform, its noise and the estimating equation (fixed and discrete: what applies)."""

    edit_rate: float = 0.1
    """discrete: the share of tokens that a draw edits."""

    edit_kinds: tuple[EditKind, ...] = ("replace", "insert", "delete", "swap")
    """discrete: how, each kind as likely as the others."""

    edit_neighbors: int = 10
    """discrete: a token is replaced by one of so many whose embeddings are nearest."""

    neftune_alpha: float = 5.0
    """neftune: noise of length alpha / sqrt(3) for each sequence."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """The adapter."""

    cross_fit: bool = False
    """Fit the transform on one half of each batch, everything else on the other."""

    epochs: int = 1
    """Passes over the data."""

    max_steps: int | None = None
    """Optimizer steps, instead of epochs; needed when streaming."""

    batch_size: int = 8
    """Blocks a step, over all processes."""

    micro_batch_size: int | None = None
    """Blocks a forward in one process, the gradients accumulated; default: all of its share."""

    learning_rate: float = 2e-4
    """At its peak, of the base or its adapter."""

    transform_learning_rate: float | None = None
    """Default: five times learning_rate."""

    weight_decay: float = 0.0
    """AdamW's, of the base or its adapter."""

    transform_weight_decay: float = 0.0
    """AdamW's, of the transform."""

    warmup: float = 0.05
    """The share of the steps in which the rate rises, before it falls along a cosine to 0."""

    max_grad_norm: float | None = 1.0
    """Longer gradients are clipped to it; None clips none."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast and holds a frozen base in bf16; what trains stays fp32."""

    gradient_checkpointing: bool = False
    """The base computes its activations again in the backward."""

    eval_data: tuple[str, ...] = ()
    """Read as data is; marginal perplexity on it is reported, and the best model kept in best/."""

    eval_split: str | None = None
    """Of a dataset that has several; default: split."""

    eval_every: int = 100
    """Steps between evaluations, which also come before the first step and after the last."""

    eval_samples: int = 32
    """Draws of an evaluation."""

    eval_blocks: int | None = None
    """Evaluate on the first so many blocks only."""

    early_stop: int | None = None
    """Stop when so many evaluations in a row brought nothing better."""

    save_every: int = 100
    """Steps between checkpoints."""

    keep: int = 2
    """How many checkpoints to keep."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl."""

    seed: int = 0
    """Of the adapter, the transform, the order of the data and all noise."""

    device: Literal["cpu", "cuda"] | None = None
    """Default: cuda where there is one."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How processes of torchrun or accelerate launch divide the work; fsdp shards the model."""

    mc: int = 1
    """Processes that share the samples of one batch, instead of each taking blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "eval_every", "eval_samples", "save_every", "keep"):
            _require_positive(name, getattr(self, name))
        for name in ("max_steps", "micro_batch_size", "eval_blocks", "early_stop"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name in ("learning_rate", "edit_rate", "neftune_alpha", "mc"):
            _require_positive(name, getattr(self, name))
        for name in ("transform_learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name in ("weight_decay", "transform_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        self._check_method()
        self._check_evaluation()
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the steps in [0, 1), got {self.warmup}")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming has no end of its own: give max_steps")
        if self.cross_fit and self.method != "learned":
            raise ValueError(f"cross_fit is for method='learned', got method={self.method!r}")
        if self.cross_fit and self.batch_size < 2:
            raise ValueError(f"cross_fit halves each batch: batch_size is {self.batch_size}")
        if self.resume == "auto" and self.overwrite:
            raise ValueError("overwrite starts anew and resume=auto continues: give one of them")
        for name in self.report_to:
            if find_spec(name) is None:
                raise ValueError(f"report_to {name} needs a package: pip install {name}")

    def _check_method(self) -> None:
        perturb = self.perturb
        if self.has_one_draw and self.mc > 1:
            what = "perturb.deterministic" if self.is_noisy else f"method={self.method!r}"
            raise ValueError(f"mc={self.mc} splits draws, and {what} has one")
        if not self.is_noisy:
            return
        if self.edit_rate > 1:
            raise ValueError(f"edit_rate is a share of the tokens, got {self.edit_rate}")
        if self.method == "discrete" and perturb.antithetic:
            raise ValueError("perturb.antithetic=True: an edit has no mirror image")
        if "jvi" in perturb.equations:
            raise ValueError("perturb.estimator='jvi' is for evaluation: train with 'jvi_clip'")
        resampled = "resample" in perturb.equations or perturb.plan == "resample"
        if resampled and self.lora.rank and self.lora.dropout:
            raise ValueError(
                "perturb.estimator='resample' runs the model twice, and lora.dropout would differ "
                "between: set it to 0"
            )
        if perturb.marginal == "sequence" and self.packing == "documents":
            raise ValueError(
                "perturb.marginal='sequence' is of a row's sequence, and packing='documents' lays "
                "several into one: set packing='stream', by which a block is one sequence"
            )

    @property
    def is_noisy(self) -> bool:
        """Whether the model is still perturbed after training."""
        return self.method not in ("exact", "neftune")

    @property
    def has_one_draw(self) -> bool:
        """Whether all draws of an evaluation would be the same."""
        held = self.perturb.deterministic and self.method != "discrete"
        return held or not self.is_noisy

    def _check_evaluation(self) -> None:
        if self.early_stop is not None and not self.eval_data:
            raise ValueError("early_stop needs eval_data to judge by")
        again = sorted(set(self.eval_data) & set(self.data))
        if again and self.eval_split in (None, self.split):
            raise ValueError(f"eval_data {again[0]!r} is trained on: give another, or eval_split")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return option_files.plain(self)

    def refuse_changes(self, before: dict[str, Any], checkpoint: Path) -> None:
        """Refuse to continue a run that was another one, and warn of a new course."""
        before, now = _flat(before), _flat(self.to_dict())
        changed = {
            name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if name not in _SAME_NUMBERS and before.get(name) != now.get(name)
        }
        refused = [said for name, said in changed.items() if name not in _ANOTHER_COURSE]
        if refused:
            raise ValueError(
                f"{checkpoint} is of a run with other options: {'; '.join(refused)}. Give the "
                "same ones, or start anew: another output_dir, or overwrite"
            )
        if changed:
            warnings.warn(
                f"{checkpoint} goes on with other options: {'; '.join(changed.values())}",
                stacklevel=3,
            )


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """With the keys of groups as perturb.plan."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = value if isinstance(value, dict) else {None: value}
        flat |= {name if key is None else f"{name}.{key}": each for key, each in inner.items()}
    return flat


# These may change when a run continues: but for rounding and dropout they do not enter its
# numbers, or what they name is known again by its content.
_SAME_NUMBERS = (
    *("output_dir", "overwrite", "resume", "dry_run", "trust_remote_code", "save_every", "keep"),
    *("report_to", "device", "parallel", "mc", "micro_batch_size", "early_stop", "eval_every"),
    *("data", "attn_implementation", "gradient_checkpointing", "perturb.chunk_size"),
)
# These may too, for a run that went wrong or is to go further, with a word about it.
_ANOTHER_COURSE = (
    *("max_steps", "epochs", "learning_rate", "transform_learning_rate", "warmup"),
    *("max_grad_norm", "weight_decay", "transform_weight_decay", "perturb.plan"),
)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value}")
