"""Files to be trusted: through to the disk when written, checked when read, errors that explain."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from torch import Tensor


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explaining(what: str) -> Iterator[None]:
    """An error of the disk, with what it means for the one who wrote."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise explained(error, what) from error


def explained(error: OSError | SafetensorError, what: str) -> OSError:
    message = f"{what}: {error}"
    errno = getattr(error, "errno", None)  # safetensors only words it
    return OSError(message) if errno is None else OSError(errno, message)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(values: Any) -> str:
    """The SHA-256 of JSON values, however they are laid out in a file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}, which belongs to the checkpoint; copy the whole folder"
        )


def read_json(path: Path, *, most_bytes: int) -> dict[str, Any]:
    """A JSON object of at most so many bytes."""
    require_file(path)
    with open(path, "rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(f"{path} is longer than {most_bytes} bytes, so not what was saved")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated, damaged or no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(values).__name__}")
    return values


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged or no safetensors file: {error}; copy the whole "
            "checkpoint again"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
