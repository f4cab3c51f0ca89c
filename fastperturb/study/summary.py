"""A study's numbers in brief, as plain data: a row for everything that was measured, and verdicts.

Rows come in the order in which a reader wants them: what needs no training, the baseline and what
becomes of it, then every method, the best out of domain (tempered) first, with its controls.
Differences are from the tempered baseline, whatever the row's own temperature is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastperturb.study import verdict
from fastperturb.study.arms import (
    AS_TRAINED,
    TEMPERED,
    Arm,
    Arms,
    Form,
    Measured,
    difference,
    read,
)

Row = dict[str, Any]

# Of every run; a row has their means over seeds.
_FACTS = ("learning_rate", "steps", "best_step", "draws", "token_passes", "validation_nll")


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """What results["summary"] is to hold, from the rest of a study's results."""
    arms = read(results)
    chosen = arms.chosen
    return {
        "in_domain": arms.in_domain,
        "out_of_domain": list(arms.out_of_domain),
        "documents": _documents(arms.baseline.forms[AS_TRAINED]),
        "baseline": {
            "method": arms.baseline.method,
            "learning_rates": [
                {"seed": seed, "learning_rate": cell["learning_rate"]}
                for seed, cell in arms.baseline.cells.items()
            ],
        },
        "judging": _judging(results, arms),
        "chosen": None if chosen is None else chosen.method,
        "rows": [*_untrained(arms), *_of_baseline(arms), *_of_methods(arms)],
        "verdicts": [each.to_dict() for each in verdict.judge(arms)],
    }


def _untrained(arms: Arms) -> Iterator[Row]:
    for text, measured in arms.unigram.items():
        # Nothing was trained: what matters is how far below it a model is, and that is plain.
        row = _row(arms, measured, AS_TRAINED, method="unigram", what=f"unigram_{text}")
        yield row | {"difference": None}
    for form, measured in arms.base.items():
        row = _row(arms, measured, form, method="base", what="untrained")
        yield row | {"difference": _differences(arms, measured)}


def _of_baseline(arms: Arms) -> Iterator[Row]:
    yield from _rows(arms, arms.baseline, "baseline")
    # With one rate there was nothing to choose from.
    for arm in arms.rates if len(arms.rates) > 1 else []:
        yield from _rows(arms, arm, "learning_rate")
    for arm in arms.controls:
        if arm.control == "equal_compute":
            yield from _rows(arms, arm, "equal_compute")


def _of_methods(arms: Arms) -> Iterator[Row]:
    def order(arm: Arm) -> tuple[float, str]:
        return arm.forms[TEMPERED].nll(arms.out_of_domain), arm.method

    for arm in sorted(arms.methods, key=order):
        yield from _rows(arms, arm, "method")
        twin = verdict.twin_of(arms, arm)
        if twin is not None:
            yield from _rows(arms, twin, "deterministic")


def _rows(arms: Arms, arm: Arm, what: str) -> Iterator[Row]:
    facts = {name: arm.mean(name) for name in _FACTS}
    facts["compute"] = facts["token_passes"] / arms.baseline.mean("token_passes")
    for form, measured in arm.forms.items():
        row = _row(arms, measured, form, method=arm.method, what=what, of=arm.of)
        yield row | facts | {"difference": _differences(arms, measured)}


def _row(
    arms: Arms, measured: Measured, form: Form, *, method: str, what: str, of: str | None = None
) -> Row:
    view, tempered = form
    return {
        "method": method,
        "what": what,
        "of": of,
        "view": view,
        "tuned": tempered,
        "temperature": measured.temperature,
        "seeds": [seed for seed in measured.by_seed if seed is not None],
        "in_domain": measured.nll([arms.in_domain]),
        "out_of_domain": measured.nll(arms.out_of_domain),
        "domains": {name: measured.nll([name]) for name in arms.domains},
    }


def _differences(arms: Arms, measured: Measured) -> dict[str, Any]:
    """From the tempered baseline; each is None where no seed has both."""
    baseline = arms.baseline.forms[TEMPERED]

    def over(domains: Sequence[str]) -> dict[str, Any] | None:
        found = difference(measured, baseline, domains)
        return None if found is None else asdict(found)

    return {
        "in_domain": over([arms.in_domain]),
        "out_of_domain": over(arms.out_of_domain),
        "domains": {name: over([name]) for name in arms.domains},
    }


def _judging(results: Mapping[str, Any], arms: Arms) -> dict[str, Any]:
    config = results["config"]
    errors = [
        found.standard_error or 0.0
        for arm in (arms.baseline, *arms.methods)
        for form in arm.forms.values()
        for by_domain in form.by_seed.values()
        for found in by_domain.values()
    ]
    return {
        "draws": config["draws"],
        "noise_scale": config["noise_scale"] or config["train"]["perturb"]["init_scale"],
        "largest_error": max(errors),
    }


def _documents(measured: Measured) -> dict[str, int]:
    """How many of each domain have something to predict: the units of every interval."""
    found = next(iter(measured.by_seed.values()))
    return {name: sum(count > 0 for count in each.counts) for name, each in found.items()}
