"""What counts as a gain: to stand beside every control, out of domain, at no cost in domain.

Every model counts at its own temperature, tuned on in-domain validation: one that was not tempered
says little beside one that was. A method must be below every control out of domain by more than
twice the spread, over seeds, of their difference; and in domain not above the baseline, at equal
steps and at equal compute, by more than that, nor surely above it over documents. The controls:

* the baseline, at the learning rate that validation prefers;
* the baseline at the method's own rate, where that is another one: a lower rate forgets less;
* the baseline under noise that it was not trained with;
* the method without its noise, if it has any left after training;
* of a learned transform its deterministic twin, which has the same parameters and one draw;
* of a method that costs more than the baseline, the baseline at that compute.

One of them that a gain does not stand beside settles that there is none. Where one was not
measured, or on one seed only, a gain is not established.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastperturb.study.arms import (
    TEMPERED,
    Arm,
    Arms,
    Difference,
    Measured,
    difference,
)

GAIN, NO_GAIN, NOT_ESTABLISHED = "gain", "no gain", "not established"

_BASELINE = "the tempered baseline"
_EQUAL_COMPUTE = "the baseline at equal compute"
# A method that trains on this much more than the baseline must stand beside it at equal compute.
_COSTS_MORE = 1.1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of the nll a token, the method's less the control's: below 0 the method is better.

    where: "out_of_domain" (the mean over the other domains) or "in_domain".
    spread: over seeds, of the difference; None for one seed.
    low, high: 95% bootstrap interval over documents.
    passed: None where one seed cannot tell.
    """

    control: str
    where: str
    difference: float
    spread: float | None
    low: float
    high: float
    seeds: int
    passed: bool | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """outcome: GAIN, NO_GAIN or NOT_ESTABLISHED.

    chosen: the learned method that in-domain validation prefers, whose verdict is the study's.
    missing: controls that were not measured.
    uncertain: controls against which the interval over documents, out of domain, reaches 0. It is
        no part of the rule, and is told with a gain.
    """

    method: str
    learned: bool
    chosen: bool
    outcome: str
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...]
    uncertain: tuple[str, ...]
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(arms: Arms) -> list[Verdict]:
    """One verdict a method, the chosen one's first, then other learned ones."""
    verdicts = [_judged(arms, arm) for arm in arms.methods]
    return sorted(verdicts, key=lambda each: (not each.chosen, not each.learned, each.method))


def _judged(arms: Arms, arm: Arm) -> Verdict:
    comparisons, missing, uncertain = [], [], []
    for control, theirs in controls(arms, arm).items():
        found = list(_compared(arms, arm, control, theirs))
        comparisons += found
        if not found:
            missing.append(control)
        if any(each.low <= 0 <= each.high for each in found if each.where == "out_of_domain"):
            uncertain.append(control)
    outcome = _outcome(comparisons, missing)
    return Verdict(
        method=arm.method,
        learned=arm.learned,
        chosen=arm is arms.chosen,
        outcome=outcome,
        comparisons=tuple(comparisons),
        missing=tuple(missing),
        uncertain=tuple(uncertain),
        sentence=f"{arm.method}: {outcome}: {_because(outcome, comparisons, missing, uncertain)}",
    )


def controls(arms: Arms, arm: Arm) -> dict[str, Measured | None]:
    """What a method must stand beside, all of it tempered; None for what was not measured."""
    baseline = arms.baseline
    found = {
        _BASELINE: baseline.forms.get(TEMPERED),
        "noise added to the baseline at evaluation": baseline.forms.get(("noise_added", True)),
    }
    own_rate = [each for each in arms.rates if each.rates == arm.rates != baseline.rates]
    if own_rate:
        found["the baseline at its rate"] = _tempered(own_rate[0])
    if arm.moves:
        found["itself without noise"] = arm.forms.get(("without_noise", True))
    if arm.learned and arm.moves:
        found["its deterministic twin"] = _tempered(twin_of(arms, arm))
    if arm.mean("token_passes") > _COSTS_MORE * baseline.mean("token_passes"):
        found[_EQUAL_COMPUTE] = _tempered(at_equal_compute(arms, arm))
    return found


