"""A study's report: made-up measurements with a known answer, the verdict and numbers they give."""

import copy
import functools
import json
import random
import statistics

import matplotlib.image
import matplotlib.text
import numpy as np
import pytest

from fastperturb.eval.likelihood import Likelihood
from fastperturb.report import bootstrap
from fastperturb.study import pictures, summary, table

DOMAINS = ["stories", "german", "code"]
COUNTS = {
    name: np.random.default_rng(n).integers(20, 200, 30 + n).tolist()
    for n, name in enumerate(DOMAINS)
}
# Nll in and out of domain, by view and whether it is tempered, of a study in which learned gains.
LEVELS = {
    "exact": {
        ("as_trained", False): (3.00, 4.10),
        ("as_trained", True): (3.00, 4.00),
        ("noise_added", False): (3.02, 4.05),
        ("noise_added", True): (3.01, 3.99),
    },
    "learned": {
        ("as_trained", False): (2.99, 3.92),
        ("as_trained", True): (2.99, 3.90),
        ("without_noise", False): (3.05, 4.20),
        ("without_noise", True): (3.00, 4.02),
    },
    "exact, rate x 2": {("as_trained", False): (3.0, 4.2), ("as_trained", True): (3.0, 4.1)},
    "exact, compute x 8": {("as_trained", False): (3.02, 4.1), ("as_trained", True): (3.02, 3.98)},
    "learned, deterministic": {("as_trained", False): (3.0, 4.1), ("as_trained", True): (3.0, 4.0)},
}
FACTS = {
    "exact": {"role": "baseline"},
    "learned": {"draws": 8, "shift": [[1, 0.2], [10, 0.1]], "validation_nll": 2.8},
    "exact, rate x 2": {
        "role": "control",
        "control": "learning_rate",
        "of": "exact",
        "learning_rate": 2e-3,
        "validation_nll": 3.1,
    },
    "exact, compute x 8": {"role": "control", "control": "equal_compute", "of": "exact"},
    "learned, deterministic": {
        "role": "control",
        "control": "deterministic",
        "of": "learned",
        "shift": [[1, 0.2]],
    },
}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Percentiles of a hundred resamples follow the same rules, and take no time."""
    few = functools.partial(bootstrap.mean_paired_difference, resamples=100)
    monkeypatch.setattr(bootstrap, "mean_paired_difference", few)


def likelihood(domain, nll, *, wobble=0.0, draws=1):
    """Of documents that differ, alike for every model but for what wobbles, and come out at nll."""
    counts = np.array(COUNTS[domain])
    own = np.random.default_rng(7).normal(size=len(counts))
    own += wobble * np.random.default_rng(round(1e6 * nll)).normal(size=len(counts))
    sums = counts * (nll + own - (counts @ own) / counts.sum())
    sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= draws]
    curve = {
        "num_samples": sizes,
        "nll": [nll + 0.1 / n - 0.1 / draws for n in sizes],
        "jackknife": [None, *[nll] * (len(sizes) - 1)],
    }
    return Likelihood(
        nll_sums=sums.tolist(),
        jackknife_sums=sums.tolist(),
        counts=counts.tolist(),
        num_samples=draws,
        curve=curve,
    ).to_dict()


def measurement(form, levels, *, draws, wobble=0.0):
    """German and code lie 0.5 below and above the level out of domain."""
    view, tuned = form
    nll = {"stories": levels[0], "german": levels[1] - 0.5, "code": levels[1] + 0.5}
    found = {name: likelihood(name, nll[name], wobble=wobble, draws=draws) for name in DOMAINS}
    return {
        "view": view,
        "tuned": tuned,
        "temperature": 1.1 if tuned else 1.0,
        "domains": found,
    }


def cell(method, seed, *, levels=None, deviation=0.002, wobble=0.0, **facts):
    """A run. Its levels move with the seed: by 0.1, as all others', and by a deviation of its own.

    Of three seeds the own one is -deviation, 0 and deviation, whose standard deviation it is.
    """
    facts = {
        "role": "method",
        "control": None,
        "of": None,
        "draws": 1,
        "steps": 100,
        "shift": [],
        **FACTS.get(method, {}),
        **facts,
    }
    levels = levels or LEVELS[method]
    own = 0.0 if method.startswith("exact") else deviation
    moved = 0.1 * seed + own * (seed - 1)
    evaluated = 32 if facts["draws"] > 1 else 1
    longer = 8 if facts["control"] == "equal_compute" else 1
    return {
        "method": method,
        "seed": seed,
        "learning_rate": 1e-3,
        "best_step": 80,
        "validation_nll": 2.9,
        "token_passes": 1000 * facts["draws"] * longer,
        "token_scales": None,
        "measurements": [
            measurement(
                form,
                [level + moved for level in found],
                draws=evaluated if form[0] == "as_trained" else 32 if "added" in form[0] else 1,
                wobble=wobble,
            )
            | {"validation_nll": facts.get("validation_nll", 2.9)}
            for form, found in levels.items()
        ],
        "learned": bool(facts["shift"]) and facts["control"] is None,
        **facts,
    }


def study(*, seeds=(0, 1, 2), methods=tuple(LEVELS), changes=(), more=(), **options):
    """Results of a study. changes: (method, form) to its levels instead of those above."""
    levels = copy.deepcopy(LEVELS)
    for (method, form), found in dict(changes).items():
        levels[method][form] = found
    cells = [cell(name, seed, levels=levels[name], **options) for seed in seeds for name in methods]
    base = [measurement(("as_trained", tuned), (4.0, 4.5), draws=1) for tuned in (False, True)]
    unigram = {
        text: {name: likelihood(name, nll) for name in DOMAINS}
        for text, nll in (("training", 6.0), ("own", 5.0))
    }
    return {
        "in_domain": "stories",
        "domains": DOMAINS,
        "baseline": "exact",
        "seeds": list(seeds),
        "base": base,
        "unigram": unigram,
        "cells": [*cells, *more],
        "config": {
            "draws": 32,
            "noise_scale": None,
            "train": {"perturb": {"init_scale": 0.2}},
        },
    }


def verdict_of(results, method="learned"):
    [found] = [v for v in summary.summarise(results)["verdicts"] if v["method"] == method]
    return found


def row_of(found, method, *, what=None, view="as_trained", tuned=True):
    [row] = [
        row
        for row in found["rows"]
        if (row["method"], row["view"], row["tuned"]) == (method, view, tuned)
        and what in (None, row["what"])
    ]
    return row


# The verdict


def test_below_every_control_out_of_domain_and_no_worse_in_it_is_a_gain():
    found = verdict_of(study())
    assert (found["outcome"], found["chosen"], found["missing"]) == ("gain", True, ())
    assert len(found["comparisons"]) == 7  # five controls, and the cost in domain beside two
    assert all(each["passed"] for each in found["comparisons"])
    assert found["sentence"] == (
        "learned: gain: the nearest control (the baseline at equal compute) is worse by "
        "0.0800 ± 0.0020, and the change in domain is -0.0100"
    )


@pytest.mark.parametrize(
    ("control", "form", "told"),
    [
        ("exact", ("as_trained", True), "the tempered baseline"),
        ("exact", ("noise_added", True), "noise added to the baseline at evaluation"),
        ("learned", ("without_noise", True), "itself without noise"),
        ("learned, deterministic", ("as_trained", True), "its deterministic twin"),
        ("exact, compute x 8", ("as_trained", True), "the baseline at equal compute"),
    ],
)
def test_one_control_that_is_better_settles_that_there_is_no_gain(control, form, told):
    found = verdict_of(study(changes={(control, form): (3.0, 3.888)}))
    assert found["outcome"] == "no gain"
    assert f"no gain: {told} is better by 0.0120" in found["sentence"]
    failed = {each["control"] for each in found["comparisons"] if each["passed"] is False}
    assert failed == {told}


@pytest.mark.parametrize("level", [3.0, 4.5])
def test_what_a_method_is_before_it_is_tempered_decides_nothing(level):
    found = verdict_of(study(changes={("learned", ("as_trained", False)): (level, level)}))
    assert found == verdict_of(study())


@pytest.mark.parametrize(("level", "outcome"), [(3.85, "no gain"), (4.0, "gain")])
def test_the_baseline_at_the_rate_of_the_method_is_a_control_where_another_rate_won(level, outcome):
    results = study()
    for each in results["cells"]:
        if each["control"] == "learning_rate":
            each["validation_nll"] = 2.5  # at twice the rate of all others
        if each["method"] == "exact":
            for measured in each["measurements"]:
                if (measured["view"], measured["tuned"]) == ("as_trained", True):
                    moved = (3.0 + 0.1 * each["seed"], level + 0.1 * each["seed"])
                    measured |= measurement(("as_trained", True), moved, draws=1)
        if each["control"] == "learning_rate":
            noisy = measurement(("noise_added", True), (3.1, 4.2 + 0.1 * each["seed"]), draws=32)
            each["measurements"].append(noisy | {"validation_nll": 2.5})
    found = verdict_of(results)
    assert found["outcome"] == outcome
    told = [each["control"] for each in found["comparisons"] if each["passed"] is False]
    assert told == (["the baseline at its rate"] if outcome == "no gain" else [])
    assert "the baseline at its rate" in [each["control"] for each in found["comparisons"]]


@pytest.mark.parametrize(("below", "outcome"), [(0.0035, "no gain"), (0.0045, "gain")])
def test_it_must_be_below_by_more_than_twice_the_spread(below, outcome):
    level = (2.99, 3.98 - below)
    changes = {("learned", ("as_trained", tuned)): level for tuned in (False, True)}
    found = verdict_of(study(changes=changes))
    assert found["outcome"] == outcome
    if outcome == "no gain":
        told = "it is below the baseline at equal compute by only 0.0035 ± 0.0020"
        assert told in found["sentence"]


@pytest.mark.parametrize(
    ("cost", "wobble", "outcome"),
    [(0.0035, 0.1, "gain"), (0.0045, 0.1, "no gain"), (0.0035, 0.0, "no gain")],
    ids=["less than twice", "more than twice", "less, but sure over documents"],
)
def test_a_cost_in_domain_spoils_a_gain(cost, wobble, outcome):
    changes = {("learned", ("as_trained", True)): (3.0 + cost, 3.9)}
    found = verdict_of(study(changes=changes, wobble=wobble))
    assert found["outcome"] == outcome
    if outcome == "no gain":
        told = f"it costs {cost:.4f} ± 0.0020 in domain beside the tempered baseline"
        assert told in found["sentence"]


def test_a_cost_in_domain_beside_the_baseline_at_equal_compute_spoils_a_gain_too():
    changes = {("exact, compute x 8", ("as_trained", True)): (2.9, 4.1)}
    found = verdict_of(study(changes=changes))
    assert found["outcome"] == "no gain"
    assert found["sentence"].endswith(
        "it is below every control; it costs 0.0900 ± 0.0020 in domain beside the baseline at "
        "equal compute"
    )


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("exact, compute x 8", "the baseline at equal compute"),
        ("learned, deterministic", "its deterministic twin"),
        ("noise_added", "noise added to the baseline at evaluation"),
        ("without_noise", "itself without noise"),
    ],
)
def test_a_gain_is_not_established_while_a_control_is_missing(left_out, told):
    results = study(methods=[name for name in LEVELS if name != left_out])
    for each in results["cells"]:
        each["measurements"] = [m for m in each["measurements"] if m["view"] != left_out]
    found = verdict_of(results)
    assert (found["outcome"], found["missing"]) == ("not established", (told,))
    assert f"not measured: {told}" in found["sentence"]
    # What was measured and is better settles it all the same.
    lost = study(
        changes={("exact", ("as_trained", True)): (3.0, 3.8)}, methods=["exact", "learned"]
    )
    assert verdict_of(lost)["outcome"] == "no gain"


def test_one_seed_establishes_nothing():
    found = verdict_of(study(seeds=[1]))
    assert found["outcome"] == "not established"
    assert "one seed has no spread" in found["sentence"]
    assert {(each["spread"], each["passed"]) for each in found["comparisons"]} == {(None, None)}
    worse = verdict_of(study(seeds=[1], changes={("exact", ("as_trained", True)): (3.0, 3.8)}))
    assert worse["outcome"] == "not established"
    assert "the tempered baseline is better by 0.1000" in worse["sentence"]


def test_a_control_that_shares_one_seed_with_a_method_leaves_it_open():
    results = study()
    results["cells"] = [
        each for each in results["cells"] if each["control"] != "deterministic" or each["seed"] == 0
    ]
    assert verdict_of(results)["outcome"] == "not established"


def test_an_interval_over_documents_that_reaches_0_is_told_with_the_gain():
    sure, unsure = (verdict_of(study(wobble=wobble)) for wobble in (0.0, 1.0))
    assert sure["outcome"] == unsure["outcome"] == "gain"
    assert "not certain" not in sure["sentence"]
    assert (
        "but over documents it is not certain against the tempered baseline" in unsure["sentence"]
    )


def test_methods_have_only_the_controls_that_there_can_be():
    plain = {("as_trained", tuned): (2.99, 3.9) for tuned in (False, True)}
    noisy = {**plain, ("without_noise", True): (3.0, 4.0)}
    more = [cell("neftune", seed, levels=plain) for seed in (0, 1, 2)]
    more += [cell("fixed", seed, levels=noisy, draws=8) for seed in (0, 1, 2)]
    results = study(more=more)
    always = {"the tempered baseline", "noise added to the baseline at evaluation"}
    of_noise = {"itself without noise", "the baseline at equal compute"}
    for method, wanted in (
        ("neftune", always),
        ("fixed", always | of_noise),
        ("learned", always | of_noise | {"its deterministic twin"}),
    ):
        found = verdict_of(results, method)
        assert {each["control"] for each in found["comparisons"]} == wanted
        assert not found["missing"]


def test_equal_compute_is_the_longer_training_that_is_nearest_to_the_methods():
    def longer(factor, seed):
        return cell(
            f"exact, compute x {factor}",
            seed,
            levels={("as_trained", tuned): (2.0, 3.0) for tuned in (False, True)},
            role="control",
            control="equal_compute",
            of="exact",
            token_passes=1000 * factor,
        )

    far = study(more=[longer(32, seed) for seed in (0, 1, 2)])
    assert verdict_of(far)["outcome"] == "gain"
    near = study(more=[longer(9, seed) for seed in (0, 1, 2)])
    for each in near["cells"]:
        if each["method"] == "learned":
            each["token_passes"] = 9000
    assert "the baseline at equal compute is better" in verdict_of(near)["sentence"]


# Choices, which validation makes


def test_the_baseline_is_of_each_seed_the_rate_that_validation_prefers():
    results = study()
    for each in results["cells"]:
        if each["control"] == "learning_rate" and each["seed"] == 1:
            each["validation_nll"] = 2.5
    found = summary.summarise(results)
    rates = [each["learning_rate"] for each in found["baseline"]["learning_rates"]]
    assert rates == [1e-3, 2e-3, 1e-3]
    expected = statistics.fmean([4.0, 4.1 + 0.1, 4.0 + 0.2])
    row = row_of(found, "exact", what="baseline")
    assert row["out_of_domain"] == pytest.approx(expected, abs=1e-9)
    own = [3.9 - 0.002 - 4.0, 3.9 - 4.1, 3.9 + 0.002 - 4.0]
    change = row_of(found, "learned")["difference"]["out_of_domain"]
    assert change["mean"] == pytest.approx(statistics.fmean(own), abs=1e-9)
    assert change["spread"] == pytest.approx(statistics.stdev(own), abs=1e-9)


def test_the_chosen_method_is_the_learned_one_that_validation_prefers_whatever_others_gain():
    better = {("as_trained", tuned): (2.0, 3.0) for tuned in (False, True)}
    shift = [[1, 0.2]]
    more = [
        cell("learned_b", seed, levels=better, draws=8, shift=shift, validation_nll=2.85)
        for seed in (0, 1, 2)
    ]
    more += [cell("fixed", seed, levels=better, draws=8, validation_nll=1.0) for seed in (0, 1, 2)]
    results = study(more=more)
    found = summary.summarise(results)
    assert found["chosen"] == "learned"
    assert [each["method"] for each in found["verdicts"]] == ["learned", "learned_b", "fixed"]
    assert "**Gain** for learned, the learned method" in table.markdown(
        results | {"summary": found}
    )


# Numbers


def test_rows_are_means_over_domains_and_seeds_and_changes_are_paired_by_seed():
    found = summary.summarise(study())
    row = row_of(found, "learned")
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
    untempered = row_of(found, "exact", what="baseline", tuned=False)
    assert untempered["difference"]["out_of_domain"]["mean"] == pytest.approx(0.1)
    base = row_of(found, "base")
    assert base["difference"]["out_of_domain"]["mean"] == pytest.approx(4.5 - 4.1)
    assert base["difference"]["out_of_domain"]["spread"] == pytest.approx(0.1)
    own = row_of(found, "unigram", what="unigram_own", tuned=False)
    assert (own["out_of_domain"], own["difference"]) == (pytest.approx(5.0), None)
    assert found["documents"] == {"stories": 30, "german": 31, "code": 32}


def test_intervals_are_of_documents_after_seeds_are_averaged():
    results = study(wobble=1.0)
    change = row_of(summary.summarise(results), "learned")["difference"]

    def averaged(method, name):
        likelihoods = [
            Likelihood.from_dict(m["domains"][name])
            for c in results["cells"]
            for m in c["measurements"]
            if (c["method"], m["view"], m["tuned"]) == (method, "as_trained", True)
        ]
        sums = np.mean([each.nll_sums for each in likelihoods], axis=0)
        return Likelihood(nll_sums=sums.tolist(), jackknife_sums=[], counts=COUNTS[name])

    pairs = [(averaged("learned", name), averaged("exact", name)) for name in DOMAINS]
    for found, domains in (
        (change["in_domain"], pairs[:1]),
        (change["domains"]["german"], pairs[1:2]),
        (change["out_of_domain"], pairs[1:]),
    ):
        interval = bootstrap.mean_paired_difference(domains)
        wanted = (interval.estimate, interval.low, interval.high)
        assert (found["mean"], found["low"], found["high"]) == pytest.approx(wanted)
        assert interval.low < interval.estimate < interval.high


def test_more_seeds_that_say_the_same_make_no_interval_narrower():
    once = study(seeds=[1], wobble=1.0)
    twice = copy.deepcopy(once)
    twice["cells"] += [{**each, "seed": 2} for each in once["cells"]]
    one, two = (
        row_of(summary.summarise(each), "learned")["difference"]["out_of_domain"]
        for each in (once, twice)
    )
    assert (one["low"], one["high"]) == pytest.approx((two["low"], two["high"]))
    assert (one["spread"], two["spread"]) == (None, 0.0)


def test_the_order_of_cells_says_nothing_and_files_say_the_same():
    levels = LEVELS["learned"]
    more = [cell(name, seed, levels=levels, draws=8) for name in "ab" for seed in (0, 1, 2)]
    results = study(wobble=1.0, more=more)
    wanted = json.dumps(summary.summarise(results), allow_nan=False)
    for reorder in (list.reverse, random.Random(0).shuffle):
        reordered = json.loads(json.dumps(results))
        reorder(reordered["cells"])
        assert json.dumps(summary.summarise(reordered), allow_nan=False) == wanted


def test_a_study_of_one_domain_or_without_its_baseline_is_refused():
    with pytest.raises(ValueError, match="domains must name one besides in_domain='stories'"):
        summary.summarise(study() | {"domains": ["stories"]})
    with pytest.raises(ValueError, match="must hold the baseline 'exact', got none"):
        summary.summarise(study(methods=["learned"]))


# The table


def told(results):
    return table.markdown(results | {"summary": summary.summarise(results)})


def cells_of(text):
    """The cells of every line of a table, without their padding."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[each.strip() for each in line.strip("|").split("|")] for line in lines]


