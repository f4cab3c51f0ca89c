"""Checkpoints of a training run, from which it goes on bit for bit.

    step-00000120/
        the files of the model         for fastperturb.load
        training_state.safetensors     trainable parameters, optimizer, data state
        training_state.json            the step, JSON values, versions, every file's SHA-256

A checkpoint is written in a hidden folder beside the others, flushed to the disk and renamed into
place. An old one is hidden before it is deleted. So whatever interrupts a save, a folder that has
a checkpoint's name is whole. All files are checked by hash before any is used. Nothing is
unpickled, links are not followed, and no path is made from the contents of a file.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fastperturb.checkpoint.atomic import (
    digest,
    explained,
    explaining,
    flush,
    read_json,
    read_tensors,
    sha256,
)
from fastperturb.runs import versions

FORMAT_VERSION = 1
STATE_NAME = "training_state.json"
TENSORS_NAME = "training_state.safetensors"

# Far above the size of any manifest, and small enough to read into memory.
_MAX_STATE_BYTES = 1 << 26

_NAME = "step-"
_UNFINISHED = f".saving-{_NAME}"
_OUTDATED = f".old-{_NAME}"


class UnsupportedFormat(ValueError):
    """The checkpoint has a format that another version of fastperturb reads."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint whose files all have the hashes that were saved."""

    path: Path
    step: int
    values: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Return the saved tensors, on the CPU."""
        return read_tensors(self.path / TENSORS_NAME)


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    write_model: Callable[[Path], None],
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write the checkpoint of a step into a folder of checkpoints, and return its path.

    values: JSON that reads back equal: string keys, lists, no tuples, no nan or inf.
    write_model: called with an empty folder, into which it writes plain files.
    keep: the number of checkpoints that stay, this one included. Those of later steps, before
        which the run was resumed, are deleted too.
    protect: steps whose checkpoints stay whatever their age, such as the best one's.

    Raises OSError if the disk fails or is full, with the older checkpoints as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    _check_values(values)
    target = path_of(folder, step)
    staging = folder / f"{_UNFINISHED}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_all(folder, _UNFINISHED)
        staging.mkdir()
        _write(staging, step, tensors, values, write_model)
        if target.exists():
            _retire(target)
        os.rename(staging, target)
        flush(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise explained(error, _failed_save(folder, target)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with explaining(f"{target} is saved and whole, but an older one could not be deleted"):
        _prune(folder, step, keep, protect)
    return target


def path_of(folder: Path, step: int) -> Path:
    """Return the path that the checkpoint of a step has, or would have."""
    return folder / f"{_NAME}{step:08d}"


def latest(folder: Path) -> SavedState | None:
    """Read the newest undamaged checkpoint of a folder; None if the folder has no checkpoint.

    Damaged ones are skipped with a warning. Raises ValueError if all are damaged, since to go on
    without them would lose their steps, and on one of an unsupported format.
    """
    # A save killed between its last two renames leaves the checkpoint that it replaces hidden.
    candidates = [*_checkpoints(folder)[::-1], *_checkpoints(folder, _OUTDATED)[::-1]]
    for _, path in candidates:
        try:
            return read(path)
        except UnsupportedFormat:
            raise
        except ValueError as error:
            warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
    if candidates:
        raise ValueError(
            f"no checkpoint in {folder} is whole: copy one there from elsewhere, or move that "
            "folder away to start anew"
        )
    return None


def read(path: Path) -> SavedState:
    """Read one checkpoint; raise ValueError if any of its files is not as it was saved."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}: name a folder {_NAME}...")
    values = _read_state(path)
    try:
        step, saved, files = values["step"], values["values"], dict(values["files"])
        if type(step) is not int or not isinstance(saved, dict) or TENSORS_NAME not in files:
            raise ValueError(f"step is {step!r}, files are {list(files)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / STATE_NAME} is not understood: {error!r}") from error
    if missing := sorted(files.keys() - _plain_files(path)):
        raise ValueError(f"{path} lacks the file {missing[0]!r} that it was saved with{_ADVICE}")
    for name in sorted(files):
        if sha256(path / name) != files[name]:
            raise ValueError(f"{path / name} was changed after it was saved, or is cut{_ADVICE}")
    return SavedState(path, step, saved)


