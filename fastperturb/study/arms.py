"""A study's arms, read from its results, and the difference between two arms.

An arm is a group of runs that differ in nothing but their seed. Every arm is measured in several
forms: a view (as trained, without its noise, with noise added at evaluation), at temperature 1 or
at a temperature tuned on in-domain validation text ("tempered").
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastperturb.eval.likelihood import Likelihood
from fastperturb.report import bootstrap
from fastperturb.report.bootstrap import DocumentSums

Form = tuple[str, bool]  # the view, and True for tempered
Seed = int | None  # None: the same under every seed, such as the model before training
Cell = Mapping[str, Any]  # one run with its measurements, as results.json holds it

AS_TRAINED, TEMPERED = ("as_trained", False), ("as_trained", True)


@dataclass(frozen=True)
class SeedLikelihoods:
    """The likelihood of every domain under an arm in one form, for each seed."""

    temperature: float  # mean over seeds
    by_seed: Mapping[Seed, Mapping[str, Likelihood]]

    def nll(self, domains: Iterable[str]) -> float:
        """Return the nll per token, as the mean over domains and over seeds."""
        return statistics.fmean(
            statistics.fmean(likelihoods[name].nll for name in domains)
            for likelihoods in self.by_seed.values()
        )


@dataclass(frozen=True)
class NllDifference:
    """Our nll per token minus theirs: below 0 ours predicts better.

    low, high: 95% bootstrap interval, resampling documents.
    spread: sample standard deviation, over seeds, of each seed's own difference.
    """

    mean: float
    low: float
    high: float
    spread: float | None  # None for a single seed
    seeds: int


@dataclass(frozen=True)
class Arm:
    """The runs of one method or control, one for each seed, and their likelihoods by form.

    control, of: for a control, its kind and the method that it is a control of.
    """

    method: str
    role: str
    control: str | None
    of: str | None
    cells: Mapping[Seed, Cell]
    forms: Mapping[Form, SeedLikelihoods]

    def mean(self, fact: str) -> float:
        """Return the mean over seeds of a number that every cell holds."""
        return statistics.fmean(cell[fact] for cell in self.cells.values())

    @property
    def rates(self) -> list[float]:
        """The learning rate of every seed."""
        return [float(cell["learning_rate"]) for cell in self.cells.values()]

    @property
    def learned(self) -> bool:
        """True for a learned perturbation."""
        return any(cell["learned"] for cell in self.cells.values())

    @property
    def validation_nll(self) -> float:
        """Mean over seeds of the tempered nll on the validation text, at the study's samples."""
        return statistics.fmean(
            measurement["validation_nll"]
            for cell in self.cells.values()
            for measurement in cell["measurements"]
            if (measurement["view"], measurement["tuned"]) == TEMPERED
        )

    @property
    def is_random(self) -> bool:
        """True where prefixes are perturbed at random after training too."""
        return any(
            likelihood.num_samples > 1
            for likelihoods in self.forms[AS_TRAINED].by_seed.values()
            for likelihood in likelihoods.values()
        )


@dataclass(frozen=True)
class Arms:
    """All arms of a study.

    baseline: for each seed, at the learning rate that validation prefers.
    rates: the baseline's method at each learning rate.
    controls: the baseline at equal compute, and deterministic transforms.
    base: the model before training. unigram: token frequencies, by the text they were counted on.
    """

    in_domain: str
    out_of_domain: Sequence[str]
    baseline: Arm
    rates: Sequence[Arm]
    methods: Sequence[Arm]
    controls: Sequence[Arm]
    base: Mapping[Form, SeedLikelihoods]
    unigram: Mapping[str, SeedLikelihoods]

    @property
    def domains(self) -> list[str]:
        return [self.in_domain, *self.out_of_domain]

    @property
    def chosen(self) -> Arm | None:
        """The learned method that in-domain validation prefers, tempered."""
        learned = [arm for arm in self.methods if arm.learned]
        return min(learned, key=lambda arm: (arm.validation_nll, arm.method), default=None)


