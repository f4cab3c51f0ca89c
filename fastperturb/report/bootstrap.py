"""Intervals by resampling documents, which are what could have come out otherwise.

Tokens of a document depend on each other, so documents are the unit: a resample draws as many of
them with replacement, and what is estimated from it is a ratio, sum over documents of what was
measured / sum of what it was measured on. Both models of a difference are judged on the same
resample. Intervals are between percentiles; of a handful of documents they are too narrow, which
is why an `Interval` says of how many it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastperturb.eval.likelihood import Likelihood

Floats = NDArray[np.float64]

# Documents that are drawn at a time, over all resamples: some tens of megabytes.
_DRAWN_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it; documents: of how many (at the least) it is made."""

    estimate: float
    low: float
    high: float
    documents: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(
    ours: Likelihood,
    baseline: Likelihood,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Our nll a token less the baseline's: below 0, ours is better."""
    return mean_paired_difference([(ours, baseline)], resamples=resamples, level=level, seed=seed)


def mean_paired_difference(
    pairs: Sequence[tuple[Likelihood, Likelihood]],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean over domains of our nll less the baseline's; a pair is one domain's two."""
    sums = [_differences(ours, baseline) for ours, baseline in pairs]
    counts = [np.asarray(ours.counts, dtype=np.float64) for ours, _ in pairs]
    return mean_ratio(sums, counts, resamples=resamples, level=level, seed=seed)


def mean_ratio(
    sums: Sequence[ArrayLike],
    counts: Sequence[ArrayLike],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean over domains of sum / count, documents resampled within each domain.

    sums, counts: of each domain, those of its documents; documents of count 0 say nothing.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if not sums:
        raise ValueError("there must be at least one domain to resample, got none")
    estimates, drawn, documents = [], np.zeros(resamples), []
    for domain, (each_sum, each_count) in enumerate(zip(sums, counts, strict=True)):
        total, count = np.asarray(each_sum, dtype=float), np.asarray(each_count, dtype=float)
        total, count = total[count > 0], count[count > 0]
        if not len(count):
            raise ValueError("a domain has no document with anything measured: nothing to resample")
        random = np.random.default_rng([seed, domain])
        estimates.append(total.sum() / count.sum())
        drawn += _resampled(total, count, resamples, random) / len(sums)
        documents.append(len(count))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(estimates)), float(low), float(high), min(documents))


def _resampled(sums: Floats, counts: Floats, resamples: int, random: np.random.Generator) -> Floats:
    """The ratio in each resample [resamples]."""
    at_once = max(1, _DRAWN_AT_ONCE // len(counts))
    parts = []
    for first in range(0, resamples, at_once):
        size = (min(at_once, resamples - first), len(counts))
        chosen = random.integers(len(counts), size=size)
        parts.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return np.concatenate(parts)


def _differences(ours: Likelihood, baseline: Likelihood) -> Floats:
    """Of each document's summed nll."""
    if len(ours.counts) != len(baseline.counts):
        raise ValueError(
            f"ours is of {len(ours.counts)} documents and baseline of {len(baseline.counts)}: "
            "measure both on the same domain"
        )
    differ = [n for n, (a, b) in enumerate(zip(ours.counts, baseline.counts)) if a != b]
    if differ:
        first = differ[0]
        raise ValueError(
            f"ours and baseline differ in the labels of {len(differ)} documents: number {first} "
            f"has {ours.counts[first]} and {baseline.counts[first]}; measure both on the same "
            "domain, with one tokenizer"
        )
    return np.asarray(ours.nll_sums, dtype=float) - np.asarray(baseline.nll_sums, dtype=float)
