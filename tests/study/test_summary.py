"""The summary of made-up results: means, differences and documents."""

import json
import random

import pytest
from study_cases import LEVELS, cell, row_of, study_results

from fastperturb.study import summary


def test_rows_are_means_over_domains_and_seeds_and_changes_are_paired_by_seed():
    summarised = summary.summarise(study_results())
    row = row_of(summarised, "learned")
    # Seeds add 0, 0.1 and 0.2 to every model, which pairing takes out, and -0.002, 0 and 0.002.
    assert row["in_domain"] == pytest.approx(2.99 + 0.1)
    assert row["out_of_domain"] == pytest.approx(3.90 + 0.1)
    assert row["domains"]["german"] == pytest.approx(3.40 + 0.1)
    assert (row["seeds"], row["compute"], row["draws"]) == ([0, 1, 2], 8.0, 8)
    change = row["difference"]["out_of_domain"]
    assert change["mean"] == pytest.approx(-0.1)
    assert change["spread"] == pytest.approx(0.002)
    # Models that differ alike on every document differ as surely on any of them.
    assert (change["low"], change["high"]) == pytest.approx((-0.1, -0.1))
    untempered = row_of(summarised, "exact", what="baseline", tuned=False)
    assert untempered["difference"]["out_of_domain"]["mean"] == pytest.approx(0.1)
    base = row_of(summarised, "base")
    assert base["difference"]["out_of_domain"]["mean"] == pytest.approx(4.5 - 4.1)
    assert base["difference"]["out_of_domain"]["spread"] == pytest.approx(0.1)
    own = row_of(summarised, "unigram", what="unigram_own", tuned=False)
    assert (own["out_of_domain"], own["difference"]) == (pytest.approx(5.0), None)
    assert summarised["documents"] == {"stories": 30, "german": 31, "code": 32}


def test_neither_the_order_of_cells_nor_a_round_trip_through_json_changes_the_summary():
    levels = LEVELS["learned"]
    more = [cell(name, seed, levels=levels, draws=8) for name in "ab" for seed in (0, 1, 2)]
    results = study_results(wobble=1.0, more=more)
    wanted = json.dumps(summary.summarise(results), allow_nan=False)
    for reorder in (list.reverse, random.Random(0).shuffle):
        reordered = json.loads(json.dumps(results))
        reorder(reordered["cells"])
        assert json.dumps(summary.summarise(reordered), allow_nan=False) == wanted
