"""The verdict on made-up results: a gain, no gain, or not established."""

import pytest
from study_cases import LEVELS, cell, measurement, study_results, verdict_of


def test_below_every_control_out_of_domain_and_no_worse_in_domain_is_a_gain():
    verdict = verdict_of(study_results())
    assert (verdict["outcome"], verdict["chosen"], verdict["missing"]) == ("gain", True, ())
    assert len(verdict["comparisons"]) == 7  # five controls, and the cost in domain beside two
    assert all(comparison["passed"] for comparison in verdict["comparisons"])
    assert verdict["sentence"] == (
        "learned: gain: the nearest control (the baseline at equal compute) is worse by "
        "0.0800 ± 0.0020, and the change in domain is -0.0100"
    )


@pytest.mark.parametrize(
    ("control", "form", "named"),
    [
        ("exact", ("as_trained", True), "the tempered baseline"),
        ("exact", ("noise_added", True), "noise added to the baseline at evaluation"),
        ("learned", ("without_noise", True), "itself without noise"),
        ("learned, deterministic", ("as_trained", True), "its deterministic twin"),
        ("exact, compute x 8", ("as_trained", True), "the baseline at equal compute"),
    ],
)
def test_a_single_control_with_a_lower_nll_means_no_gain(control, form, named):
    verdict = verdict_of(study_results(changes={(control, form): (3.0, 3.888)}))
    assert verdict["outcome"] == "no gain"
    assert f"no gain: {named} is better by 0.0120" in verdict["sentence"]
    failed = {
        comparison["control"]
        for comparison in verdict["comparisons"]
        if comparison["passed"] is False
    }
    assert failed == {named}


@pytest.mark.parametrize("level", [3.0, 4.5])
def test_the_nll_before_tempering_does_not_change_the_verdict(level):
    verdict = verdict_of(
        study_results(changes={("learned", ("as_trained", False)): (level, level)})
    )
    assert verdict == verdict_of(study_results())


@pytest.mark.parametrize(("level", "outcome"), [(3.85, "no gain"), (4.0, "gain")])
def test_where_another_rate_won_the_baseline_at_the_methods_rate_is_a_control(level, outcome):
    results = study_results()
    for entry in results["cells"]:
        if entry["control"] == "learning_rate":
            entry["validation_nll"] = 2.5  # at twice the rate of all others
        if entry["method"] == "exact":
            for measured in entry["measurements"]:
                if (measured["view"], measured["tuned"]) == ("as_trained", True):
                    levels = (3.0 + 0.1 * entry["seed"], level + 0.1 * entry["seed"])
                    measured |= measurement(("as_trained", True), levels, draws=1)
        if entry["control"] == "learning_rate":
            noisy = measurement(("noise_added", True), (3.1, 4.2 + 0.1 * entry["seed"]), draws=32)
            entry["measurements"].append(noisy | {"validation_nll": 2.5})
    verdict = verdict_of(results)
    assert verdict["outcome"] == outcome
    named = [
        comparison["control"]
        for comparison in verdict["comparisons"]
        if comparison["passed"] is False
    ]
    assert named == (["the baseline at its rate"] if outcome == "no gain" else [])
    assert "the baseline at its rate" in [c["control"] for c in verdict["comparisons"]]


@pytest.mark.parametrize(("below", "outcome"), [(0.0035, "no gain"), (0.0045, "gain")])
def test_a_gain_is_below_every_control_by_more_than_twice_the_spread(below, outcome):
    level = (2.99, 3.98 - below)
    changes = {("learned", ("as_trained", tuned)): level for tuned in (False, True)}
    verdict = verdict_of(study_results(changes=changes))
    assert verdict["outcome"] == outcome
    if outcome == "no gain":
        named = "it is below the baseline at equal compute by only 0.0035 ± 0.0020"
        assert named in verdict["sentence"]


@pytest.mark.parametrize(
    ("cost", "wobble", "outcome"),
    [(0.0035, 0.1, "gain"), (0.0045, 0.1, "no gain"), (0.0035, 0.0, "no gain")],
    ids=["less than twice", "more than twice", "less, but sure over documents"],
)
def test_a_cost_in_domain_means_no_gain(cost, wobble, outcome):
    changes = {("learned", ("as_trained", True)): (3.0 + cost, 3.9)}
    verdict = verdict_of(study_results(changes=changes, wobble=wobble))
    assert verdict["outcome"] == outcome
    if outcome == "no gain":
        named = f"it costs {cost:.4f} ± 0.0020 in domain beside the tempered baseline"
        assert named in verdict["sentence"]