def twin_of(arms: Arms, arm: Arm) -> Arm | None:
    """The deterministic transform with the parameters of this method's."""
    twins = (each for each in arms.controls if each.control == "deterministic")
    return next((each for each in twins if each.of == arm.method), None)


def at_equal_compute(arms: Arms, arm: Arm) -> Arm | None:
    """The longer training of the baseline whose compute is nearest to this method's."""

    def distance(other: Arm) -> float:
        return abs(math.log(other.mean("token_passes") / arm.mean("token_passes")))

    longer = (each for each in arms.controls if each.control == "equal_compute")
    return min(longer, key=distance, default=None)


def _tempered(arm: Arm | None) -> Measured | None:
    return None if arm is None else arm.forms.get(TEMPERED)


def _compared(arms: Arms, arm: Arm, control: str, theirs: Measured | None) -> Iterator[Comparison]:
    """With one control; nothing if they share no seed."""
    places = {"out_of_domain": arms.out_of_domain}
    if control in (_BASELINE, _EQUAL_COMPUTE):
        places["in_domain"] = [arms.in_domain]
    for where, domains in places.items():
        found = None if theirs is None else difference(arm.forms[TEMPERED], theirs, domains)
        if found is not None:
            yield Comparison(
                control=control,
                where=where,
                difference=found.mean,
                spread=found.spread,
                low=found.low,
                high=found.high,
                seeds=found.seeds,
                passed=_passed(found, where),
            )


def _passed(found: Difference, where: str) -> bool | None:
    if found.spread is None:
        return None
    if where == "in_domain":
        return found.mean <= 2 * found.spread and found.low <= 0
    return found.mean < -2 * found.spread


def _outcome(comparisons: Sequence[Comparison], missing: Sequence[str]) -> str:
    if any(each.passed is False for each in comparisons):
        return NO_GAIN
    if missing or any(each.passed is None for each in comparisons):
        return NOT_ESTABLISHED
    return GAIN


def _because(
    outcome: str,
    comparisons: Sequence[Comparison],
    missing: Sequence[str],
    uncertain: Sequence[str],
) -> str:
    outside = [each for each in comparisons if each.where == "out_of_domain"]
    inside = [each for each in comparisons if each.where == "in_domain"]
    clauses = []
    if any(each.passed is None for each in comparisons):
        clauses.append("one seed has no spread, two are needed")
    if missing:
        clauses.append(f"not measured: {', '.join(missing)}")
    if outcome == GAIN:
        nearest = max(outside, key=_short_of)
        clauses.append(
            f"the nearest control ({nearest.control}) is worse by {_size(nearest)}, and the change "
            f"in domain is {inside[0].difference:+.4f}"
        )
        if uncertain:
            clauses.append(f"but over documents it is not certain against {', '.join(uncertain)}")
    elif failed := [each for each in outside if each.passed is False]:
        clauses.append(_told(max(failed, key=_short_of)))
    elif outside and outcome == NOT_ESTABLISHED:
        clauses.append(_told(max(outside, key=_short_of)))
    elif not missing:
        clauses.append("it is below every control")
    clauses += [
        f"it costs {_size(each)} in domain beside {each.control}"
        for each in inside
        if each.passed is False
    ]
    return "; ".join(clauses)


def _short_of(comparison: Comparison) -> float:
    """How far a comparison out of domain is from passing."""
    return comparison.difference + 2 * (comparison.spread or 0.0)


def _told(comparison: Comparison) -> str:
    if comparison.difference > 0:
        return f"{comparison.control} is better by {_size(comparison)}"
    only = "only " if comparison.passed is False else ""
    return f"it is below {comparison.control} by {only}{_size(comparison)}"


def _size(comparison: Comparison) -> str:
    spread = "" if comparison.spread is None else f" ± {comparison.spread:.4f}"
    return f"{abs(comparison.difference):.4f}{spread}"
