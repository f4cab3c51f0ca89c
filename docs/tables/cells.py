"""Results read from JSON, and numbers as cells of a Markdown table."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def read(name: str) -> dict[str, Any]:
    """Return what the JSON file bench/results/NAME holds."""
    return _parsed(RESULTS / name)


@functools.cache
def _parsed(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *sources: str) -> str:
    """Return a Markdown table with numbers to the right, and below it where they come from."""
    rule = ["---:" if _holds_numbers(column) else "---" for column in zip(*rows, strict=True)]
    lines = [_line(header), _line(rule), *map(_line, rows)]
    return "\n".join([*lines, *(["", _source(sources)] if sources else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _holds_numbers(column: Sequence[str]) -> bool:
    """Return whether most cells that hold anything hold a number."""
    filled = [cell.lstrip("*+-")[:1].isdigit() for cell in column if cell]
    return 2 * sum(filled) > len(filled)


def _source(names: Sequence[str]) -> str:
    """Return the line below a table: its files with their commits, and the device."""
    all_results = [read(name) for name in names]
    files = [
        f"`bench/results/{name}` (commit {_commit(results)})"
        for name, results in zip(names, all_results, strict=True)
    ]
    devices = dict.fromkeys(_device(results) for results in all_results)
    return f"<small>From {', '.join(files)}; {'; '.join(devices)}.</small>"


def _commit(results: dict[str, Any]) -> str:
    # One that ends in -dirty had changes that were not committed: part of the truth.
    commit, dirty, _ = results["commit"].partition("-dirty")
    return f"{commit[:7]}{dirty}"


def _device(results: dict[str, Any]) -> str:
    return results["device"].replace(" 1 threads", " 1 thread")


def spread(mean: float, sd: float | None, form: str) -> str:
    """Return `mean ± sd`, both in this format; without sd, the mean alone."""
    return f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form.lstrip('+')}}"


def interval(value: dict[str, float], form: str, *, middle: str = "estimate") -> str:
    """Return `estimate [low, high]`."""
    return f"{value[middle]:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def ratio(value: float) -> str:
    """Return a ratio in two significant digits."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def bold(cells: Sequence[str]) -> list[str]:
    """Return the cells, emphasised."""
    return [f"**{cell}**" if cell else cell for cell in cells]
