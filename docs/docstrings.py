"""A griffe extension: docstrings of this project, which are plain text, as Markdown.

A line `name: what it is` becomes an item of a list, with the lines that are indented below it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(
    r"^(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)(?P<more>(?: \[[^]]*\])?): (?P<text>.*)$"
)
_WORDS = {"Returns", "Raises", "Note", "With", "The", "Here", "Mathematically"}


class PlainDocstrings(griffe.Extension):
    """Rewrite every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring with its `name: text` lines as a Markdown list; the first line stays."""
    lines: list[str] = []
    in_item = False
    for number, line in enumerate(text.splitlines()):
        match = _ITEM.match(line) if number else None
        if match and match["names"].split(",")[0] not in _WORDS:
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            if not in_item and lines[-1]:
                lines.append("")
            lines.append(f"- {names}{match['more']}: {match['text']}")
            in_item = True
        elif in_item and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
            in_item = False
    return "\n".join(lines)
