"""The options of `fastperturb study`, and the runs that follow from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastperturb import estimators
from fastperturb.checkpoint.atomic import digest
from fastperturb.config import suggestion
from fastperturb.data.domains import DomainOptions
from fastperturb.runs import option_files
from fastperturb.train.options import TrainOptions

Overrides = Mapping[str, Any]
Control = Literal["learning_rate", "equal_compute", "deterministic"]

DEFAULT_METHODS: dict[str, dict[str, Any]] = {
    name: {"method": name} for name in ("exact", "neftune", "fixed", "discrete", "learned")
}
# Options of a training run that the study sets itself.
_RESERVED = ("output_dir", "overwrite", "resume", "dry_run", "seed", "report_to", "parallel", "mc")
# Options that methods must share to be comparable.
_SHARED = (
    *("model", "tokenizer", "data", "text_field", "split", "document_separator", "max_tokens"),
    *("eval_data", "eval_split", "eval_blocks", "block_size", "max_steps", "epochs"),
)
# Options that do not affect a run's results, except by rounding.
_WITHOUT_EFFECT = (
    *("output_dir", "overwrite", "resume", "dry_run", "report_to", "parallel", "mc"),
    *("device", "micro_batch_size", "save_every", "keep", "trust_remote_code"),
)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Train several methods on one domain, and compare them in and out of it with controls."""

    train: TrainOptions
    """Training options that all runs share; train.eval_data is the validation text, which chooses
    each run's best step, the baseline's learning rate, the temperatures and the method reported."""

    domains: dict[str, str]
    """Texts to evaluate on, by name; each is anything that `fastperturb eval` reads."""

    in_domain: str
    """Name of the domain whose text is of the same kind as the training text."""

    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(DEFAULT_METHODS))
    """Methods to compare, by name; each is a mapping of training options that replace the shared
    ones, such as {method: learned, perturb: {transform: mlp}}."""

    baseline: str = "exact"
    """Name of the method that others are compared with; it must leave no perturbation."""

    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the runs; every method is trained once with each."""

    learning_rate_factors: tuple[float, ...] = (0.5, 2.0)
    """Factors of the learning rate with which the baseline is trained too; its best rate counts."""

    noise_scale: float | None = None
    """Scale of the isotropic noise under which the baseline is also evaluated; the default is
    train.perturb.init_scale."""

    reading: DomainOptions = field(default_factory=DomainOptions)
    """Options for reading the texts of domains."""

    draws: int = 32
    """Number of Monte-Carlo samples that each probability is averaged over in evaluations."""

    tuning_draws: int = 8
    """Number of Monte-Carlo samples that are used while a temperature is tuned."""

    output_dir: Path = Path("runs/study")
    """Folder for runs, results.json, table.md and pictures; runs that it already holds are kept."""

    overwrite: bool = False
    """Delete the runs of another study in output_dir and start anew."""

    workers: int | None = None
    """Number of runs to train at a time, one thread each; default: one per core, one on a GPU."""

    def __post_init__(self) -> None:
        train = self.train
        if not train.eval_data:
            raise ValueError(
                "train.eval_data must name the validation text, which chooses steps, rates and "
                "temperatures"
            )
        if train.streaming:
            raise ValueError(
                "train.streaming must be off: a study counts the tokens of its training text"
            )
        for name in _RESERVED:
            value = getattr(train, name)
            if value != _default(name):
                raise ValueError(
                    f"train.{name}={value!r}: a study sets it for each run; leave it out"
                )
        if self.in_domain not in self.domains:
            raise ValueError(
                f"in_domain must be one of domains {list(self.domains)}, got {self.in_domain!r}"
            )
        if len(self.domains) < 2:
            raise ValueError(
                "domains must hold at least one besides in_domain, to extrapolate to, got "
                f"{list(self.domains)}"
            )
        if self.baseline not in self.methods:
            raise ValueError(
                f"baseline must be one of methods {list(self.methods)}, got {self.baseline!r}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be one or more different ints >= 0, got {self.seeds}")
        if 1.0 in self.learning_rate_factors or any(f <= 0 for f in self.learning_rate_factors):
            raise ValueError(
                "learning_rate_factors must be numbers above 0 other than 1, which always runs; "
                f"got {self.learning_rate_factors}"
            )
        if self.draws < 2 or self.tuning_draws < 2:
            raise ValueError(
                "draws and tuning_draws must be at least 2 to show a marginal, "
                f"got {self.draws} and {self.tuning_draws}"
            )
        for name in ("workers", "noise_scale"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, where in self.domains.items():
            if where in (*train.data, *train.eval_data) and self.reading.split in (
                train.split,
                train.eval_split or train.split,
            ):
                raise ValueError(
                    f"domains.{name} {where!r} is the training or the validation text: give a text "
                    "of its own"
                )
        for package in ("matplotlib", "scipy"):
            if find_spec(package) is None:
                raise ValueError(
                    f"a study needs the package {package}: pip install 'fastperturb[eval]'"
                )
        if self.options_of(self.methods[self.baseline], "baseline").perturbs_evaluation:
            raise ValueError(
                f"baseline {self.baseline!r} is perturbed after its training: choose a method that "
                "is not, such as exact or neftune"
            )
        planned_runs(self)  # checks the options of every run before the first begins

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return option_files.plain(self)

    def options_of(self, overrides: Overrides, name: str) -> TrainOptions:
        """Return the shared training options with these replaced; `name` is for messages."""
        shared = self.train.to_dict()
        fields = {option.name for option in dataclasses.fields(TrainOptions)}
        for key in overrides:
            if key in (*_RESERVED, *_SHARED):
                raise ValueError(
                    f"methods.{name}.{key}: all runs of a study share it; set it there"
                )
            if key not in fields:
                raise ValueError(f"methods.{name}: no option {key!r}{suggestion(key, fields)}")
        return option_files.from_mapping(_merged(shared, overrides), TrainOptions, f"method {name}")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One training of one method or control with one seed."""

    method: str
    options: TrainOptions
    control: Control | None = None
    of: str | None = None  # for a control, the method that it is a control of

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def learned(self) -> bool:
        """True for a learned perturbation; a deterministic transform is none."""
        return self.options.method == "learned" and not self.options.perturb.deterministic

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def key(self) -> str:
        """A name that is the same for runs with the same results."""
        return digest(defining_options(self.options))[:16]

    @property
    def num_samples(self) -> float:
        """Samples of the text that a step trains on, the mean number for sumo and mlmc."""
        if self.options.has_one_sample:
            return 1
        return estimators.expected_samples(self.options.perturb)


