"""The reported numbers: means over seeds with intervals, and paired comparisons of arms."""

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
TITLES = {"in_support": "in support", "band1": "band 1", "band2": "band 2"}
# Student's 97.5% points by degrees of freedom.
_STUDENT_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds and its 95% t-interval."""
    mean = statistics.fmean(values)
    half = _STUDENT_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the geometric mean over seeds of ours / theirs on the same seed, with its interval."""
    logs = interval([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    return {name: math.exp(value) for name, value in logs.items()}


def apart(ours: dict[str, float], theirs: dict[str, float]) -> str | None:
    """Return "lower" or "higher" where our interval lies apart from theirs, else None."""
    if ours["high"] < theirs["low"]:
        return "lower"
    return "higher" if ours["low"] > theirs["high"] else None


def row(arm: Arm, by_seed: Sequence[Outcome]) -> dict[str, Any]:
    """Return an arm's distances, cross-entropies, shift and samples over its seeds."""
    arm_row: dict[str, Any] = {
        "experiment": arm.experiment,
        "line": arm.line,
        "x": arm.x,
        "method": asdict(arm.method),
        "setting": asdict(arm.setting),
        "steps": arm.steps,
        "draws": statistics.fmean(outcome.samples for outcome in by_seed),
        "kl": {name: interval([outcome.kl[name] for outcome in by_seed]) for name in REGIONS},
        "nll": {
            name: interval([outcome.kl[name] + outcome.entropy[name] for outcome in by_seed])
            for name in REGIONS
        },
        "seeds": {name: [outcome.kl[name] for outcome in by_seed] for name in REGIONS},
        "curve": [statistics.fmean(column) for column in zip(*(o.curve for o in by_seed))],
    }
    shifts = [outcome.movement for outcome in by_seed if outcome.movement is not None]
    if shifts:
        arm_row["movement"] = {
            axis: interval([shift[axis] for shift in shifts]) for axis in ("noisy", "precise")
        }
    return arm_row


def baseline_row(setting: Setting, by_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the baselines of a setting over the seeds."""
    means: dict[str, Any] = {"setting": asdict(setting)}
    for name in ("entropy", "unigram", "exact", "blind"):
        if name in by_seed[0]:
            means[name] = {
                region: interval([values[name][region] for values in by_seed]) for region in REGIONS
            }
    scales = [values.get("most_likely_sd") for values in by_seed]
    known = [scale for scale in scales if scale is not None]
    if known:
        means["most_likely_sd"] = interval(known)
    return means


def rows(arms: Sequence[Arm], by_key: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Return the row of every arm that is trained with all seeds."""
    finished = []
    for arm in arms:
        keys = [outcomes.key(arm.job(seed)) for seed in SEEDS]
        if all(key in by_key for key in keys):
            finished.append(row(arm, [by_key[key] for key in keys]))
    return finished


def pick(rows: Sequence[dict[str, Any]], experiment: str, line: str, x: Any) -> dict[str, Any]:
    """Return the row of one arm."""
    place = (experiment, line, x)
    (only,) = (row for row in rows if (row["experiment"], row["line"], row["x"]) == place)
    return only


def best_fixed(rows: Sequence[dict[str, Any]], line: str) -> dict[str, Any]:
    """Return the scale of fixed noise with the least KL over the two bands, as an oracle would."""
    swept = [row for row in rows if (row["experiment"], row["line"]) == ("fixed", line)]
    return min(swept, key=lambda row: sum(row["kl"][band]["mean"] for band in BANDS))


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return, by region, the ratio of KL on the same seeds, and where the intervals are apart."""
    return {
        "ours": name_of(ours),
        "theirs": name_of(theirs),
        "ratio": {name: ratio(ours["seeds"][name], theirs["seeds"][name]) for name in REGIONS},
        "apart": {name: apart(ours["kl"][name], theirs["kl"][name]) for name in REGIONS},
    }


def name_of(row: dict[str, Any]) -> str:
    """Return the name of a row's method, with its estimator and M."""
    method = row["method"]
    if method["name"] == "exact":
        return "exact"
    estimator = method["estimator"]
    if method["quadratic"]:
        estimator = f"{estimator} + {method['quadratic']:g} quadratic"
    # Results that are older than the option lack it.
    if method.get("sampling", "independent") != "independent":
        estimator = f"{estimator}, {method['sampling']}"
    scale = f" {method['scale']:g}" if method["name"] == "fixed" else ""
    name = method["name"]
    if name == "learned" and method["transform"] != "lowrank":
        name = method["transform"]
    return f"{name}{scale}, {estimator}, M = {method['num_samples']}"


def comparisons(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the comparisons of arms behind each claim. The titles are keys of results."""
    exact = pick(rows, "fixed", "exact", 0.0)
    learned_fixed_exact = []
    for M in (16, 4):
        fixed = best_fixed(rows, f"iwae, M = {M}")
        learned_fixed_exact += [
            compare(pick(rows, "draws", "iwae", M), fixed),
            compare(fixed, exact),
        ]
    iwae_4 = pick(rows, "draws", "iwae", 4)
    few = [
        compare(pick(rows, "draws", estimator, M), iwae_4)
        for estimator, M in (("quadratic", 2), ("jvi_clip", 4), ("mlmc", 16))
    ]
    flops = [row for row in rows if row["experiment"] == "flops"]
    standards = [row for row in flops if row["line"] == "iwae, M = 16"]
    return {
        "learned against fixed against exact": learned_fixed_exact,
        "few draws": few,
        "equal flops": [
            compare(row, standard) for standard in standards for row in flops if row is not standard
        ],
    }
