"""What an evaluation found, as tables: in Markdown for a file, by rich for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from fastperturb.eval.likelihood import Likelihood, at_bound

# Below this many documents an interval over them is hardly one.
FEW_DOCUMENTS = 5

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a heading, and a word on how to read them.

    words: the columns of words; the others hold numbers.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str
    words: tuple[str, ...] = ("domain", "model", "written by", "read from")


def tables(results: Results) -> list[Table]:
    """Of what results.json holds."""
    parts = (texts, perplexities, differences, monte_carlo, continuations)
    return [table for part in parts if (table := part(results)).rows]


def markdown(tables: Sequence[Table]) -> str:
    return "\n".join(
        f"## {table.title}\n\n{aligned([table.header, *table.rows])}\n\n{table.note}\n"
        for table in tables
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose columns line up without being rendered; the first holds words."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (escaped[0], rule, *escaped[1:])
    )


def show(tables: Sequence[Table]) -> None:
    console = Console()
    for table in tables:
        shown = RichTable(box=box.SIMPLE, pad_edge=False)
        fits = _width(table) <= console.width  # else all is there on several lines
        for name in table.header:
            is_text = name in table.words
            justify: Any = "left" if is_text else "right"
            shown.add_column(name, justify=justify, no_wrap=fits and not is_text, overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(f"[bold]{escape(table.title)}[/bold]")
        console.print(shown)
        console.print(escape(table.note) + "\n")


def _width(table: Table) -> int:
    """With three blanks between columns; those of words can be narrow."""
    columns = zip(*(table.header, *table.rows))
    widest = (10 if cells[0] in table.words else max(map(len, cells)) for cells in columns)
    return sum(widest) + 3 * len(table.header)


def texts(results: Results) -> Table:
    rows, few = [], False
    for each in results["domains"]:
        is_few = each["documents"] < FEW_DOCUMENTS
        few = few or is_few
        documents = f"{each['documents']} (few)" if is_few else str(each["documents"])
        rows.append([each["name"], documents, f"{each['labels']:,}", each["where"]])
    note = "Labels are the tokens that are predicted."
    if few:
        note += " Intervals over so few documents are too narrow to trust."
    return Table("Texts", ["domain", "documents", "labels", "read from"], rows, note)


def perplexities(results: Results) -> Table:
    names = [each["name"] for each in results["domains"]]
    own = [f"{Likelihood.from_dict(results['unigram'][name]).perplexity:.4g}" for name in names]
    rows = [["unigram of the text itself", "", "", *own, ""]]
    for each in results["measurements"]:
        found = [Likelihood.from_dict(each["domains"][name]) for name in names]
        speeds = [one.tokens_per_second or 0.0 for one in found]
        rows.append(
            [
                each["model"],
                _temperature(each),
                str(found[0].num_samples),
                *(f"{one.perplexity:.4g}" for one in found),
                f"{sum(speeds) / len(speeds):,.0f}",
            ]
        )
    return Table(
        "Perplexity of a token",
        ["model", "T", "draws", *names, "labels/s"],
        rows,
        "T divides the logits; a tuned one at the bound of what was searched would go further. "
        "The unigram knows the text's own token frequencies and no context.",
    )


def differences(results: Results) -> Table:
    names = [each["name"] for each in results["domains"]]
    rows = []
    for name in [*names, None] if len(names) > 1 else names:
        for each in results["differences"]:
            found = each["mean"] if name is None else each["domains"][name]
            interval = _interval(found, "+.4f")
            if found["documents"] < FEW_DOCUMENTS:
                interval += " (few)"
            estimate = f"{found['estimate']:+.4f}"
            rows.append([name or "mean", each["model"], _temperature(each), estimate, interval])
    reference = results["reference"]
    return Table(
        f"Change of the nll against {reference['model']} at T = {_temperature(reference)}",
        ["domain", "model", "T", "change", "95% interval"],
        rows,
        "In nats a token: below 0 is better. Intervals are over documents, resampled in pairs; "
        "they know nothing of other training seeds.",
    )


def monte_carlo(results: Results) -> Table:
    rows = []
    for each in results["measurements"]:
        for name, values in each["domains"].items():
            found = Likelihood.from_dict(values)
            if found.standard_error is None:
                continue
            rows.append(
                [
                    name,
                    each["model"],
                    _temperature(each),
                    f"{found.nll:.4f} ± {found.standard_error:.4f}",
                    f"{found.jackknife:.4f}",
                    _half(found),
                    f"{found.ess:.1f}",
                ]
            )
    return Table(
        "Were there enough draws?",
        ["domain", "model", "T", "nll ± error", "jackknifed", "at half", "effective"],
        rows,
        "The jackknife takes off what too few draws add to the nll; the error is that of the "
        "draws alone. Where half the draws still say something else, raise num_samples.",
    )


def continuations(results: Results) -> Table:
    rows = []
    with_mauve = any(each["mauve"] is not None for each in results["continuations"])
    for each in results["continuations"]:
        overlap = ""
        if each["rouge1"] is not None:
            overlap = f"{each['rouge1']['estimate']:.3f} {_interval(each['rouge1'], '.3f')}"
        distinct = " ".join(_share(each[f"distinct{n}"]) for n in (1, 2, 3))
        row = [f"{each['domain']} ({each['documents']})", each["model"] or "the text itself"]
        row += [overlap, distinct, _share(each["repetition"])]
        rows.append(row + ([_share(each["mauve"])] if with_mauve else []))
    header = ["domain", "written by", "ROUGE-1", "distinct-1 -2 -3", "repetition"]
    return Table(
        "Continuations",
        [*header, *(["MAUVE"] if with_mauve else [])],
        rows,
        "After a domain, of how many documents. ROUGE-1 is the overlap in words with the true "
        "continuation, with its 95% interval over documents; distinct-n, the share of different "
        "n-grams in all of them; repetition, the share of 4-grams that the same continuation had "
        "before. What is nearer to the text itself is better.",
    )


def _half(found: Likelihood) -> str:
    """The nll at the last number of draws but one, which is half of them or a little more."""
    return f"{found.curve['nll'][-2]:.4f}"


def _temperature(measurement: Mapping[str, Any]) -> str:
    temperature = measurement["temperature"]
    if not measurement["tuned"]:
        return f"{temperature:.3g}"
    return f"{temperature:.3g} tuned{' (bound)' if at_bound(temperature) else ''}"


def _interval(found: Mapping[str, Any], form: str) -> str:
    return f"[{found['low']:{form}}, {found['high']:{form}}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
