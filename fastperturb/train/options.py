"""What a training run is told: the options of `fastperturb train`, validated."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastperturb.config import PerturbConfig
from fastperturb.train.data import DataOptions

Method = Literal["exact", "neftune", "fixed", "discrete", "learned"]


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

    max_grad_norm: float = 1.0
    """Longer gradients are clipped to it."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast and holds a frozen base in bf16; what trains stays fp32."""

    gradient_checkpointing: bool = False
    """The base computes its activations again in the backward."""

    eval_data: tuple[str, ...] = ()
    """Read as data is; marginal perplexity on it is reported, and the best model kept in best/."""

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
        for name in ("learning_rate", "max_grad_norm", "edit_rate", "neftune_alpha", "mc"):
            _require_positive(name, getattr(self, name))
        if self.transform_learning_rate is not None:
            _require_positive("transform_learning_rate", self.transform_learning_rate)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the steps in [0, 1), got {self.warmup}")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming has no end of its own: give max_steps")
        if self.early_stop is not None and not self.eval_data:
            raise ValueError("early_stop needs eval_data to judge by")
        if self.cross_fit and self.method != "learned":
            raise ValueError(f"cross_fit is for method='learned', got method={self.method!r}")
        if self.cross_fit and self.batch_size < 2:
            raise ValueError(f"cross_fit halves each batch: batch_size is {self.batch_size}")
        if self.resume == "auto" and self.overwrite:
            raise ValueError("overwrite starts anew and resume=auto continues: give one of them")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    def refuse_changes(self, before: dict[str, Any], checkpoint: Path) -> None:
        """Refuse to continue a run that was another one."""
        now = self.to_dict()
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if name not in _FREE_ON_RESUME and before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{checkpoint} is of a run with other options: {'; '.join(changed)}. Give the "
                "same ones, or start anew: another output_dir, or overwrite"
            )


# These may change when a run continues: they do not enter its numbers beyond rounding.
_FREE_ON_RESUME = (
    *("output_dir", "overwrite", "resume", "dry_run", "trust_remote_code", "save_every", "keep"),
    *("report_to", "device", "parallel", "mc", "micro_batch_size", "early_stop"),
)


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
