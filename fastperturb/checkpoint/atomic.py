"""Reliable files: fsynced when written, checked when read, with errors that explain."""

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
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explaining(consequence: str) -> Iterator[None]:
    """Begin the message of an error of the disk in the body with its consequence for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise explained(error, consequence) from error


def explained(error: OSError | SafetensorError, consequence: str) -> OSError:
    message = f"{consequence}: {error}"
    errno = getattr(error, "errno", None)  # errors of safetensors have none
    return OSError(message) if errno is None else OSError(errno, message)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(values: Any) -> str:
    """Return the SHA-256 of JSON values, however a file lays them out."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}, which belongs to the checkpoint; copy the whole folder"
        )


def read_json(path: Path, *, most_bytes: int) -> dict[str, Any]:
    """Read a JSON object of at most this many bytes."""
    require_file(path)
    with open(path, "rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(
            f"{path} is longer than {most_bytes} bytes, so it is not the file that was saved; copy "
            "the whole folder again"
        )
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
