"""Tables in Markdown and on a terminal."""

from fastperturb.report.table import Table, aligned, bracketed, markdown, show

TABLE = Table("Sizes", ["model", "tokens"], [["a | b", "1,000"], ["c", "20"]], "A note.")


def test_columns_line_up_with_words_left_and_numbers_right():
    assert aligned([TABLE.header, *TABLE.rows]).splitlines() == [
        "| model  | tokens |",
        "| ------ | -----: |",
        "| a \\| b |  1,000 |",
        "| c      |     20 |",
    ]


def test_markdown_has_the_title_above_and_the_note_below():
    lines = markdown([TABLE, TABLE]).splitlines()
    assert (lines[0], lines[-1]) == ("## Sizes", "A note.")
    assert lines.count("## Sizes") == 2


def test_a_terminal_shows_every_cell(capsys):
    show([TABLE])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("Sizes", "a | b", "1,000", "20", "A note."))


def test_both_ends_of_an_interval_have_the_same_format():
    assert bracketed({"low": -0.25, "high": 1.5}, "+.2f") == "[-0.25, +1.50]"
