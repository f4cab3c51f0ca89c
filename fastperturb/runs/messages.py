"""Messages and progress bars of the commands.

A command writes what it was asked for (a table, a text, JSON) to stdout, by print. All else, from
any module, is a message of the logger "fastperturb" or of a child of it: info for progress and for
what to do next, warning for what may be wrong. `show` sends them to stderr, and --quiet leaves the
warnings. A program that imports the package gets the messages by logging's own means.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

_logger = logging.getLogger("fastperturb")


class _ToStderr(logging.Handler):
    """Writes messages to today's sys.stderr, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "fastperturb: warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stderr)


def show(*, quiet: bool) -> None:
    """Send the package's messages to stderr; quiet: only the warnings."""
    if not any(isinstance(handler, _ToStderr) for handler in _logger.handlers):
        _logger.addHandler(_ToStderr())
    _logger.setLevel(logging.WARNING if quiet else logging.INFO)


def has_bars() -> bool:
    """Return True where progress bars are shown: on a terminal, unless messages are off."""
    return sys.stderr.isatty() and _logger.isEnabledFor(logging.INFO)


def progress(
    items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "it"
) -> Iterator[Item]:
    """Yield the items; a bar on stderr shows how many are done, and goes when all are."""
    bar = tqdm(items, desc=description, total=total, unit=unit, leave=False, disable=not has_bars())
    yield from bar