def test_a_cost_in_domain_against_the_baseline_at_equal_compute_means_no_gain():
    changes = {("exact, compute x 8", ("as_trained", True)): (2.9, 4.1)}
    verdict = verdict_of(study_results(changes=changes))
    assert verdict["outcome"] == "no gain"
    assert verdict["sentence"].endswith(
        "it is below every control; it costs 0.0900 ± 0.0020 in domain beside the baseline at "
        "equal compute"
    )


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("exact, compute x 8", "the baseline at equal compute"),
        ("learned, deterministic", "its deterministic twin"),
        ("noise_added", "noise added to the baseline at evaluation"),
        ("without_noise", "itself without noise"),
    ],
)
def test_a_gain_is_not_established_while_a_control_is_missing(left_out, named):
    results = study_results(methods=[name for name in LEVELS if name != left_out])
    for entry in results["cells"]:
        entry["measurements"] = [m for m in entry["measurements"] if m["view"] != left_out]
    verdict = verdict_of(results)
    assert (verdict["outcome"], verdict["missing"]) == ("not established", (named,))
    assert f"not measured: {named}" in verdict["sentence"]
    # What was measured and is better settles it all the same.
    lost = study_results(
        changes={("exact", ("as_trained", True)): (3.0, 3.8)}, methods=["exact", "learned"]
    )
    assert verdict_of(lost)["outcome"] == "no gain"


def test_with_one_seed_no_gain_and_no_loss_is_established():
    verdict = verdict_of(study_results(seeds=[1]))
    assert verdict["outcome"] == "not established"
    assert "one seed has no spread" in verdict["sentence"]
    assert {(c["spread"], c["passed"]) for c in verdict["comparisons"]} == {(None, None)}
    worse = verdict_of(
        study_results(seeds=[1], changes={("exact", ("as_trained", True)): (3.0, 3.8)})
    )
    assert worse["outcome"] == "not established"
    assert "the tempered baseline is better by 0.1000" in worse["sentence"]


def test_with_a_control_on_one_seed_only_a_gain_is_not_established():
    results = study_results()
    results["cells"] = [
        entry
        for entry in results["cells"]
        if entry["control"] != "deterministic" or entry["seed"] == 0
    ]
    assert verdict_of(results)["outcome"] == "not established"


def test_the_sentence_of_a_gain_mentions_intervals_over_documents_that_include_0():
    sure, unsure = (verdict_of(study_results(wobble=wobble)) for wobble in (0.0, 1.0))
    assert sure["outcome"] == unsure["outcome"] == "gain"
    assert "not certain" not in sure["sentence"]
    assert (
        "but over documents it is not certain against the tempered baseline" in unsure["sentence"]
    )


def test_each_method_has_the_controls_that_apply_to_it():
    plain = {("as_trained", tuned): (2.99, 3.9) for tuned in (False, True)}
    noisy = {**plain, ("without_noise", True): (3.0, 4.0)}
    more = [cell("neftune", seed, levels=plain) for seed in (0, 1, 2)]
    more += [cell("fixed", seed, levels=noisy, draws=8) for seed in (0, 1, 2)]
    results = study_results(more=more)
    always = {"the tempered baseline", "noise added to the baseline at evaluation"}
    of_noise = {"itself without noise", "the baseline at equal compute"}
    for method, wanted in (
        ("neftune", always),
        ("fixed", always | of_noise),
        ("learned", always | of_noise | {"its deterministic twin"}),
    ):
        verdict = verdict_of(results, method)
        assert {c["control"] for c in verdict["comparisons"]} == wanted
        assert not verdict["missing"]


def test_the_control_at_equal_compute_is_the_longer_training_of_nearest_compute():
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

    far = study_results(more=[longer(32, seed) for seed in (0, 1, 2)])
    assert verdict_of(far)["outcome"] == "gain"
    near = study_results(more=[longer(9, seed) for seed in (0, 1, 2)])
    for entry in near["cells"]:
        if entry["method"] == "learned":
            entry["token_passes"] = 9000
    assert "the baseline at equal compute is better" in verdict_of(near)["sentence"]
