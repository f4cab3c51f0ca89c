"""A study's summary as plain data: a row for everything that was measured, and verdicts.

Rows come in the order in which a reader wants them: models that need no training, the baseline
with its other rates and its longer trainings, then every method with its controls, the best out of
domain (tempered) first. Differences are from the tempered baseline, at whatever temperature the
row itself is.
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
    SeedLikelihoods,
    difference,
    read,
)

Row = dict[str, Any]

# Numbers of every run; a row has their means over seeds.
_FACTS = ("learning_rate", "steps", "best_step", "draws", "token_passes", "validation_nll")


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results["summary"] from the rest of a study's results."""
    arms = read(results)
    chosen = arms.chosen
    return {
        "in_domain": arms.in_domain,
        "out_of_domain": list(arms.out_of_domain),
        "documents": _document_counts(arms.baseline.forms[AS_TRAINED]),
        "baseline": {
            "method": arms.baseline.method,
            "learning_rates": [
                {"seed": seed, "learning_rate": cell["learning_rate"]}
                for seed, cell in arms.baseline.cells.items()
            ],
        },
        "judging": _evaluation_facts(results, arms),
        "chosen": None if chosen is None else chosen.method,
        "rows": [*_untrained(arms), *_baseline_rows(arms), *_method_rows(arms)],
        "verdicts": [judgement.to_dict() for judgement in verdict.judge(arms)],
    }


def _untrained(arms: Arms) -> Iterator[Row]:
    for text, likelihoods in arms.unigram.items():
        # No difference: a unigram is only there to show how far below it a model is.
        row = _row(arms, likelihoods, AS_TRAINED, method="unigram", what=f"unigram_{text}")
        yield row | {"difference": None}
    for form, likelihoods in arms.base.items():
        row = _row(arms, likelihoods, form, method="base", what="untrained")
        yield row | {"difference": _differences(arms, likelihoods)}


def _baseline_rows(arms: Arms) -> Iterator[Row]:
    yield from _rows(arms, arms.baseline, "baseline")
    # A single rate is the baseline itself.
    for arm in arms.rates if len(arms.rates) > 1 else []:
        yield from _rows(arms, arm, "learning_rate")
    for arm in arms.controls:
        if arm.control == "equal_compute":
            yield from _rows(arms, arm, "equal_compute")


def _method_rows(arms: Arms) -> Iterator[Row]:
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
    for form, likelihoods in arm.forms.items():
        row = _row(arms, likelihoods, form, method=arm.method, what=what, of=arm.of)
        yield row | facts | {"difference": _differences(arms, likelihoods)}


def _row(
    arms: Arms,
    likelihoods: SeedLikelihoods,
    form: Form,
    *,
    method: str,
    what: str,
    of: str | None = None,
) -> Row:
    view, tempered = form
    return {
        "method": method,
        "what": what,
        "of": of,
        "view": view,
        "tuned": tempered,
        "temperature": likelihoods.temperature,
        "seeds": [seed for seed in likelihoods.by_seed if seed is not None],
        "in_domain": likelihoods.nll([arms.in_domain]),
        "out_of_domain": likelihoods.nll(arms.out_of_domain),
        "domains": {name: likelihoods.nll([name]) for name in arms.domains},
    }


def _differences(arms: Arms, likelihoods: SeedLikelihoods) -> dict[str, Any]:
    """Return the differences from the tempered baseline; None where the two share no seed."""
    baseline = arms.baseline.forms[TEMPERED]

    def over(domains: Sequence[str]) -> dict[str, Any] | None:
        change = difference(likelihoods, baseline, domains)
        return None if change is None else asdict(change)

    return {
        "in_domain": over([arms.in_domain]),
        "out_of_domain": over(arms.out_of_domain),
        "domains": {name: over([name]) for name in arms.domains},
    }


def _evaluation_facts(results: Mapping[str, Any], arms: Arms) -> dict[str, Any]:
    config = results["config"]
    errors = [
        likelihood.standard_error or 0.0
        for arm in (arms.baseline, *arms.methods)
        for form in arm.forms.values()
        for by_domain in form.by_seed.values()
        for likelihood in by_domain.values()
    ]
    return {
        "draws": config["draws"],
        "noise_scale": config["noise_scale"] or config["train"]["perturb"]["init_scale"],
        "largest_error": max(errors),
    }


def _document_counts(likelihoods: SeedLikelihoods) -> dict[str, int]:
    """Count the documents of each domain that have labels: the units of every interval."""
    by_domain = next(iter(likelihoods.by_seed.values()))
    return {name: sum(n > 0 for n in domain.counts) for name, domain in by_domain.items()}
