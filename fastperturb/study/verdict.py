"""The rule for a gain: better than every control out of domain, at no cost in domain.

Every model counts at its own temperature, tuned on in-domain validation: a tempered model can only
be compared with a tempered one. Out of domain a method must be below every control by more than
twice the spread, over seeds, of their difference. In domain it must not be above the baseline, at
equal steps and at equal compute, by more than twice that spread, nor above it by an interval over
documents that excludes 0. The controls are:

* the baseline, at the learning rate that validation prefers;
* the baseline at the method's own rate, where the two differ: a lower rate forgets less;
* the baseline under noise that it was not trained with;
* the method without its noise, where it has any left after training;
* for a learned transform, its deterministic twin, which has the same parameters and one sample;
* for a method that costs more than the baseline, the baseline at that compute.

One control that a method does not beat is enough for "no gain". Where a control was not measured,
or on one seed only, a gain is not established.
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
    NllDifference,
    SeedLikelihoods,
    difference,
)

GAIN, NO_GAIN, NOT_ESTABLISHED = "gain", "no gain", "not established"

_BASELINE = "the tempered baseline"
_EQUAL_COMPUTE = "the baseline at equal compute"
# A method that costs this much more than the baseline is also compared with it at equal compute.
_COSTS_MORE = 1.1


@dataclass(frozen=True, kw_only=True)
class ControlComparison:
    """The method's nll per token minus a control's: below 0 the method is better.

    where: "out_of_domain" (the mean over the other domains) or "in_domain".
    spread: standard deviation of the difference over seeds; None for one seed.
    low, high: 95% bootstrap interval over documents.
    passed: None for one seed, which has no spread.
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
    """The verdict on one method.

    chosen: True for the learned method that in-domain validation prefers: the study's own verdict.
    outcome: GAIN, NO_GAIN or NOT_ESTABLISHED.
    missing: controls that were not measured.
    uncertain: controls against which the interval over documents, out of domain, includes 0. The
        rule does not use it; the sentence mentions it with a gain.
    """

    method: str
    learned: bool
    chosen: bool
    outcome: str
    comparisons: tuple[ControlComparison, ...]
    missing: tuple[str, ...]
    uncertain: tuple[str, ...]
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(arms: Arms) -> list[Verdict]:
    """Return a verdict for each method: the chosen one first, then the other learned ones."""
    verdicts = [_verdict(arms, arm) for arm in arms.methods]
    return sorted(
        verdicts, key=lambda verdict: (not verdict.chosen, not verdict.learned, verdict.method)
    )


def _verdict(arms: Arms, arm: Arm) -> Verdict:
    comparisons, missing, uncertain = [], [], []
    for control, likelihoods in controls(arms, arm).items():
        with_control = list(_compared(arms, arm, control, likelihoods))
        comparisons += with_control
        if not with_control:
            missing.append(control)
        if any(c.low <= 0 <= c.high for c in with_control if c.where == "out_of_domain"):
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


def controls(arms: Arms, arm: Arm) -> dict[str, SeedLikelihoods | None]:
    """Return the controls of a method, all tempered; None for one that was not measured."""
    baseline = arms.baseline
    tempered = {
        _BASELINE: baseline.forms.get(TEMPERED),
        "noise added to the baseline at evaluation": baseline.forms.get(("noise_added", True)),
    }
    own_rate = [other for other in arms.rates if other.rates == arm.rates != baseline.rates]
    if own_rate:
        tempered["the baseline at its rate"] = _tempered(own_rate[0])
    if arm.is_random:
        tempered["itself without noise"] = arm.forms.get(("without_noise", True))
    if arm.learned and arm.is_random:
        tempered["its deterministic twin"] = _tempered(twin_of(arms, arm))
    if arm.mean("token_passes") > _COSTS_MORE * baseline.mean("token_passes"):
        tempered[_EQUAL_COMPUTE] = _tempered(at_equal_compute(arms, arm))
    return tempered


