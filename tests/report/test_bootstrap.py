"""Intervals over documents: against enumeration, closed forms and simulated truths."""

import math

import numpy as np
import pytest

from fastperturb.report import bootstrap
from fastperturb.report.bootstrap import DocumentSums


def documents(random, *, count, between=0.3, within=1.0, shift=0.0):
    """Sums of two models on documents of 20 to 400 labels; their difference varies by document."""
    counts = random.integers(20, 400, size=count)
    lean = random.normal(shift, between, size=count)
    difference = counts * lean + random.normal(size=count) * within * np.sqrt(counts)
    common = counts * random.normal(4.0, 2.0, size=count)
    return DocumentSums(common + difference, counts), DocumentSums(common, counts)


def test_two_documents_give_the_quantiles_of_their_four_resamples():
    ours, baseline = DocumentSums([30, 10], [10, 30]), DocumentSums([10, 40], [10, 30])
    interval = bootstrap.paired_difference(ours, baseline)
    # 2 and -1 per label come with probability 1/4 each, both documents with 1/2.
    assert interval == bootstrap.Interval((20 - 30) / 40, -1.0, 2.0, 2)
    middle = bootstrap.paired_difference(ours, baseline, level=0.4)
    assert (middle.low, middle.high) == (-0.25, -0.25)


def test_documents_of_equal_length_give_the_normal_interval_of_a_mean():
    random = np.random.default_rng(0)
    lean = random.normal(0.1, 1.0, size=400)
    baseline = DocumentSums(np.full(400, 200.0), np.full(400, 50))
    ours = DocumentSums(200 + 50 * lean, np.full(400, 50))
    interval = bootstrap.paired_difference(ours, baseline)
    half = 1.96 * lean.std() / math.sqrt(400)
    assert interval.estimate == pytest.approx(lean.mean())
    assert interval.low == pytest.approx(lean.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(lean.mean() + half, abs=0.05 * half)


def test_a_resample_is_divided_by_its_own_number_of_labels():
    """Against a loop that resamples the ratio one document at a time."""
    ours, baseline = documents(np.random.default_rng(1), count=12)
    interval = bootstrap.paired_difference(ours, baseline)
    random = np.random.default_rng(2)
    ratios = []
    for _ in range(10_000):
        total = labels = 0
        for chosen in random.integers(12, size=12):
            total += ours.sums[chosen] - baseline.sums[chosen]
            labels += ours.counts[chosen]
        ratios.append(total / labels)
    spread = np.std(ratios)
    # The quantiles of 10,000 resamples are known to some 2% of the spread.
    assert interval.low == pytest.approx(np.quantile(ratios, 0.025), abs=0.1 * spread)
    assert interval.high == pytest.approx(np.quantile(ratios, 0.975), abs=0.1 * spread)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random, truth, covered = np.random.default_rng(3), 0.05, 0
    for _ in range(400):
        ours, baseline = documents(random, count=60, shift=truth)
        interval = bootstrap.paired_difference(ours, baseline, resamples=500)
        covered += interval.low <= truth <= interval.high
    # Three binomial standard deviations around 95%, and a percent for the 60 documents.
    assert 0.907 <= covered / 400 <= 0.983


def test_the_difference_of_a_model_from_itself_is_zero():
    ours, _ = documents(np.random.default_rng(4), count=30)
    assert bootstrap.paired_difference(ours, ours) == bootstrap.Interval(0.0, 0.0, 0.0, 30)


def test_nll_that_both_models_share_cancels():
    ours, _ = documents(np.random.default_rng(5), count=30)
    harder = DocumentSums(ours.sums + 0.25 * ours.counts, ours.counts)
    interval = bootstrap.paired_difference(harder, ours)
    assert interval.low == pytest.approx(0.25) and interval.high == pytest.approx(0.25)


def test_the_mean_over_domains_gives_each_the_same_weight():
    random = np.random.default_rng(6)
    small, large = documents(random, count=8), documents(random, count=500)
    alone = [bootstrap.paired_difference(*pair) for pair in (small, large)]
    both = bootstrap.mean_paired_difference([small, large])
    assert both.estimate == pytest.approx((alone[0].estimate + alone[1].estimate) / 2)
    half = [(one.high - one.low) / 2 for one in alone]
    # Domains are resampled independently of each other, so half-widths add as errors do.
    assert (both.high - both.low) / 2 == pytest.approx(math.hypot(*half) / 2, rel=0.1)
    assert both.documents == 8
    assert bootstrap.mean_paired_difference([small]) == alone[0]


def test_domains_of_equal_size_are_resampled_independently():
    pair = documents(np.random.default_rng(9), count=40)
    alone, twice = (bootstrap.mean_paired_difference([pair] * times) for times in (1, 2))
    assert twice.high - twice.low == pytest.approx((alone.high - alone.low) / math.sqrt(2), rel=0.1)


def test_the_seed_determines_the_interval_whatever_is_drawn_at_a_time(monkeypatch):
    ours, baseline = documents(np.random.default_rng(7), count=40)
    interval = bootstrap.paired_difference(ours, baseline, seed=3)
    assert interval == bootstrap.paired_difference(ours, baseline, seed=3)
    assert interval != bootstrap.paired_difference(ours, baseline, seed=4)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 1000)
    assert bootstrap.paired_difference(ours, baseline, seed=3) == interval


def test_a_document_without_labels_is_ignored():
    ours, baseline = documents(np.random.default_rng(8), count=10)
    longer = [DocumentSums([*model.sums, 0.0], [*model.counts, 0]) for model in (ours, baseline)]
    assert bootstrap.paired_difference(*longer) == bootstrap.paired_difference(ours, baseline)


@pytest.mark.parametrize(
    ("ours", "baseline", "message"),
    [
        (([1, 2], [3, 4]), ([1], [3]), "ours has 2 documents and baseline has 1"),
        (([1, 2], [3, 4]), ([1, 2], [3, 5]), "labels of 1 documents: document 1 has 4 and 5"),
        (([0, 0], [0, 0]), ([0, 0], [0, 0]), "no document with anything measured"),
    ],
)
def test_sums_that_cannot_be_compared_are_rejected(ours, baseline, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.paired_difference(DocumentSums(*ours), DocumentSums(*baseline))
