"""The study of context: transforms under a truth whose noise depends on an earlier token, or not.

`python -m bench.synthetic --study context`. Every arm trains the demo's model with five seeds for
the demo's steps, by iwae with 8 stratified samples, with the demo's batch and, under the contextual
truth, with one four times as large. There tokens are noisy only if the first one lies in one half
of the grid: lowrank perturbs all tokens alike, gated by the token itself, context by the tokens so
far. The net sees the last two tokens of three, so that only the transform can tell if they are
noisy; a control lets it see all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.synthetic import summary
from bench.synthetic.arms import EXACT, Arm, learned
from bench.synthetic.sampling import LARGE
from fastperturb.demo.training import BATCH, Setting

SAMPLES = 8
TRANSFORMS = ("lowrank", "gated", "context")
# For each experiment: the title of its table, and the heading of x.
HEADINGS = {
    "context": (f"The noise depends on the first token, batch {BATCH:,}", "M"),
    "context_large": (f"The noise depends on the first token, batch {LARGE:,}", "M"),
    "context_seen": (f"The net sees the first token too, batch {BATCH:,}", "M"),
    "no_context": (f"The noise is the same for all tokens, batch {BATCH:,}", "M"),
}
SETTINGS = {
    "context": Setting(contextual=True),
    "context_large": Setting(contextual=True, batch=LARGE),
    "context_seen": Setting(contextual=True, seen=3),
    "no_context": Setting(),
}


def all_arms() -> list[Arm]:
    """Return every arm of the study, the most important first."""
    return [arm for experiment in HEADINGS for arm in _arms(experiment)]


def _arms(experiment: str) -> Iterator[Arm]:
    methods = {"exact": EXACT}
    for name in TRANSFORMS:
        methods[name] = learned("iwae", SAMPLES, sampling="stratified", transform=name)
    for line, method in methods.items():
        yield Arm(
            experiment=experiment,
            line=line,
            x=method.num_samples,
            method=method,
            setting=SETTINGS[experiment],
        )


def comparisons(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return each transform against those before it in TRANSFORMS, on the same seeds."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for experiment, (title, _) in HEADINGS.items():
        lines = {row["line"]: row for row in rows if row["experiment"] == experiment}
        for index, name in enumerate(TRANSFORMS):
            for other in TRANSFORMS[:index]:
                if name in lines and other in lines:
                    pairs.setdefault(title, []).append(summary.compare(lines[name], lines[other]))
    return pairs
