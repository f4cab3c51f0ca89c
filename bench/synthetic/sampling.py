"""The study of samplings: independent, antithetic and stratified samples under the same estimator.

`python -m bench.synthetic --study sampling`. Every arm trains the demo's model with five seeds for the
demo's steps: with its batch, with a batch four times as large, and at equal flops, where fewer samples
have larger batches. All are judged by KL(truth || marginal of 256 independent samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.synthetic import summary
from bench.synthetic.arms import SAMPLES, Arm, learned
from fastperturb.config import SAMPLINGS
from fastperturb.demo.training import BATCH, Setting

LARGE = 4 * BATCH
# For each experiment: the title of its table, and the heading of x.
HEADINGS = {
    "sampling": ("Samplings, the demo's batch and steps", "M"),
    "sampling_batch": ("Samplings at equal flops, by larger batches", "M"),
    "sampling_large": (f"Samplings, batches of {LARGE:,}", "M"),
}


def all_arms() -> list[Arm]:
    """Return every arm of the study, the most important first."""
    return [*by_samples(), *at_equal_flops(), *large_batches()]


def by_samples() -> Iterator[Arm]:
    for estimator, samplings, samples in (
        ("iwae", SAMPLINGS, (4, 8, 16)),
        ("jvi_clip", ("independent", "stratified"), (4, 8)),
        ("quadratic", ("independent", "stratified"), (4, 8)),
    ):
        for sampling in samplings:
            for M in samples:
                method = learned(estimator, M, sampling=sampling)
                line = f"{estimator}, {sampling}"
                yield Arm(experiment="sampling", line=line, x=M, method=method)


def at_equal_flops() -> Iterator[Arm]:
    """Yield arms that send as many (row, sample) pairs through the net as SAMPLES do."""
    for sampling in SAMPLINGS:
        for M in (4, 8):
            yield Arm(
                experiment="sampling_batch",
                line=f"iwae, {sampling}",
                x=M,
                method=learned("iwae", M, sampling=sampling),
                setting=Setting(batch=BATCH * SAMPLES // M),
            )


def large_batches() -> Iterator[Arm]:
    """Yield arms whose batch is large whatever M is: the noise of the steps matters less."""
    for sampling in ("independent", "stratified"):
        for M in (4, 8):
            method = learned("iwae", M, sampling=sampling)
            yield Arm(
                experiment="sampling_large",
                line=f"iwae, {sampling}",
                x=M,
                method=method,
                setting=Setting(batch=LARGE),
            )


def comparisons(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return each other sampling against as many independent samples, and twice as many."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        estimator, sampling = row["line"].split(", ")
        title, _ = HEADINGS[row["experiment"]]
        if sampling != "independent":
            pairs.setdefault(title, []).extend(
                summary.compare(row, rival)
                for rival in rows
                if (rival["experiment"], rival["line"])
                == (row["experiment"], f"{estimator}, independent")
                and rival["x"] in (row["x"], 2 * row["x"])
            )
    return pairs