def twin_of(arms: Arms, arm: Arm) -> Arm | None:
    """Return the deterministic transform with the same parameters as this method's."""
    twins = (control for control in arms.controls if control.control == "deterministic")
    return next((twin for twin in twins if twin.of == arm.method), None)


def at_equal_compute(arms: Arms, arm: Arm) -> Arm | None:
    """Return the longer training of the baseline whose compute is nearest to this method's."""

    def distance(other: Arm) -> float:
        return abs(math.log(other.mean("token_passes") / arm.mean("token_passes")))

    longer = (control for control in arms.controls if control.control == "equal_compute")
    return min(longer, key=distance, default=None)


def _tempered(arm: Arm | None) -> SeedLikelihoods | None:
    return None if arm is None else arm.forms.get(TEMPERED)


def _compared(
    arms: Arms, arm: Arm, control: str, likelihoods: SeedLikelihoods | None
) -> Iterator[ControlComparison]:
    """Compare a method with one control; the result is empty where they share no seed."""
    if likelihoods is None:
        return
    places = {"out_of_domain": arms.out_of_domain}
    if control in (_BASELINE, _EQUAL_COMPUTE):
        places["in_domain"] = [arms.in_domain]
    for where, domains in places.items():
        change = difference(arm.forms[TEMPERED], likelihoods, domains)
        if change is not None:
            yield ControlComparison(
                control=control,
                where=where,
                difference=change.mean,
                spread=change.spread,
                low=change.low,
                high=change.high,
                seeds=change.seeds,
                passed=_passed(change, where),
            )


def _passed(change: NllDifference, where: str) -> bool | None:
    if change.spread is None:
        return None
    if where == "in_domain":
        return change.mean <= 2 * change.spread and change.low <= 0
    return change.mean < -2 * change.spread


def _outcome(comparisons: Sequence[ControlComparison], missing: Sequence[str]) -> str:
    if any(comparison.passed is False for comparison in comparisons):
        return NO_GAIN
    if missing or any(comparison.passed is None for comparison in comparisons):
        return NOT_ESTABLISHED
    return GAIN


def _because(
    outcome: str,
    comparisons: Sequence[ControlComparison],
    missing: Sequence[str],
    uncertain: Sequence[str],
) -> str:
    """Say in words why the outcome is what it is."""
    outside = [comparison for comparison in comparisons if comparison.where == "out_of_domain"]
    inside = [comparison for comparison in comparisons if comparison.where == "in_domain"]
    clauses = []
    if any(comparison.passed is None for comparison in comparisons):
        clauses.append("one seed has no spread, two are needed")
    if missing:
        clauses.append(f"not measured: {', '.join(missing)}")
    if outcome == GAIN:
        nearest = max(outside, key=_distance_from_passing)
        clauses.append(
            f"the nearest control ({nearest.control}) is worse by {_size(nearest)}, and the change "
            f"in domain is {inside[0].difference:+.4f}"
        )
        if uncertain:
            clauses.append(f"but over documents it is not certain against {', '.join(uncertain)}")
    elif failed := [comparison for comparison in outside if comparison.passed is False]:
        clauses.append(_in_words(max(failed, key=_distance_from_passing)))
    elif outside and outcome == NOT_ESTABLISHED:
        clauses.append(_in_words(max(outside, key=_distance_from_passing)))
    elif not missing:
        clauses.append("it is below every control")
    clauses += [
        f"it costs {_size(comparison)} in domain beside {comparison.control}"
        for comparison in inside
        if comparison.passed is False
    ]
    return "; ".join(clauses)


def _distance_from_passing(comparison: ControlComparison) -> float:
    return comparison.difference + 2 * (comparison.spread or 0.0)


def _in_words(comparison: ControlComparison) -> str:
    if comparison.difference > 0:
        return f"{comparison.control} is better by {_size(comparison)}"
    only = "only " if comparison.passed is False else ""
    return f"it is below {comparison.control} by {only}{_size(comparison)}"


def _size(comparison: ControlComparison) -> str:
    spread = "" if comparison.spread is None else f" ± {comparison.spread:.4f}"
    return f"{abs(comparison.difference):.4f}{spread}"