def test_the_table_has_every_method_with_its_controls_under_it_and_what_needs_no_training_on_top():
    plain = {("as_trained", tuned): (2.99, 4.3) for tuned in (False, True)}
    text = told(study(more=[cell("neftune", seed, levels=plain) for seed in (0, 1, 2)]))
    first = text.split("## By domain")[0]
    assert [line[0] for line in cells_of(first)[2:]] == [
        "unigram of the training text",
        "unigram of the text itself",
        "base, untrained",
        "base, untrained, tempered",
        "**exact** (baseline)",
        "**exact** (baseline), tempered",
        "· noise of 0.2 added",
        "· at rate 0.001",
        "· at rate 0.002",
        "· exact, compute x 8",
        "**learned** (chosen)",
        "**learned** (chosen), tempered",
        "· without noise",
        "· deterministic twin",
        "**neftune**",
        "**neftune**, tempered",
    ]


def test_the_table_tells_numbers_changes_and_their_uncertainty():
    lines = {line[0]: line for line in cells_of(told(study()).split("## By domain")[0])}
    assert lines["**learned** (chosen), tempered"][1:] == [
        "1.1",
        "8",
        "100",
        "8x",
        "3.090",
        "4.000",
        "-0.0100 ± 0.0020",
        "-0.1000 ± 0.0020 [-0.1000, -0.1000]",
    ]
    assert lines["**exact** (baseline), tempered"][-2:] == ["0", "0"]
    assert lines["unigram of the text itself"][1:] == ["", "", "", "", "5.000", "5.000", "", ""]
    one_seed = told(study(seeds=[1]))
    assert "±" not in one_seed.split("## How to read it")[0]
    assert "-0.1000 [-0.1000, -0.1000]" in one_seed


