"""The results of the repository: small, and enough to write every table again."""

import json
from pathlib import Path

import pytest

from bench import compact as compacting
from bench.compact import compact
from bench.ranks import learning
from bench.ranks import summary as rank_summary
from bench.synthetic import table as synthetic_table
from fastperturb import runs
from fastperturb.rank import table as rank_table
from fastperturb.study import summary as study_summary
from fastperturb.study import table as study_table

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FILES = sorted(RESULTS.rglob("*.json"))
STUDIES = sorted(folder.name for folder in (RESULTS / "studies").iterdir())


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def name(file):
    return str(file.relative_to(RESULTS))


def judged_again(results):
    return results | {"summary": study_summary.summarise(results)}


def rank_markdown(results):
    return rank_table.markdown(rank_table.tables(results))


def test_compact_keeps_keys_order_and_eight_digits_and_puts_a_record_on_a_line():
    results = {"rows": [{"nll": 3.00000000049, "n": 12345678901}, {"nll": None}], "seeds": [0, 1]}
    assert compact(results).splitlines() == [
        "{",
        '"rows": [',
        '{"nll":3.0,"n":12345678901},',
        '{"nll":null}',
        "],",
        '"seeds": [0,1]',
        "}",
    ]
    exact = {"b": {"x": [0.1, -2.5e-14], "y": [True]}, "a": {}, "c": [], "d": "text"}
    assert json.loads(compact(exact)) == exact
    assert list(json.loads(compact(exact))) == list(exact)


def test_a_check_names_files_that_are_not_compact_and_leaves_them(tmp_path, capsys):
    indented, small = tmp_path / "indented.json", tmp_path / "small.json"
    runs.write_json(indented, {"rows": [1.0]})
    small.write_text(compact({"rows": [1.0]}))
    before = indented.read_text()
    assert compacting.main([indented, small], check=True) == 1
    printed = capsys.readouterr().out
    assert "indented.json" in printed and "small.json" not in printed
    assert indented.read_text() == before
    assert compacting.main([indented, small], check=False) == 0
    assert compacting.main([indented, small], check=True) == 0


@pytest.mark.parametrize("file", FILES, ids=name)
def test_committed_results_are_compact(file):
    text = file.read_text(encoding="utf-8")
    assert text == compact(json.loads(text)), f"run: python -m bench.compact {file}"


@pytest.mark.parametrize("study", STUDIES)
def test_a_committed_study_judged_again_from_its_documents_gives_its_table(study):
    results = read(RESULTS / "studies" / study / "results.json")
    table = (RESULTS / "studies" / study / "table.md").read_text(encoding="utf-8")
    assert study_table.markdown(results) == table
    assert study_table.markdown(judged_again(results)) == table


@pytest.mark.parametrize(
    ("source", "table", "render"),
    [
        ("synthetic/results.json", "synthetic/table.md", synthetic_table.render),
        ("synthetic_context/results.json", "synthetic_context/table.md", synthetic_table.render),
        ("ranks/base/results.json", "ranks/base/table.md", rank_markdown),
        ("ranks/later/results.json", "ranks/later/table.md", rank_markdown),
        ("ranks/summary.json", "ranks/summary.md", rank_summary.table),
        ("ranks/learning.json", "ranks/learning.md", learning.table),
    ],
)
def test_a_committed_table_follows_from_its_results(source, table, render):
    assert render(read(RESULTS / source)) == (RESULTS / table).read_text(encoding="utf-8")
