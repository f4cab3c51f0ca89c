"""What a study is told, and the runs that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

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
# What a study decides itself, for each run.
_RESERVED = ("output_dir", "overwrite", "resume", "dry_run", "seed", "report_to", "parallel", "mc")
# What methods must share to be compared.
_SHARED = (
    *("model", "tokenizer", "data", "text_field", "split", "document_separator", "max_tokens"),
    *("eval_data", "eval_split", "eval_blocks", "block_size", "max_steps", "epochs"),
)
# What a run's outcome does not depend on, but for rounding.
_INCIDENTAL = (
    *("output_dir", "overwrite", "resume", "dry_run", "report_to", "parallel", "mc"),
    *("device", "micro_batch_size", "save_every", "keep", "trust_remote_code"),
)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Train every method alike, judge all of them in and out of domain, and say who gained."""

    train: TrainOptions
    """What all runs share. Its eval_data is the validation text: it chooses each run's best step,
    the baseline's learning rate, every temperature, and the configuration that counts."""

    domains: dict[str, str]
    """Texts to judge by, by name: all that `fastperturb eval` reads."""

    in_domain: str
    """Which of the domains is of the kind that is trained on."""

    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(DEFAULT_METHODS))
    """By name, what sets a method apart: options of `fastperturb train`, which replace the shared
    ones, as {method: learned, perturb: {transform: mlp}}."""

    baseline: str = "exact"
    """The method that the others are compared with; no perturbation is left after its training."""

    seeds: tuple[int, ...] = (0, 1)
    """Of the runs; each method is trained with each."""

    learning_rate_factors: tuple[float, ...] = (0.5, 2.0)
    """The baseline is also trained at its learning rate times these, and the best one counts."""

    noise_scale: float | None = None
    """Of the isotropic noise that the baseline is also judged under; default
    train.perturb.init_scale."""

    reading: DomainOptions = field(default_factory=DomainOptions)
    """How the domains are read."""

    draws: int = 32
    """Of each judgement."""

    tuning_draws: int = 8
    """Of the choice of a temperature."""

    output_dir: Path = Path("runs/study")
    """Where runs, results.json, table.md and pictures go; what is finished there is kept."""

    overwrite: bool = False
    """Start anew in a folder that holds another study."""

    workers: int | None = None
    """Processes of one thread each; default: one a core, and on a GPU one."""

    def __post_init__(self) -> None:
        train = self.train
        if not train.eval_data:
            raise ValueError("train.eval_data must name the validation text, which chooses")
        if train.streaming:
            raise ValueError("train.streaming: a study counts its training text, so map it")
        for name in _RESERVED:
            given = getattr(train, name)
            if given != _default(name):
                raise ValueError(f"train.{name}={given!r}: a study sets it for each run; leave it")
        if self.in_domain not in self.domains:
            raise ValueError(
                f"in_domain must be one of domains {list(self.domains)}, got {self.in_domain!r}"
            )
        if len(self.domains) < 2:
            raise ValueError("domains must hold one that is not in_domain, to extrapolate to")
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
                    f"domains.{name} {where!r} is trained on, or chooses: give a text of its own"
                )
        for package in ("matplotlib", "scipy"):
            if find_spec(package) is None:
                raise ValueError(
                    f"a study needs the package {package}: pip install 'fastperturb[eval]'"
                )
        if self.options_of(self.methods[self.baseline], "baseline").perturbs_evaluation:
            raise ValueError(f"baseline {self.baseline!r} is perturbed after its training too")
        runs_of(self)  # every run's options are checked before the first begins

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return option_files.plain(self)

    def options_of(self, overrides: Overrides, name: str) -> TrainOptions:
        """The shared options with these replaced."""
        shared = self.train.to_dict()
        fields = {each.name for each in dataclasses.fields(TrainOptions)}
        for key in overrides:
            if key in (*_RESERVED, *_SHARED):
                raise ValueError(
                    f"methods.{name}.{key}: all runs of a study share it; set it there"
                )
            if key not in fields:
                raise ValueError(f"methods.{name}: no option {key!r}{suggestion(key, fields)}")
        return option_files.from_mapping(_merged(shared, overrides), TrainOptions, f"method {name}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of one method, and what it is there for."""

    method: str
    options: TrainOptions
    control: Control | None = None
    of: str | None = None  # a control: of which method

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def learned(self) -> bool:
        """Whether it has a learned perturbation, which a deterministic transform is not."""
        return self.options.method == "learned" and not self.options.perturb.deterministic

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The same for runs that would be the same."""
        return digest(essence(self.options))[:16]

    @property
    def draws(self) -> int:
        """How many copies of the text a step trains on."""
        return 1 if self.options.has_one_sample else self.options.perturb.num_samples


def essence(options: TrainOptions) -> dict[str, Any]:
    """What a run's outcome depends on, texts by where they lie."""
    return {name: told for name, told in options.to_dict().items() if name not in _INCIDENTAL}


def runs_of(study: StudyOptions) -> list[Run]:
    """Every method and every control, for every seed."""
    return [run for seed in study.seeds for run in _runs_of_seed(study, seed)]


def _runs_of_seed(study: StudyOptions, seed: int) -> list[Run]:
    methods = {
        name: dataclasses.replace(study.options_of(overrides, name), seed=seed)
        for name, overrides in study.methods.items()
    }
    of_methods = [Run(method=name, options=options) for name, options in methods.items()]
    runs = list(of_methods)
    own = methods[study.baseline]
    for factor in study.learning_rate_factors:
        options = dataclasses.replace(own, learning_rate=factor * own.learning_rate)
        name = f"{study.baseline}, rate x {factor:g}"
        runs.append(Run(method=name, options=options, control="learning_rate", of=study.baseline))
    for draws in sorted({run.draws for run in of_methods} - {1}):
        options = _lengthened(own, draws)
        name = f"{study.baseline}, compute x {draws}"
        runs.append(Run(method=name, options=options, control="equal_compute", of=study.baseline))
    for run in of_methods:
        if run.learned:
            twin, held = f"{run.method}, deterministic", _deterministic(run.options)
            runs.append(Run(method=twin, options=held, control="deterministic", of=run.method))
    return runs


def _lengthened(options: TrainOptions, factor: int) -> TrainOptions:
    """As many times the steps; the validation text chooses among them, as ever."""
    patience = None if options.early_stop is None else factor * options.early_stop
    longer = dataclasses.replace(options, early_stop=patience)
    if options.max_steps is None:
        return dataclasses.replace(longer, epochs=factor * options.epochs)
    return dataclasses.replace(longer, max_steps=factor * options.max_steps)


def _deterministic(options: TrainOptions) -> TrainOptions:
    """The same parameters with z held; what is about draws as by default, without effect."""
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
    """`shared` with `overrides`, group by group."""
    merged = dict(shared)
    for key, value in overrides.items():
        grouped = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if grouped and key != "estimator" else value
    return merged


def _default(name: str) -> Any:
    [found] = [each for each in dataclasses.fields(TrainOptions) if each.name == name]
    return found.default
