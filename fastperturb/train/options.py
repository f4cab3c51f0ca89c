"""The options of `fastperturb train`, validated."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastperturb.config import TELESCOPES, PerturbConfig
from fastperturb.data.options import DataOptions
from fastperturb.runs import option_files

Method = Literal["exact", "neftune", "fixed", "discrete", "learned", "hybrid"]
EditKind = Literal["replace", "insert", "delete", "swap"]
EDITING = ("discrete", "hybrid")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The LoRA adapter that trains while the base model is frozen."""

    rank: int = 8
    """Rank of the LoRA matrices; 0 trains all weights of the base model instead of an adapter."""

    alpha: float = 16.0
    """Scale of the adapter: its output is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Dropout probability applied to the input of each LoRA layer."""

    targets: tuple[str, ...] = ("all-linear",)
    """Names, or ends of names, of the modules that get an adapter; all-linear means every linear
    layer except the head."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (full fine-tuning) or above, got {self.rank}")
        _require_positive("lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError("lora.targets must name at least one module, or all-linear")


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """The random edits of tokens of methods discrete and hybrid."""

    rate: float = 0.1
    """Probability that a token is edited."""

    kinds: tuple[EditKind, ...] = ("replace", "insert")
    """Kinds of edit to choose among, all equally likely: replace, insert, delete or swap."""

    neighbors: int = 10
    """Number of tokens with the nearest embeddings from which a replacement is drawn."""

    learn_rates: bool = False
    """Learn the rate of each kind of edit; together they start at rate."""

    rate_limits: tuple[float, float] = (0.01, 0.5)
    """Lowest and highest rate, of all kinds together, that learned rates can reach."""

    def __post_init__(self) -> None:
        _require_positive("edits.rate", self.rate)
        if self.rate > 1:
            raise ValueError(f"edits.rate must be a probability, at most 1, got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Train a causal language model on text, with a learned perturbation or a baseline method."""

    model: str
    """Base model to train: a folder or a Hugging Face hub id, with weights in safetensors."""

    output_dir: Path = Path("runs/train")
    """Folder for checkpoints, metrics.jsonl, the trained model, results.json and curves.png."""

    overwrite: bool = False
    """Start a new run in an output_dir that already holds files, and delete its checkpoints."""

    resume: Literal["never", "auto"] = "never"
    """auto: continue from the newest undamaged checkpoint of output_dir, or start a new run if
    there is none. never: always start a new run."""

    dry_run: bool = False
    """Print the options, the number of steps and an estimate of the memory, and write nothing."""

    tokenizer: str | None = None
    """Folder or Hugging Face hub id of the tokenizer; default: the one of the model."""

    trust_remote_code: bool = False
    """Allow Python code from the model's repository to run."""

    attn_implementation: str | None = None
    """Attention implementation of transformers, such as sdpa or flash_attention_2; default: the
    model's own."""

    method: Method = "learned"
    """Training method. learned: perturb embeddings by a transform that is trained too. fixed:
    isotropic noise of scale perturb.init_scale, with the same estimator. discrete: random edits of
    tokens, with the same estimator. hybrid: random edits of tokens, and then the transform of
    learned. neftune: one noise sample, in training only. exact: ordinary fine-tuning."""

    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    """The perturbation, and how its marginal likelihood is estimated."""

    edits: EditOptions = field(default_factory=EditOptions)
    """The edits of tokens; used only with methods discrete and hybrid."""

    neftune_alpha: float = 5.0
    """NEFTune's alpha: the noise of a block has a length of alpha / sqrt(3); used only with method
    neftune."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """The LoRA adapter that trains while the base model is frozen."""

    cross_fit: bool = False
    """Train the transform on one half of each batch and everything else on the other half."""

    epochs: int = 1
    """Number of passes over the data."""

    max_steps: int | None = None
    """Number of optimizer steps, which overrides epochs; required with streaming."""

    batch_size: int = 8
    """Number of blocks in one optimizer step, summed over all processes."""

    micro_batch_size: int | None = None
    """Number of blocks in one forward pass of a process, which accumulates gradients over several;
    default: its whole share of the batch."""

    learning_rate: float = 2e-4
    """Highest learning rate of the base model or its adapter."""

    transform_learning_rate: float | None = None
    """Highest learning rate of the transform; default: five times learning_rate."""

    weight_decay: float = 0.0
    """AdamW weight decay of the base model or its adapter, without biases and norms."""

    transform_weight_decay: float = 0.0
    """AdamW weight decay of the transform."""

    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises from 0, before it falls along a cosine
    to 0."""

    max_grad_norm: float | None = 1.0
    """Largest norm of the transform's gradient, and of that of all else: a longer one is scaled
    down to it. None turns clipping off, without which alone perturb.estimator sumo and mlmc are
    unbiased."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the computation. fp32: everything in 32 bits. bf16: autocast to bfloat16, with
    trained weights in 32 bits and a frozen base model in bfloat16."""

    gradient_checkpointing: bool = False
    """Save memory by computing the base model's activations again in the backward pass."""

    eval_data: tuple[str, ...] = ()
    """Held-out texts, given like data: their perplexity is reported, and the best model on them is
    kept in best/."""

    eval_split: str | None = None
    """Split of eval_data to read of a dataset that has several; default: the value of split."""

    eval_every: int = 100
    """Number of steps between evaluations; one also runs before the first step and after the
    last."""

    eval_samples: int = 32
    """Number of Monte-Carlo samples in an evaluation."""

    eval_blocks: int | None = None
    """Number of blocks to evaluate on, from the start of eval_data; default: all."""

    early_stop: int | None = None
    """Stop after this many evaluations in a row without a new best; default: never."""

    save_every: int = 100
    """Number of steps between checkpoints."""

    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to send metrics to, besides metrics.jsonl."""

    seed: int = 0
    """Random seed of the adapter, the transform, the order of the data, dropout and all noise."""

    device: Literal["cpu", "cuda"] | None = None
    """Device to train on; default: cuda where a GPU is available, else cpu."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Use of several processes, started by torchrun or accelerate launch. ddp: each holds the whole
    model. fsdp: the model is sharded over them."""

    mc: int = 1
    """Number of processes that split the Monte-Carlo samples of each batch among them; the number
    of all processes must be a multiple of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "eval_every", "eval_samples", "save_every", "keep"):
            _require_positive(name, getattr(self, name))
        for name in ("max_steps", "micro_batch_size", "eval_blocks", "early_stop"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name in ("learning_rate", "neftune_alpha", "mc"):
            _require_positive(name, getattr(self, name))
        for name in ("transform_learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name in ("weight_decay", "transform_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        self._check_method()
        self._check_evaluation()
        self._warn_of_telescopes()
        if self.perturbs_evaluation:
            self.perturb.warn_of_proposal(stacklevel=4)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction of the steps in [0, 1), got {self.warmup}")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming has no end of its own: give max_steps")
        if self.cross_fit and self.method != "learned":
            raise ValueError(f"cross_fit needs method='learned', got method={self.method!r}")
        if self.cross_fit and self.batch_size < 2:
            raise ValueError(
                f"cross_fit needs a batch_size of at least 2, to halve, got {self.batch_size}"
            )
        if self.resume == "auto" and self.overwrite:
            raise ValueError("overwrite starts anew and resume=auto continues: give one of them")
        for name in self.report_to:
            if find_spec(name) is None:
                raise ValueError(f"report_to {name} needs a package: pip install {name}")

    def _check_method(self) -> None:
        perturb = self.perturb
        if self.has_one_sample and self.mc > 1:
            option = "perturb.deterministic" if self.perturbs_evaluation else "method"
            value = True if self.perturbs_evaluation else self.method
            raise ValueError(
                f"mc={self.mc} splits samples, and {option}={value!r} has one: set mc to 1"
            )
        if not self.perturbs_evaluation:
            return
        if self.method in EDITING and perturb.proposal != "prior":
            raise ValueError(
                f"perturb.proposal={perturb.proposal!r} moves latents to where labels are likely "
                "in the text as it is, not after edits: leave it unset"
            )
        if self.method == "hybrid" and perturb.deterministic:
            raise ValueError(
                "perturb.deterministic=True has no randomness, and the edits of method='hybrid' "
                "have: use method='learned' or 'discrete'"
            )
        if self.method == "discrete" and perturb.sampling != "independent":
            raise ValueError(
                f"perturb.sampling={perturb.sampling!r} is of a latent z, and an edit has none: "
                "leave it unset"
            )
        if "jvi" in perturb.equations:
            raise ValueError("perturb.estimator='jvi' is for evaluation: train with 'jvi_clip'")
        resamples = "resample" in perturb.equations or perturb.plan == "resample"
        if resamples and self.lora.rank and self.lora.dropout:
            raise ValueError(
                "perturb.estimator='resample' runs the model twice, and lora.dropout would differ "
                f"between the two, got lora.dropout={self.lora.dropout}: set it to 0"
            )
        if perturb.marginal == "sequence" and self.packing == "documents":
            raise ValueError(
                "perturb.marginal='sequence' takes each batch row for one sequence, and "
                "packing='documents' puts several documents into one: set packing='stream'"
            )

    def _warn_of_telescopes(self) -> None:
        estimator, limit = self.perturb.estimator, self.max_grad_norm
        if estimator not in TELESCOPES or self.has_one_sample:
            return
        if limit is not None:
            warnings.warn(
                f"max_grad_norm={limit:g} clips the gradient of perturb.estimator={estimator!r}, "
                "which is unbiased only without it: set it to None for that, with many labels a "
                "step",
                stacklevel=4,
            )
            return
        is_of_tokens = self.perturb.marginal == "token"
        labels = self.batch_size * (self.block_size if is_of_tokens else 1)
        if labels < _FEW_LABELS:
            warnings.warn(
                f"the gradient of perturb.estimator={estimator!r} has a heavy tail, and a mean "
                f"over {labels} {'labels' if is_of_tokens else 'sequences'} leaves it heavy enough "
                f"to make training diverge: give a step {_FEW_LABELS} or more (batch_size), clip "
                "it (max_grad_norm), or use another estimator",
                stacklevel=4,
            )

    @property
    def perturbs_evaluation(self) -> bool:
        """True where the trained model is perturbed, and not only its training."""
        return self.method not in ("exact", "neftune")

    @property
    def has_one_sample(self) -> bool:
        """True where all samples of an evaluation would be the same."""
        is_deterministic = self.perturb.deterministic and self.method != "discrete"
        return is_deterministic or not self.perturbs_evaluation

    def _check_evaluation(self) -> None:
        if self.early_stop is not None and not self.eval_data:
            raise ValueError("early_stop needs eval_data to compare models on")
        shared = sorted(set(self.eval_data) & set(self.data))
        if shared and self.eval_split in (None, self.split):
            raise ValueError(f"eval_data {shared[0]!r} is trained on: give another, or eval_split")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return option_files.plain(self)

    def check_resumable(self, before: dict[str, Any], checkpoint: Path) -> None:
        """Raise ValueError on options that must stay in a resumed run; warn of others that changed.

        before: the `to_dict` of the run that wrote the checkpoint.
        """
        perturb = before["perturb"]
        if perturb["deterministic"] and perturb["scope"] == "token" and "sampling" not in perturb:
            raise ValueError(
                f"{checkpoint} is of an earlier version, in which perturb.deterministic=True was "
                "one latent for all tokens, as perturb.scope='sequence' has it today: start anew, "
                "in another output_dir or with overwrite"
            )
        before, now = _comparable(before), _comparable(self.to_dict())
        changed = {
            name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if name not in _RESULT_NEUTRAL and before.get(name) != now.get(name)
        }
        rejected = [text for name, text in changed.items() if name not in _CHANGEABLE]
        if rejected:
            raise ValueError(
                f"{checkpoint} is of a run with other options: {'; '.join(rejected)}. Give the "
                "same ones, or start anew: another output_dir, or overwrite"
            )
        if changed:
            warnings.warn(
                f"{checkpoint} goes on with other options: {'; '.join(changed.values())}",
                stacklevel=3,
            )


# With 64 labels a step, unclipped, 5 (sumo) and 10 (mlmc) of 30 trainings of the synthetic language
# diverged at M = 16, with 256 labels 0 and 3, and with 1024 none of mlmc.
_FEW_LABELS = 1024


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the keys of groups joined, such as perturb.plan."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _comparable(options: dict[str, Any]) -> dict[str, Any]:
    """Return flat options in today's words, from a run of this version or an earlier one.

    Options that came later have the value that stands for what was done before.
    """
    flat = {**_BEFORE_OPTIONS, **_flat(options)}
    if flat.pop("perturb.antithetic", False):
        flat["perturb.sampling"] = "antithetic"
    for name in ("rate", "kinds", "neighbors"):
        if f"edit_{name}" in flat:
            flat[f"edits.{name}"] = flat.pop(f"edit_{name}")
    if flat.get("method") not in EDITING:
        flat = {name: value for name, value in flat.items() if not name.startswith("edits.")}
    return flat


_BEFORE_OPTIONS = {
    "perturb.sampling": "independent",
    "perturb.group_size": None,
    "perturb.proposal": "prior",
    "perturb.proposal_steps": PerturbConfig.proposal_steps,
    "perturb.context_source": "embedding",
    "edits.learn_rates": False,
    "edits.rate_limits": [0.01, 0.5],
}

# Options that do not affect results, but for rounding and dropout, may change when a run
# continues. (data is checked by its content.)
_RESULT_NEUTRAL = (
    *("output_dir", "overwrite", "resume", "dry_run", "trust_remote_code", "save_every", "keep"),
    *("report_to", "device", "parallel", "mc", "micro_batch_size", "early_stop", "eval_every"),
    *("data", "attn_implementation", "gradient_checkpointing", "perturb.chunk_size"),
)
# These affect results and may change with a warning, in a run that went wrong or is to be longer.
_CHANGEABLE = (
    *("max_steps", "epochs", "learning_rate", "transform_learning_rate", "warmup"),
    *("max_grad_norm", "weight_decay", "transform_weight_decay", "perturb.plan"),
)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value}")
