"""A study's arms, which are runs that differ in nothing but their seed, and how two of them differ.

Every arm is measured in several forms: a view (as trained, without its noise, with noise added at
evaluation), at temperature 1 or at one tuned on in-domain validation text ("tempered").
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastperturb.eval.likelihood import Likelihood
from fastperturb.report import bootstrap

Form = tuple[str, bool]  # the view, and whether it is tempered
Seed = int | None  # None: the same under every seed, such as the model before training

AS_TRAINED, TEMPERED = ("as_trained", False), ("as_trained", True)


@dataclass(frozen=True)
class Measured:
    """An arm in one form: for every seed the likelihood of every domain."""

    temperature: float  # the mean over seeds
    by_seed: Mapping[Seed, Mapping[str, Likelihood]]

    def nll(self, domains: Iterable[str]) -> float:
        """A token's, the mean over domains and over seeds."""
        return statistics.fmean(
            statistics.fmean(found[name].nll for name in domains) for found in self.by_seed.values()
        )


@dataclass(frozen=True)
class Difference:
    """Of the nll a token, ours less theirs: below 0 ours predicts better.

    low, high: 95% bootstrap interval, resampling documents.
    spread: sample standard deviation, over seeds, of each seed's own difference.
    """

    mean: float
    low: float
    high: float
    spread: float | None  # one seed has none
    seeds: int


@dataclass(frozen=True)
class Arm:
    method: str
    role: str
    control: str | None
    of: str | None
    cells: Mapping[Seed, Mapping[str, Any]]
    forms: Mapping[Form, Measured]

    def mean(self, fact: str) -> float:
        """Over seeds, of a number that every cell tells."""
        return statistics.fmean(cell[fact] for cell in self.cells.values())

    @property
    def rates(self) -> list[float]:
        """The learning rate of every seed."""
        return [float(cell["learning_rate"]) for cell in self.cells.values()]

    @property
    def learned(self) -> bool:
        """Whether it has a learned perturbation."""
        return any(cell["learned"] for cell in self.cells.values())

    @property
    def validation_nll(self) -> float:
        """Tempered, under the draws and on the text that are the same for all; mean over seeds."""
        return statistics.fmean(
            measurement["validation_nll"]
            for cell in self.cells.values()
            for measurement in cell["measurements"]
            if (measurement["view"], measurement["tuned"]) == TEMPERED
        )

    @property
    def moves(self) -> bool:
        """Whether its prefixes are still random after training."""
        return any(
            likelihood.num_samples > 1
            for found in self.forms[AS_TRAINED].by_seed.values()
            for likelihood in found.values()
        )


@dataclass(frozen=True)
class Arms:
    """All of a study.

    baseline: of each seed, the learning rate that validation prefers.
    rates: the same method at each rate.
    controls: what else was trained for comparison, at equal compute and without randomness.
    unigram: frequencies of single tokens, by the text they were counted on.
    """

    in_domain: str
    out_of_domain: Sequence[str]
    baseline: Arm
    rates: Sequence[Arm]
    methods: Sequence[Arm]
    controls: Sequence[Arm]
    base: Mapping[Form, Measured]
    unigram: Mapping[str, Measured]

    @property
    def domains(self) -> list[str]:
        return [self.in_domain, *self.out_of_domain]

    @property
    def chosen(self) -> Arm | None:
        """The learned method that in-domain validation prefers, tempered."""
        learned = [arm for arm in self.methods if arm.learned]
        return min(learned, key=lambda arm: (arm.validation_nll, arm.method), default=None)


