"""The tables of an evaluation."""

from eval_cases import results_of

from fastperturb.eval import tables
from fastperturb.report.table import markdown


def test_every_model_and_temperature_is_in_every_table(evaluated):
    results = results_of(evaluated)
    by_title = {table.title: table for table in tables.tables(results)}
    assert len(by_title) == 5
    assert len(by_title["Perplexity of a token"].rows) == 1 + 12
    [changes] = [table for title, table in by_title.items() if title.startswith("Change")]
    assert len(changes.rows) == 11 * 3  # two domains and their mean
    assert len(by_title["Were there enough samples?"].rows) == 2 * 2 * 2  # learned and whole
    text = (evaluated / "table.md").read_text()
    assert text == markdown(tables.tables(results))


def test_a_tuned_temperature_at_an_end_of_the_range_is_marked(evaluated):
    results = results_of(evaluated)
    tuned = [m for m in results["measurements"] if m["tuned"]]
    for measurement, temperature in zip(tuned, (0.501, 1.0, 1.9, 1.998)):
        measurement["temperature"] = temperature
    shown = [row[1] for row in tables.perplexities(results).rows[1:] if "tuned" in row[1]]
    assert shown[:4] == ["0.501 tuned (bound)", "1 tuned", "1.9 tuned", "2 tuned (bound)"]
