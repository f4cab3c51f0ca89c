"""Bootstrap intervals over documents.

Tokens of one document depend on each other, so documents are the unit that is resampled: a
resample draws as many documents as there are, with replacement. The estimate is a ratio: the sum
of a quantity over documents, divided by the number of labels that it was measured on. A
difference between two models evaluates both on the same resample. Intervals lie between
percentiles. They are too narrow when there are only a handful of documents, so an `Interval`
records how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# With fewer documents than this an interval over them means little.
FEW_DOCUMENTS = 5

# Documents drawn at a time, over all resamples: some tens of megabytes.
_DRAWN_AT_ONCE = 1 << 21

_Floats = NDArray[np.float64]


class DocumentSums(NamedTuple):
    """A quantity summed over each document of a domain, and the labels that each sum covers."""

    sums: ArrayLike  # [documents]
    counts: ArrayLike  # [documents]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    documents: the number of documents behind it; of several domains, the smallest number.
    """

    estimate: float
    low: float
    high: float
    documents: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(
    ours: DocumentSums,
    baseline: DocumentSums,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate our nll per token minus the baseline's: below 0, ours is better."""
    return mean_paired_difference([(ours, baseline)], resamples=resamples, level=level, seed=seed)


def mean_paired_difference(
    pairs: Sequence[tuple[DocumentSums, DocumentSums]],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate the mean over domains of our nll per token minus the baseline's.

    pairs: for each domain, (ours, baseline).
    """
    sums = [_sum_differences(ours, baseline) for ours, baseline in pairs]
    counts = [ours.counts for ours, _ in pairs]
    return mean_ratio(sums, counts, resamples=resamples, level=level, seed=seed)


def mean_ratio(
    sums: Sequence[ArrayLike],
    counts: Sequence[ArrayLike],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate the mean over domains of sum / count, resampling documents within each domain.

    sums, counts: for each domain, one entry per document. Documents with count 0 are ignored.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if not sums:
        raise ValueError("there must be at least one domain to resample, got none")
    estimates, resampled_mean, documents = [], np.zeros(resamples), []
    for domain, (domain_sums, domain_counts) in enumerate(zip(sums, counts, strict=True)):
        totals = np.asarray(domain_sums, dtype=float)
        labels = np.asarray(domain_counts, dtype=float)
        totals, labels = totals[labels > 0], labels[labels > 0]
        if not len(labels):
            raise ValueError("a domain has no document with anything measured: nothing to resample")
        generator = np.random.default_rng([seed, domain])
        estimates.append(totals.sum() / labels.sum())
        resampled_mean += _resampled_ratios(totals, labels, resamples, generator) / len(sums)
        documents.append(len(labels))
    low, high = np.quantile(resampled_mean, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(estimates)), float(low), float(high), min(documents))


def _resampled_ratios(
    sums: _Floats, counts: _Floats, resamples: int, generator: np.random.Generator
) -> _Floats:
    """Return the ratio in each resample [resamples]."""
    at_once = max(1, _DRAWN_AT_ONCE // len(counts))
    parts = []
    for first in range(0, resamples, at_once):
        size = (min(at_once, resamples - first), len(counts))
        chosen = generator.integers(len(counts), size=size)
        parts.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return np.concatenate(parts)


def _sum_differences(ours: DocumentSums, baseline: DocumentSums) -> _Floats:
    """Return our sum minus the baseline's for each document; both must cover the same labels."""
    our_counts, counts = np.asarray(ours.counts), np.asarray(baseline.counts)
    if len(our_counts) != len(counts):
        raise ValueError(
            f"ours has {len(our_counts)} documents and baseline has {len(counts)}: measure both "
            "on the same domain"
        )
    differing = np.flatnonzero(our_counts != counts)
    if len(differing):
        first = differing[0]
        raise ValueError(
            f"ours and baseline differ in the number of labels of {len(differing)} documents: "
            f"document {first} has {our_counts[first]} and {counts[first]}; measure both on the "
            "same domain, with one tokenizer"
        )
    return np.asarray(ours.sums, dtype=float) - np.asarray(baseline.sums, dtype=float)
