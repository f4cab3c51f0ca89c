"""From outcomes to what is reported: means over seeds with intervals, and paired comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.synthetic import outcomes
from bench.synthetic.arms import SEEDS, Arm
from fastperturb.demo.language import REGIONS
from fastperturb.demo.training import Outcome, Setting

BANDS = ("band1", "band2")
# Student's 97.5% points by degrees of freedom.
_STUDENT_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over seeds and its 95% t-interval."""
    mean = statistics.fmean(values)
    half = _STUDENT_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, the geometric mean over seeds of the ratio on the same seed."""
    logs = interval([math.log(one / other) for one, other in zip(ours, theirs, strict=True)])
    return {name: math.exp(value) for name, value in logs.items()}


def apart(ours: dict[str, float], theirs: dict[str, float]) -> str | None:
    """Where the one interval lies of the other: lower, higher, or neither."""
    if ours["high"] < theirs["low"]:
        return "lower"
    return "higher" if ours["low"] > theirs["high"] else None


def row(arm: Arm, found: Sequence[Outcome]) -> dict[str, Any]:
    """One arm's distances, cross-entropies, noise and draws over its seeds."""
    line: dict[str, Any] = {
        "experiment": arm.experiment,
        "line": arm.line,
        "x": arm.x,
        "method": asdict(arm.method),
        "setting": asdict(arm.setting),
        "steps": arm.steps,
        "draws": statistics.fmean(outcome.samples for outcome in found),
        "kl": {name: interval([each.kl[name] for each in found]) for name in REGIONS},
        "nll": {
            name: interval([each.kl[name] + each.entropy[name] for each in found])
            for name in REGIONS
        },
        "seeds": {name: [each.kl[name] for each in found] for name in REGIONS},
        "curve": [statistics.fmean(column) for column in zip(*(each.curve for each in found))],
    }
    movements = [each.movement for each in found if each.movement is not None]
    if movements:
        line["movement"] = {
            axis: interval([each[axis] for each in movements]) for axis in ("noisy", "precise")
        }
    return line


def baseline_row(truth: Setting, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Unigram, entropy and, where the trunk is held, no noise and the likelihood's sd."""
    line: dict[str, Any] = {"setting": asdict(truth)}
    for what in ("entropy", "unigram", "exact"):
        if what in seeds[0]:
            line[what] = {
                region: interval([each[what][region] for each in seeds]) for region in REGIONS
            }
    sds = [each["most_likely_sd"] for each in seeds if each.get("most_likely_sd") is not None]
    if sds:
        line["most_likely_sd"] = interval(sds)
    return line


def rows(arms: Sequence[Arm], found: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Every arm's row, of those whose seeds are all there."""
    lines = []
    for arm in arms:
        keys = [outcomes.key(arm.job(seed)) for seed in SEEDS]
        if all(key in found for key in keys):
            lines.append(row(arm, [found[key] for key in keys]))
    return lines


def pick(lines: Sequence[dict[str, Any]], experiment: str, line: str, x: Any) -> dict[str, Any]:
    """The row of one arm."""
    (only,) = (
        each
        for each in lines
        if (each["experiment"], each["line"], each["x"]) == (experiment, line, x)
    )
    return only


def best_fixed(lines: Sequence[dict[str, Any]], line: str) -> dict[str, Any]:
    """Of a sweep of fixed noise, the scale with the least KL over the two bands: an oracle's."""
    swept = [each for each in lines if (each["experiment"], each["line"]) == ("fixed", line)]
    return min(swept, key=lambda each: sum(each["kl"][band]["mean"] for band in BANDS))


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """By region: the ratio of KL on the same seeds, and whether the two intervals are apart."""
    return {
        "ours": name_of(ours),
        "theirs": name_of(theirs),
        "ratio": {name: ratio(ours["seeds"][name], theirs["seeds"][name]) for name in REGIONS},
        "apart": {name: apart(ours["kl"][name], theirs["kl"][name]) for name in REGIONS},
    }


def name_of(line: dict[str, Any]) -> str:
    """A row in words."""
    method = line["method"]
    if method["name"] == "exact":
        return "exact"
    equation = method["estimator"]
    if method["quadratic"]:
        equation = f"{equation} + {method['quadratic']:g} quadratic"
    scale = f" {method['scale']:g}" if method["name"] == "fixed" else ""
    return f"{method['name']}{scale}, {equation}, M = {method['num_samples']}"


def comparisons(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The claims, each as pairs of arms."""
    exact = pick(lines, "fixed", "exact", 0.0)
    ladder = []
    for M in (16, 4):
        fixed = best_fixed(lines, f"iwae, M = {M}")
        ladder += [compare(pick(lines, "draws", "iwae", M), fixed), compare(fixed, exact)]
    small = pick(lines, "draws", "iwae", 4)
    few = [
        compare(pick(lines, "draws", equation, M), small)
        for equation, M in (("quadratic", 2), ("jvi_clip", 4), ("mlmc", 16))
    ]
    flops = [each for each in lines if each["experiment"] == "flops"]
    standard = [each for each in flops if each["line"] == "iwae, M = 16"]
    return {
        "learned against fixed against exact": ladder,
        "few draws": few,
        "equal flops": [
            compare(each, one) for one in standard for each in flops if each is not one
        ],
    }