def test_the_table_by_domain_marks_the_changes_whose_interval_is_without_0():
    sure, unsure = (
        cells_of(told(study(wobble=wobble)).split("## By domain")[1])[-1] for wobble in (0.0, 1.0)
    )
    assert sure[0] == unsure[0] == "**learned** (chosen), tempered"
    assert sure[1:] == ["-0.0100 ± 0.0020*", "-0.1000 ± 0.0020*", "-0.1000 ± 0.0020*"]
    assert unsure[1:] == ["-0.0100 ± 0.0020", "-0.1000 ± 0.0020", "-0.1000 ± 0.0020"]


def test_the_text_begins_with_the_verdict_on_the_chosen_method_and_tells_all_of_them():
    plain = {("as_trained", tuned): (2.99, 4.3) for tuned in (False, True)}
    results = study(more=[cell("neftune", seed, levels=plain) for seed in (0, 1, 2)])
    text = told(results)
    assert text.splitlines()[0] == "# Trained on stories, judged on 2 other domains"
    assert text.splitlines()[2].startswith(
        "**Gain** for learned, the learned method that in-domain validation prefers: tempered, its "
        "nll out of domain is 4.000, -0.1000 ± 0.0020 [-0.1000, -0.1000] from that of exact"
    )
    for verdict in summary.summarise(results)["verdicts"]:
        assert f"- {verdict['sentence']}\n" in text
    assert "**Gain, uncertain over documents,** for learned" in told(study(wobble=1.0))
    assert "No method with a learned perturbation" in told(study(methods=["exact"]))