_ADVICE = "; copy the whole folder again, or resume from an older checkpoint"


# Writing


def _check_values(values: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(dict(values), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"values must be JSON: {error}") from error
    if json.loads(text) != values:
        raise ValueError(
            "values must read back equal from JSON (string keys, lists instead of tuples), got "
            f"{dict(values)}"
        )


def _write(
    staging: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    write_model: Callable[[Path], None],
) -> None:
    write_model(staging)
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(on_cpu, staging / TENSORS_NAME, {"format": "pt"})
    names = sorted(os.listdir(staging))
    if others := sorted(set(names) - _plain_files(staging)):
        raise ValueError(f"write_model must write plain files, and {others[0]!r} is not one")
    state = {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "step": step,
        "values": dict(values),
        "files": {name: sha256(staging / name) for name in names},
    }
    state["sha256"] = digest(state)
    text = json.dumps(state, indent=2, allow_nan=False)
    (staging / STATE_NAME).write_text(text + "\n", encoding="utf-8")
    for name in [*names, STATE_NAME]:
        # safetensors' 0600 would hide a shared folder's checkpoints from everyone else.
        shutil.copymode(staging / STATE_NAME, staging / name)
        flush(staging / name)
    flush(staging)


def _failed_save(folder: Path, target: Path) -> str:
    """Return the message about a save that failed, which names the last good checkpoint."""
    try:
        saved = latest(folder)
        older = "there is no older one" if saved is None else f"{saved.path} is whole"
    except (OSError, ValueError) as error:
        older = f"an older one cannot be read: {error}"
    return (
        f"could not save the checkpoint {target} ({older}; nothing in memory changed): free space "
        "or quota, or name a folder that can be written to, and save again"
    )


def _prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    checkpoints = _checkpoints(folder)
    keepers = {*[number for number, _ in checkpoints if number <= step][-keep:], *protect}
    for number, path in checkpoints:
        if number not in keepers:
            _retire(path)
    _delete_all(folder, _OUTDATED)


def _retire(path: Path) -> None:
    """Hide a checkpoint, so that it is never seen half deleted."""
    hidden = path.with_name(_OUTDATED + path.name.removeprefix(_NAME))
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(path, hidden)


def _delete_all(folder: Path, prefix: str) -> None:
    for _, path in _checkpoints(folder, prefix):
        shutil.rmtree(path)


# Reading


def _checkpoints(folder: Path, prefix: str = _NAME) -> list[tuple[int, Path]]:
    """Return the steps and folders of checkpoints, sorted by step."""
    checkpoints = [
        (int(number), path)
        for path in folder.glob(f"{prefix}*")
        if (number := path.name.removeprefix(prefix)).isdecimal()
        and path.is_dir()
        and not path.is_symlink()
    ]
    return sorted(checkpoints)


def _plain_files(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}


def _read_state(path: Path) -> dict[str, Any]:
    if STATE_NAME not in _plain_files(path):
        raise ValueError(
            f"{path} holds no {STATE_NAME}, so it is not a checkpoint of a training run"
        )
    values = read_json(path / STATE_NAME, most_bytes=_MAX_STATE_BYTES)
    version = values.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        writer = values.get("versions", {}).get("fastperturb")
        raise UnsupportedFormat(
            f"{path} has format {version}, and this fastperturb reads format {FORMAT_VERSION}: "
            f"finish the run with the version that wrote it, {writer}, or start another from the "
            "model in that folder"
        )
    if version != FORMAT_VERSION:
        raise ValueError(f"{path / STATE_NAME} has format {version!r}: it is not fastperturb's")
    if values.pop("sha256", None) != digest(values):
        raise ValueError(f"{path / STATE_NAME} was changed after it was saved{_ADVICE}")
    return values
