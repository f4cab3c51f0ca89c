"""Tables of results: in Markdown for a file, and by rich for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

# On a terminal a column of words may be folded down to this width.
_NARROWEST = 10
_BETWEEN_COLUMNS = 3


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title, with a note that says how to read them.

    words: the headings of the columns that hold words; all other columns hold numbers.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str
    words: tuple[str, ...] = ("domain", "model", "written by", "read from")


def markdown(tables: Sequence[Table]) -> str:
    """Return the tables in Markdown, each with its title above and its note below."""
    return "\n".join(
        f"## {table.title}\n\n{aligned([table.header, *table.rows])}\n\n{table.note}\n"
        for table in tables
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up as plain text; the first column is words."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (escaped[0], rule, *escaped[1:])
    )


def show(tables: Sequence[Table]) -> None:
    """Print the tables to the terminal."""
    console = Console()
    for table in tables:
        shown = RichTable(box=box.SIMPLE, pad_edge=False)
        fits = _narrowest_width(table) <= console.width  # otherwise cells take several lines
        for heading in table.header:
            has_words = heading in table.words
            justify: Any = "left" if has_words else "right"
            no_wrap = fits and not has_words
            shown.add_column(heading, justify=justify, no_wrap=no_wrap, overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(f"[bold]{escape(table.title)}[/bold]")
        console.print(shown)
        console.print(escape(table.note) + "\n")


def bracketed(interval: Mapping[str, Any], form: str) -> str:
    """Return "[low, high]", both in this format."""
    return f"[{interval['low']:{form}}, {interval['high']:{form}}]"


def _narrowest_width(table: Table) -> int:
    columns = zip(*(table.header, *table.rows))
    widths = (_NARROWEST if cells[0] in table.words else max(map(len, cells)) for cells in columns)
    return sum(widths) + _BETWEEN_COLUMNS * len(table.header)
