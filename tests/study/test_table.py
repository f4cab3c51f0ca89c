"""The report of made-up results in Markdown."""

from study_cases import LEVELS, cell, study_results

from fastperturb.study import summary, table


def report_of(results):
    return table.markdown(results | {"summary": summary.summarise(results)})


def cells_of(text):
    """The cells of every line of a table, without their padding."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_lists_untrained_models_then_the_baseline_then_methods_with_their_controls():
    plain = {("as_trained", tuned): (2.99, 4.3) for tuned in (False, True)}
    text = report_of(
        study_results(more=[cell("neftune", seed, levels=plain) for seed in (0, 1, 2)])
    )
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


def test_a_row_holds_temperature_samples_steps_compute_levels_and_changes():
    lines = {
        line[0]: line for line in cells_of(report_of(study_results()).split("## By domain")[0])
    }
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
    one_seed = report_of(study_results(seeds=[1]))
    assert "±" not in one_seed.split("## How to read it")[0]
    assert "-0.1000 [-0.1000, -0.1000]" in one_seed


def test_the_table_by_domain_marks_changes_whose_interval_excludes_0():
    sure, unsure = (
        cells_of(report_of(study_results(wobble=wobble)).split("## By domain")[1])[-1]
        for wobble in (0.0, 1.0)
    )
    assert sure[0] == unsure[0] == "**learned** (chosen), tempered"
    assert sure[1:] == ["-0.0100 ± 0.0020*", "-0.1000 ± 0.0020*", "-0.1000 ± 0.0020*"]
    assert unsure[1:] == ["-0.0100 ± 0.0020", "-0.1000 ± 0.0020", "-0.1000 ± 0.0020"]


def test_the_report_begins_with_the_verdict_on_the_chosen_method_and_lists_all_verdicts():
    plain = {("as_trained", tuned): (2.99, 4.3) for tuned in (False, True)}
    results = study_results(more=[cell("neftune", seed, levels=plain) for seed in (0, 1, 2)])
    text = report_of(results)
    assert text.splitlines()[0] == "# Trained on stories, judged on 2 other domains"
    assert text.splitlines()[2].startswith(
        "**Gain** for learned, the learned method that in-domain validation prefers: tempered, its "
        "nll out of domain is 4.000, -0.1000 ± 0.0020 [-0.1000, -0.1000] from that of exact"
    )
    for verdict in summary.summarise(results)["verdicts"]:
        assert f"- {verdict['sentence']}\n" in text
    assert "**Gain, uncertain over documents,** for learned" in report_of(study_results(wobble=1.0))
    assert "No method with a learned perturbation" in report_of(study_results(methods=["exact"]))


def test_columns_line_up_even_if_a_name_holds_a_bar():
    levels = LEVELS["learned"]
    more = [cell("a | b", seed, levels=levels, draws=8) for seed in (0, 1, 2)]
    text = report_of(study_results(more=more))
    for part in text.split("## By domain"):
        assert len({len(line) for line in part.splitlines() if line.startswith("|")}) == 1
    assert "**a \\| b**" in text
