"""A run's folder: opening it, and JSON files that are whole or absent."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def open_output_dir(path: str | Path, *, overwrite: bool) -> Path:
    """Make the folder. One that already holds files is refused unless `overwrite`.

    Overwriting replaces files one by one as they are written; nothing is deleted.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"output_dir {path} exists and is not a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output_dir {path} exists and is not empty: name another, or pass --overwrite"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"output_dir {path} cannot be made: {error.strerror}") from error
    return path


def write_json(path: str | Path, payload: Any) -> None:
    """Write `payload` whole or not at all: a reader never sees half a file."""
    path = Path(path)
    text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp's 0600 would hide a shared run folder's results from everyone else.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