def read(results: Mapping[str, Any]) -> Arms:
    """Return the arms of a study's results.json; the order of its cells does not matter."""
    in_domain = results["in_domain"]
    others = [name for name in results["domains"] if name != in_domain]
    if not others:
        raise ValueError(f"domains must name one besides in_domain={in_domain!r}, got only that")
    cells = results["cells"]
    baseline_cells = [cell for cell in cells if _is_baseline(cell)]
    if not baseline_cells:
        raise ValueError(f"cells must hold the baseline {results['baseline']!r}, got none of it")
    rest = [cell for cell in cells if not _is_baseline(cell)]
    trained = [_arm(group) for group in _grouped(rest, "method", "control", "of")]
    return Arms(
        in_domain=in_domain,
        out_of_domain=others,
        baseline=replace(
            _arm(baseline_cells),
            method=results["baseline"],
            role="baseline",
            control=None,
            of=None,
        ),
        rates=[_arm(group) for group in _grouped(baseline_cells, "learning_rate")],
        methods=[arm for arm in trained if arm.role == "method"],
        controls=[arm for arm in trained if arm.role == "control"],
        base=_forms({None: {"measurements": results["base"]}}),
        unigram={
            text: SeedLikelihoods(1.0, {None: _likelihoods(domains)})
            for text, domains in results["unigram"].items()
        },
    )


def difference(
    ours: SeedLikelihoods, theirs: SeedLikelihoods, domains: Sequence[str]
) -> NllDifference | None:
    """Return the mean difference over domains, paired by seed and by document.

    Seeds are averaged before documents are resampled: seeds are not data. The result is None where
    the two share no seed.
    """
    pairs = _seed_pairs(ours.by_seed, theirs.by_seed)
    if not pairs:
        return None
    by_seed = [statistics.fmean(a[name].nll - b[name].nll for name in domains) for a, b in pairs]
    averages = [
        (_mean_sums([a[name] for a, _ in pairs]), _mean_sums([b[name] for _, b in pairs]))
        for name in domains
    ]
    interval = bootstrap.mean_paired_difference(averages)
    return NllDifference(
        mean=statistics.fmean(by_seed),
        low=interval.low,
        high=interval.high,
        spread=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        seeds=len(by_seed),
    )


def _seed_pairs(
    ours: Mapping[Seed, Mapping[str, Likelihood]], theirs: Mapping[Seed, Mapping[str, Likelihood]]
) -> list[tuple[Mapping[str, Likelihood], Mapping[str, Likelihood]]]:
    """Pair the likelihoods of every seed in both; those under None stand for every seed."""
    seeds = sorted({seed for seed in {*ours, *theirs} if seed is not None})
    pairs = [(ours.get(s, ours.get(None)), theirs.get(s, theirs.get(None))) for s in seeds]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _mean_sums(likelihoods: Sequence[Likelihood]) -> DocumentSums:
    """Return the mean over seeds of each document's summed nll."""
    by_document = zip(*(likelihood.nll_sums for likelihood in likelihoods), strict=True)
    return DocumentSums([statistics.fmean(sums) for sums in by_document], likelihoods[0].counts)


def _is_baseline(cell: Cell) -> bool:
    return cell["role"] == "baseline" or cell["control"] == "learning_rate"


def _grouped(cells: Sequence[Cell], *facts: str) -> list[list[Cell]]:
    """Group the cells that agree in these facts, and sort the groups by them."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[fact] for fact in facts), []).append(cell)
    keys = sorted(groups, key=lambda key: tuple((value is not None, value) for value in key))
    return [groups[key] for key in keys]


def _arm(cells: Sequence[Cell]) -> Arm:
    """Make an arm; of several cells of one seed it takes the rate that validation prefers."""
    by_seed: dict[Seed, Cell] = {}
    for cell in sorted(cells, key=lambda cell: (cell["validation_nll"], cell["learning_rate"])):
        by_seed.setdefault(cell["seed"], cell)
    chosen = dict(sorted(by_seed.items()))
    first = cells[0]
    return Arm(
        method=first["method"],
        role=first["role"],
        control=first["control"],
        of=first["of"],
        cells=chosen,
        forms=_forms(chosen),
    )


def _forms(cells: Mapping[Seed, Cell]) -> dict[Form, SeedLikelihoods]:
    temperatures: dict[Form, list[float]] = {}
    by_form: dict[Form, dict[Seed, Mapping[str, Likelihood]]] = {}
    for seed, cell in cells.items():
        for measurement in cell["measurements"]:
            form = (measurement["view"], measurement["tuned"])
            temperatures.setdefault(form, []).append(measurement["temperature"])
            by_form.setdefault(form, {})[seed] = _likelihoods(measurement["domains"])
    return {
        form: SeedLikelihoods(statistics.fmean(temperatures[form]), by_form[form])
        for form in sorted(by_form)
    }


def _likelihoods(domains: Mapping[str, Any]) -> dict[str, Likelihood]:
    return {name: Likelihood.from_dict(values) for name, values in domains.items()}
