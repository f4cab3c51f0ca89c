"""Tables and diagrams of the documentation agree with the JSON and the code they come from."""

import json
import shutil

import pytest

from docs import diagrams
from docs.tables import __main__ as command
from docs.tables import cells, pages


@pytest.fixture
def copied_results(tmp_path, monkeypatch):
    """The JSON that tables read, in a folder that a test may change."""
    folder = tmp_path / "results"
    for path in cells.RESULTS.rglob("*.json"):
        target = folder / path.relative_to(cells.RESULTS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    monkeypatch.setattr(cells, "RESULTS", folder)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["docs.tables", *arguments])
    return command.main()


def test_every_table_of_every_page_is_what_its_json_says(monkeypatch, capsys):
    assert run(monkeypatch) == 0, capsys.readouterr().out


def test_every_table_stands_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in pages.all_pages())
    missing = [name for name in pages.TABLES if f"<!-- table: {name} -->" not in text]
    assert not missing


def test_a_changed_number_in_json_fails_the_check_and_names_page_and_table(
    copied_results, monkeypatch, capsys
):
    path = copied_results / "demo" / "results.json"
    results = json.loads(path.read_text())
    results["rows"][0]["kl"]["in_support"] += 0.01
    path.write_text(json.dumps(results))
    assert run(monkeypatch) == 1
    assert capsys.readouterr().out.splitlines() == [
        "differs from its JSON: docs/results/synthetic.md: demo"
    ]


def test_a_number_changed_by_hand_is_written_back(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    start = "Before.\n\n<!-- table: step-memory -->\n"
    page.write_text(f"{start}<!-- end -->\n\nAfter.\n")
    monkeypatch.setattr(pages, "all_pages", lambda: [page])
    assert run(monkeypatch) == 1  # empty, as a new page's tables are
    assert run(monkeypatch, "--write") == 0
    written = page.read_text()
    assert written.startswith(f"{start}| plan |") and written.endswith("<!-- end -->\n\nAfter.\n")
    assert run(monkeypatch) == 0
    page.write_text(written.replace("57.3", "57.4", 1))
    assert run(monkeypatch) == 1
    assert "step-memory" in capsys.readouterr().out
    assert run(monkeypatch, "--write") == 0 and page.read_text() == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: demoo -->\n<!-- end -->\n", "there is no table 'demoo'"),
        ("<!-- table: demo -->\n", "lacks its `end`"),
        ("<!-- end -->\n", "an `end` its table"),
    ],
)
def test_a_wrong_marker_is_an_error_that_names_the_page(tmp_path, text, message):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        pages.outdated(page)
    assert str(page) in str(raised.value)


def test_the_diagrams_are_drawn_from_the_import_contract_as_it_is():
    assert diagrams.outdated() == []
    shown = {name for layer in diagrams.layers() for name in layer}
    assert {"model", "engine", "ops", "noise"} <= shown
    assert all(name in diagrams.packages() for name in shown)