def read(results: Mapping[str, Any]) -> Arms:
    """The arms of what a study's results.json holds, in an order that is not that of its cells."""
    in_domain = results["in_domain"]
    others = [name for name in results["domains"] if name != in_domain]
    if not others:
        raise ValueError(f"domains must name one besides in_domain={in_domain!r}, got only that")
    cells = results["cells"]
    of_baseline = [cell for cell in cells if _of_baseline(cell)]
    if not of_baseline:
        raise ValueError(f"cells must hold the baseline {results['baseline']!r}, got none of it")
    rest = [cell for cell in cells if not _of_baseline(cell)]
    trained = [_arm(group) for group in _grouped(rest, "method", "control", "of")]
    return Arms(
        in_domain=in_domain,
        out_of_domain=others,
        baseline=replace(
            _arm(of_baseline),
            method=results["baseline"],
            role="baseline",
            control=None,
            of=None,
        ),
        rates=[_arm(group) for group in _grouped(of_baseline, "learning_rate")],
        methods=[arm for arm in trained if arm.role == "method"],
        controls=[arm for arm in trained if arm.role == "control"],
        base=_forms({None: {"measurements": results["base"]}}),
        unigram={
            text: Measured(1.0, {None: _likelihoods(found)})
            for text, found in results["unigram"].items()
        },
    )


def difference(ours: Measured, theirs: Measured, domains: Sequence[str]) -> Difference | None:
    """The mean over domains, paired by seed and by document; None where no seed is in both.

    Seeds are averaged before documents are resampled: they are not data.
    """
    pairs = _pairs(ours.by_seed, theirs.by_seed)
    if not pairs:
        return None
    by_seed = [statistics.fmean(a[name].nll - b[name].nll for name in domains) for a, b in pairs]
    averages = [
        (_average([a[name] for a, _ in pairs]), _average([b[name] for _, b in pairs]))
        for name in domains
    ]
    interval = bootstrap.mean_paired_difference(averages)
    return Difference(
        mean=statistics.fmean(by_seed),
        low=interval.low,
        high=interval.high,
        spread=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        seeds=len(by_seed),
    )


def _pairs(
    ours: Mapping[Seed, Mapping[str, Likelihood]], theirs: Mapping[Seed, Mapping[str, Likelihood]]
) -> list[tuple[Mapping[str, Likelihood], Mapping[str, Likelihood]]]:
    """Of every seed that both have; what is the same under every seed has them all."""
    seeds = sorted({seed for seed in {*ours, *theirs} if seed is not None})
    found = [(ours.get(s, ours.get(None)), theirs.get(s, theirs.get(None))) for s in seeds]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _average(likelihoods: Sequence[Likelihood]) -> Likelihood:
    """The likelihood whose documents' sums are the means of these."""
    sums = zip(*(each.nll_sums for each in likelihoods), strict=True)
    return replace(likelihoods[0], nll_sums=[statistics.fmean(document) for document in sums])


def _of_baseline(cell: Mapping[str, Any]) -> bool:
    return cell["role"] == "baseline" or cell["control"] == "learning_rate"


def _grouped(cells: Sequence[Mapping[str, Any]], *facts: str) -> list[list[Mapping[str, Any]]]:
    """Cells that agree in these facts, sorted by them."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[fact] for fact in facts), []).append(cell)
    keys = sorted(groups, key=lambda key: tuple((each is not None, each) for each in key))
    return [groups[key] for key in keys]


def _arm(cells: Sequence[Mapping[str, Any]]) -> Arm:
    """Of several cells of one seed, which differ in their rate, the one validation prefers."""
    by_seed: dict[Seed, Mapping[str, Any]] = {}
    for cell in sorted(cells, key=lambda each: (each["validation_nll"], each["learning_rate"])):
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


def _forms(cells: Mapping[Seed, Mapping[str, Any]]) -> dict[Form, Measured]:
    temperatures: dict[Form, list[float]] = {}
    found: dict[Form, dict[Seed, Mapping[str, Likelihood]]] = {}
    for seed, cell in cells.items():
        for measurement in cell["measurements"]:
            form = (measurement["view"], measurement["tuned"])
            temperatures.setdefault(form, []).append(measurement["temperature"])
            found.setdefault(form, {})[seed] = _likelihoods(measurement["domains"])
    return {
        form: Measured(statistics.fmean(temperatures[form]), found[form]) for form in sorted(found)
    }


def _likelihoods(domains: Mapping[str, Any]) -> dict[str, Likelihood]:
    return {name: Likelihood.from_dict(each) for name, each in domains.items()}