def test_columns_line_up_and_names_do_not_break_them():
    levels = LEVELS["learned"]
    more = [cell("a | b", seed, levels=levels, draws=8) for seed in (0, 1, 2)]
    text = told(study(more=more))
    for part in text.split("## By domain"):
        assert len({len(line) for line in part.splitlines() if line.startswith("|")}) == 1
    assert "**a \\| b**" in text


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """What is saved, by its file's name."""
    found = {}
    save = pictures.Figure.savefig

    def keep(self, path):
        found[path.name] = self
        save(self, path)

    monkeypatch.setattr(pictures.Figure, "savefig", keep)
    return found


def drawable(**options):
    results = study(**options)
    for each in results["cells"]:
        if each["method"] == "learned":
            most = [["▁the", 0.4], ["$x$", 0.35], ["中", 0.3]]
            each["token_scales"] = {"most": most, "least": [["▁a", 0.01], ["_", 0.02]]}
    return results | {"summary": summary.summarise(results)}


def texts_of(axes):
    return {text.get_text() for text in axes.texts}


def test_pictures_show_every_method_where_it_was_measured(tmp_path, figures):
    more = [cell("fixed", seed, levels=LEVELS["learned"], draws=8) for seed in (0, 1, 2)]
    pictures.draw(drawable(more=more, wobble=1.0), tmp_path)
    assert sorted(figures) == ["changes.png", "draws.png", "shift.png", "token_scales.png"]
    for name in figures:
        pixels = matplotlib.image.imread(tmp_path / name)
        assert 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5, name
    tempered = figures["changes.png"].axes[1]
    assert {"learned", "fixed", "exact, noise added", "exact, compute x 8"} < texts_of(tempered)
    marks = {tuple(np.round([*line.get_xdata(), *line.get_ydata()], 6)) for line in tempered.lines}
    assert {(-0.01, -0.1), (0.0, 0.0)} < marks
    assert {"learned", "fixed", "exact, tempered"} < texts_of(figures["draws.png"].axes[1])


