"""Tables between `<!-- table: NAME -->` and `<!-- end -->` in a page: found, compared, replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from docs.tables import (
    predicted,
    proposal,
    ranks,
    sampling,
    speed,
    studies,
    synthetic,
    transforms,
)

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    **speed.TABLES,
    **predicted.TABLES,
    **synthetic.TABLES,
    **sampling.TABLES,
    **proposal.TABLES,
    **studies.TABLES,
    **ranks.TABLES,
    **transforms.TABLES,
}

_TABLE = re.compile(
    r"(?P<start><!-- table: (?P<name>.*?) -->\n).*?(?P<end>^<!-- end -->$)", re.M | re.S
)
_MARKER = re.compile(r"^<!-- (table: .*|end) -->$", re.M)


def all_pages() -> list[Path]:
    """Return README.md and every page under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def outdated(page: Path) -> list[str]:
    """Return "PAGE: TABLE" for each table that is not what its JSON says."""
    text = page.read_text(encoding="utf-8")
    return [
        f"{_shown(page)}: {match['name']}"
        for match in _tables(text, page)
        if match[0] != _rendered(match)
    ]


def write(page: Path) -> None:
    """Replace every table of the page by what its JSON says."""
    text = page.read_text(encoding="utf-8")
    list(_tables(text, page))  # raises for a marker that is wrong
    page.write_text(_TABLE.sub(_rendered, text), encoding="utf-8")


def _tables(text: str, page: Path) -> Iterator[re.Match[str]]:
    """Yield the tables of a page; raise for an unknown name or a marker without its partner."""
    matches = list(_TABLE.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(matches):
        raise ValueError(
            f"{_shown(page)}: a `table:` marker lacks its `end`, or an `end` its table"
        )
    for match in matches:
        if match["name"] not in TABLES:
            raise ValueError(
                f"{_shown(page)}: there is no table {match['name']!r}; tables are "
                f"{', '.join(sorted(TABLES))}"
            )
        yield match


def _rendered(match: re.Match[str]) -> str:
    return f"{match['start']}{TABLES[match['name']]()}\n{match['end']}"


def _shown(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)
