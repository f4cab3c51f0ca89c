"""Checkpoints of a training run, from which it goes on bit for bit.

    step-00000120/
        whatever the model writes      to be loaded elsewhere
        training_state.safetensors     trainable parameters, optimizer, data state
        training_state.json            the step, JSON values, versions, every file's SHA-256

A checkpoint is written in a hidden folder beside the others, flushed to the disk and renamed into
place, and one that is to go is hidden before it is deleted: whatever interrupts a save, a folder
that has a checkpoint's name is whole. What is read is checked by hash before anything is used.
Nothing is unpickled, links are not followed, and no path is made from what a file says.
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

# Far above what is ever written, far below what hurts.
_MOST_STATE_BYTES = 1 << 26

_NAME = "step-"
_UNFINISHED = f".saving-{_NAME}"
_OUTDATED = f".old-{_NAME}"


class OtherFormat(ValueError):
    """A checkpoint of another version of fastperturb: whole, perhaps, but not for this one."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint whose files were all found to be those that were saved."""

    path: Path
    step: int
    values: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The saved tensors, on the CPU."""
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

    values: what JSON gives back as it was: string keys, lists, no tuples, no nan or inf.
    write_model: called with an empty folder, into which it writes plain files.
    keep: how many checkpoints stay, this one included. Those of later steps, from which the run
        went back, go too.
    protect: steps whose checkpoints stay whatever their age, such as the best one's.

    Raises OSError where the disk refuses, with the older checkpoints as they were.
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
        raise explained(error, _what_is_left(folder, target)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with explaining(f"{target} is saved and whole, but an older one could not be deleted"):
        _prune(folder, step, keep, protect)
    return target


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"{_NAME}{step:08d}"


def latest(folder: Path) -> SavedState | None:
    """The newest whole checkpoint of a folder; damaged ones are skipped with a warning.

    None where there is none. One of another format is an error, and so is a folder with nothing but
    damaged ones: to go on without them would lose their steps.
    """
    # A save killed between its last two renames leaves the one that it was to replace hidden.
    found = [*_checkpoints(folder)[::-1], *_checkpoints(folder, _OUTDATED)[::-1]]
    for _, path in found:
        try:
            return read(path)
        except OtherFormat:
            raise
        except ValueError as error:
            warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
    if found:
        raise ValueError(
            f"no checkpoint in {folder} is whole: copy one there from elsewhere, or move that "
            "folder away to start anew"
        )
    return None


def read(path: Path) -> SavedState:
    """One checkpoint, all of whose files are as they were saved; ValueError where they are not."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}: name a folder {_NAME}...")
    values = _read_state(path)
    try:
        step, saved, files = values["step"], values["values"], dict(values["files"])
        if type(step) is not int or not isinstance(saved, dict) or TENSORS_NAME not in files:
            raise ValueError(f"step is {step!r}, files are {list(files)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / STATE_NAME} is not understood: {error!r}") from error
    if lost := sorted(files.keys() - _plain_files(path)):
        raise ValueError(f"{path} lacks the file {lost[0]!r} that it was saved with{_ADVICE}")
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
            "values must be what JSON gives back, string keys and lists instead of tuples, and "
            f"{dict(values)} is not"
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
        raise ValueError(f"write_model must write plain files, and {others[0]!r} is none")
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


def _what_is_left(folder: Path, target: Path) -> str:
    try:
        saved = latest(folder)
        left = "there is no older one" if saved is None else f"{saved.path} is whole"
    except (OSError, ValueError) as error:
        left = f"an older one cannot be read: {error}"
    return (
        f"could not save the checkpoint {target} ({left}; nothing in memory changed): free space "
        "or quota, or name a folder that can be written to, and save again"
    )


def _prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    found = _checkpoints(folder)
    kept = {*[number for number, _ in found if number <= step][-keep:], *protect}
    for number, path in found:
        if number not in kept:
            _retire(path)
    _delete_all(folder, _OUTDATED)


def _retire(path: Path) -> None:
    """Hide a checkpoint, so that half of one is never seen."""
    hidden = path.with_name(_OUTDATED + path.name.removeprefix(_NAME))
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(path, hidden)


def _delete_all(folder: Path, prefix: str) -> None:
    for _, path in _checkpoints(folder, prefix):
        shutil.rmtree(path)


# Reading


def _checkpoints(folder: Path, prefix: str = _NAME) -> list[tuple[int, Path]]:
    """Steps and folders, by step."""
    found = [
        (int(number), path)
        for path in folder.glob(f"{prefix}*")
        if (number := path.name.removeprefix(prefix)).isdecimal()
        and path.is_dir()
        and not path.is_symlink()
    ]
    return sorted(found)


def _plain_files(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}


def _read_state(path: Path) -> dict[str, Any]:
    if STATE_NAME not in _plain_files(path):
        raise ValueError(f"{path} holds no {STATE_NAME}, so is no checkpoint of a training run")
    values = read_json(path / STATE_NAME, most_bytes=_MOST_STATE_BYTES)
    version = values.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        writer = values.get("versions", {}).get("fastperturb")
        raise OtherFormat(
            f"{path} has format {version}, and this fastperturb reads format {FORMAT_VERSION}: "
            f"finish the run with the version that wrote it, {writer}, or start another from the "
            "model in that folder"
        )
    if version != FORMAT_VERSION:
        raise ValueError(f"{path / STATE_NAME} has format {version!r}: it is not fastperturb's")
    if values.pop("sha256", None) != digest(values):
        raise ValueError(f"{path / STATE_NAME} was changed after it was saved{_ADVICE}")
    return values
