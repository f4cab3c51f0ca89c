"""Arms of made-up results: the chosen rate and method, and differences paired by seed."""

import copy
import statistics

import numpy as np
import pytest
from study_cases import COUNTS, DOMAINS, cell, row_of, study_results

from fastperturb.eval.likelihood import Likelihood
from fastperturb.report import bootstrap
from fastperturb.report.bootstrap import DocumentSums
from fastperturb.study import summary, table


def test_the_baseline_has_for_each_seed_the_rate_that_validation_prefers():
    results = study_results()
    for entry in results["cells"]:
        if entry["control"] == "learning_rate" and entry["seed"] == 1:
            entry["validation_nll"] = 2.5
    summarised = summary.summarise(results)
    rates = [entry["learning_rate"] for entry in summarised["baseline"]["learning_rates"]]
    assert rates == [1e-3, 2e-3, 1e-3]
    expected = statistics.fmean([4.0, 4.1 + 0.1, 4.0 + 0.2])
    row = row_of(summarised, "exact", what="baseline")
    assert row["out_of_domain"] == pytest.approx(expected, abs=1e-9)
    own = [3.9 - 0.002 - 4.0, 3.9 - 4.1, 3.9 + 0.002 - 4.0]
    change = row_of(summarised, "learned")["difference"]["out_of_domain"]
    assert change["mean"] == pytest.approx(statistics.fmean(own), abs=1e-9)
    assert change["spread"] == pytest.approx(statistics.stdev(own), abs=1e-9)


def test_the_chosen_method_is_the_learned_method_that_validation_prefers():
    better = {("as_trained", tuned): (2.0, 3.0) for tuned in (False, True)}
    shift = [[1, 0.2]]
    more = [
        cell("learned_b", seed, levels=better, draws=8, shift=shift, validation_nll=2.85)
        for seed in (0, 1, 2)
    ]
    more += [cell("fixed", seed, levels=better, draws=8, validation_nll=1.0) for seed in (0, 1, 2)]
    results = study_results(more=more)
    summarised = summary.summarise(results)
    assert summarised["chosen"] == "learned"
    methods = [verdict["method"] for verdict in summarised["verdicts"]]
    assert methods == ["learned", "learned_b", "fixed"]
    report = table.markdown(results | {"summary": summarised})
    assert "**Gain** for learned, the learned method" in report


def test_intervals_are_over_documents_with_seeds_averaged():
    results = study_results(wobble=1.0)
    change = row_of(summary.summarise(results), "learned")["difference"]

    def mean_sums(method, name):
        likelihoods = [
            Likelihood.from_dict(m["domains"][name])
            for c in results["cells"]
            for m in c["measurements"]
            if (c["method"], m["view"], m["tuned"]) == (method, "as_trained", True)
        ]
        sums = np.mean([one.nll_sums for one in likelihoods], axis=0)
        return DocumentSums(sums, COUNTS[name])

    pairs = [(mean_sums("learned", name), mean_sums("exact", name)) for name in DOMAINS]
    for difference, domains in (
        (change["in_domain"], pairs[:1]),
        (change["domains"]["german"], pairs[1:2]),
        (change["out_of_domain"], pairs[1:]),
    ):
        interval = bootstrap.mean_paired_difference(domains)
        wanted = (interval.estimate, interval.low, interval.high)
        assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx(wanted)
        assert interval.low < interval.estimate < interval.high


def test_a_second_seed_with_the_same_results_does_not_narrow_an_interval():
    once = study_results(seeds=[1], wobble=1.0)
    twice = copy.deepcopy(once)
    twice["cells"] += [{**entry, "seed": 2} for entry in once["cells"]]
    one, two = (
        row_of(summary.summarise(results), "learned")["difference"]["out_of_domain"]
        for results in (once, twice)
    )
    assert (one["low"], one["high"]) == pytest.approx((two["low"], two["high"]))
    assert (one["spread"], two["spread"]) == (None, 0.0)


def test_results_of_one_domain_or_without_the_baseline_are_rejected():
    with pytest.raises(ValueError, match="domains must name one besides in_domain='stories'"):
        summary.summarise(study_results() | {"domains": ["stories"]})
    with pytest.raises(ValueError, match="must hold the baseline 'exact', got none"):
        summary.summarise(study_results(methods=["learned"]))