def test_the_curves_by_draws_are_means_over_domains_and_seeds(tmp_path, figures):
    pictures.draw(drawable(), tmp_path)
    outside = figures["draws.png"].axes[1]
    [line] = [each for each in outside.lines if each.get_color() == pictures.CHOSEN]
    assert list(line.get_xdata()) == [1, 2, 4, 8, 16, 32]
    wanted = [3.92 + 0.1 + 0.1 / n - 0.1 / 32 for n in (1, 2, 4, 8, 16, 32)]
    assert list(line.get_ydata()) == pytest.approx(wanted)


def test_shift_and_scales_are_those_of_the_learned_method(tmp_path, figures):
    pictures.draw(drawable(), tmp_path)
    *seeds, mean = figures["shift.png"].axes[0].lines
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([1, 10], pytest.approx([0.2, 0.1]))
    assert len(seeds) == 3
    [panel] = figures["token_scales.png"].axes
    # A sign that the font lacks is told by its number, and dollars are no formula.
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["▁the", "\\$x\\$", "\\u4e2d", "_", "▁a"]
    assert list(panel.lines[0].get_xdata()) == [0.4, 0.35, 0.3, 0.02, 0.01]


def test_without_learned_methods_there_are_fewer_pictures_and_one_seed_is_enough(tmp_path, figures):
    pictures.draw(drawable(methods=["exact"], seeds=[0]), tmp_path)
    assert sorted(figures) == ["changes.png", "draws.png"]


def test_names_of_crowded_marks_do_not_overlap(tmp_path, figures):
    more = [
        cell(f"method {n}", seed, levels=LEVELS["learned"], draws=8)
        for n in range(12)
        for seed in (0, 1)
    ]
    pictures.draw(drawable(more=more, seeds=[0, 1]), tmp_path)
    for figure in figures.values():
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            names = [each for each in axes.texts if hasattr(each, "arrow_patch")]
            # An annotation's own extent would count the line that leads to it.
            places = [matplotlib.text.Text.get_window_extent(each) for each in names]
            for n, one in enumerate(places):
                assert not any(one.overlaps(other) for other in places[n + 1 :])
                assert min(one.x0, one.y0) >= 0
                assert one.x1 <= width and one.y1 <= height
