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
    rule = ["---:" if all(map(_is_number, column)) else "---" for column in zip(*rows, strict=True)]
    lines = [_line(header), _line(rule), *map(_line, rows)]
    return "\n".join([*lines, "", *_source(sources)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _is_number(cell: str) -> bool:
    return cell.lstrip("*+-")[:1].isdigit() or not cell


def _source(names: Sequence[str]) -> list[str]:
    """Return the line below a table: its files, with the device and commit of each."""
    if not names:
        return []
    files = [f"`bench/results/{name}` ({_where(read(name))})" for name in names]
    return [f"<small>From {', '.join(files)}.</small>"]


def _where(results: dict[str, Any]) -> str:
    device = results["device"].removesuffix(" 1 threads")
    device = f"{device} 1 thread" if device != results["device"] else device
    # A commit that ends in -dirty had changes that were not committed: part of the truth.
    commit, dirty, _ = results["commit"].partition("-dirty")
    return f"{device}, commit {commit[:7]}{dirty}"


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