def defining_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options that a run's results depend on."""
    return {name: value for name, value in options.to_dict().items() if name not in _WITHOUT_EFFECT}


def planned_runs(study: StudyOptions) -> list[StudyRun]:
    """Return the runs of every method and every control, for every seed."""
    return [run for seed in study.seeds for run in _runs_of_seed(study, seed)]


def _runs_of_seed(study: StudyOptions, seed: int) -> list[StudyRun]:
    methods = {
        name: dataclasses.replace(study.options_of(overrides, name), seed=seed)
        for name, overrides in study.methods.items()
    }
    method_runs = [StudyRun(method=name, options=options) for name, options in methods.items()]
    runs = list(method_runs)
    baseline = methods[study.baseline]
    for factor in study.learning_rate_factors:
        options = dataclasses.replace(baseline, learning_rate=factor * baseline.learning_rate)
        name = f"{study.baseline}, rate x {factor:g}"
        runs.append(
            StudyRun(method=name, options=options, control="learning_rate", of=study.baseline)
        )
    for num_samples in sorted({run.num_samples for run in method_runs} - {1}):
        options = _lengthened(baseline, num_samples)
        name = f"{study.baseline}, compute x {num_samples:.3g}"
        runs.append(
            StudyRun(method=name, options=options, control="equal_compute", of=study.baseline)
        )
    for run in method_runs:
        if run.learned:
            twin, held = f"{run.method}, deterministic", _deterministic(run.options)
            runs.append(StudyRun(method=twin, options=held, control="deterministic", of=run.method))
    return runs


def _lengthened(options: TrainOptions, factor: float) -> TrainOptions:
    """Return options with `factor` times as many steps, rounded up, evaluated as often."""

    def times(count: int | None) -> int | None:
        return None if count is None else math.ceil(factor * count)

    longer = dataclasses.replace(options, early_stop=times(options.early_stop))
    if options.max_steps is None:
        return dataclasses.replace(longer, epochs=math.ceil(factor * options.epochs))
    return dataclasses.replace(longer, max_steps=times(options.max_steps))


def _deterministic(options: TrainOptions) -> TrainOptions:
    """Return options with the same transform at one fixed z.

    Options of sampling take their defaults: they have no effect, and must not change the run's key.
    """
    perturb = options.perturb
    held = dataclasses.replace(
        type(perturb)(),
        transform=perturb.transform,
        latent=perturb.latent,
        latent_dim=perturb.latent_dim,
        hidden_dim=perturb.hidden_dim,
        init_scale=perturb.init_scale,
        min_scale=perturb.min_scale,
        deterministic=True,
    )
    return dataclasses.replace(options, perturb=held)


def _merged(shared: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return `shared` with `overrides` applied, group by group."""
    merged = dict(shared)
    for key, value in overrides.items():
        grouped = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if grouped and key != "estimator" else value
    return merged


def _default(name: str) -> Any:
    [option] = [field for field in dataclasses.fields(TrainOptions) if field.name == name]
    return option.default
