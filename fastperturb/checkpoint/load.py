"""Loading a checkpoint: its files checked, its adapter put on, its transform restored.

A model that a checkpoint does not fit stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from fastperturb.checkpoint.adapters import (
    base_name,
    check_adapter,
    class_name,
    put_on,
    reject_hidden_adapters,
)
from fastperturb.checkpoint.format import ADAPTER_NAMES, CONFIG_NAME, TENSORS_NAME, Base, Checkpoint
from fastperturb.engine.adapters import is_adapted
from fastperturb.engine.architectures import understand
from fastperturb.engine.protocol import WrappedModel


def find(directory: str | os.PathLike[str], revision: str | None, token: Any) -> Path:
    """Return the folder itself, or a download of the Hub's repository of that name."""
    folder = Path(directory)
    if folder.is_dir():
        return folder
    if not isinstance(directory, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", directory):
        raise FileNotFoundError(f"there is no folder {folder} to load from")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                directory,
                revision=revision,
                token=token,
                allow_patterns=[CONFIG_NAME, TENSORS_NAME, *ADAPTER_NAMES],
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {directory}, and the Hugging Face Hub did not give a repository "
            f"of that name ({error}); check the name, revision and token, or, without a network, "
            f"fetch it elsewhere by `hf download {directory} --local-dir DIR` and load DIR"
        ) from error


def read(model: nn.Module, folder: Path) -> Checkpoint:
    """Read a checkpoint, and raise if it cannot be of this model."""
    embed: Any = understand(model).embed
    width = embed.weight.shape[-1]
    reject_hidden_adapters(model)
    saved = Checkpoint.read(folder)
    if width != saved.embed_dim:
        raise ValueError(
            f"{saved.folder} perturbs embeddings {saved.embed_dim} wide, and those of this "
            f"{class_name(model)} are {width}; it was saved over {saved.base}"
        )
    return saved


@contextlib.contextmanager
def with_adapter(model: nn.Module, saved: Checkpoint, *, is_trainable: bool) -> Iterator[nn.Module]:
    """Put the saved adapter on the model, if there is one; undo all should the body raise."""
    adapter = saved.adapter_tensors() if saved.has_adapter else {}
    with _restored_on_error(model, overwritten=map(base_name, adapter)):
        base = model
        if adapter and not is_adapted(model):
            base = put_on(model, adapter, saved, is_trainable=is_trainable)
        if adapter:
            check_adapter(base, adapter, saved)
        yield base


def restore(lm: WrappedModel, saved: Checkpoint) -> None:
    """Load the saved transform into a wrapped model, and warn of a base with other weights."""
    saved.base.check(Base.of(lm.base, lm.transform.embed_rms), saved.folder)
    lm.transform.load_state_dict(saved.transform_tensors())


@contextlib.contextmanager
def _restored_on_error(model: nn.Module, *, overwritten: Iterable[str]) -> Iterator[None]:
    """Restore a model's modules and weights if the body raises.

    overwritten: names of tensors whose entries the body writes in place.
    """
    own = model.state_dict()
    entries = [(own[name], own[name].clone()) for name in overwritten if name in own]
    weights = [(p, p.data, p.requires_grad) for p in model.parameters()]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    # Hooks and submodules live in dicts that others hold on to, so these keep their identity.
    tables = [
        (value, value.copy())
        for _, values in attributes
        for value in values.values()
        if isinstance(value, dict | set)
    ]
    try:
        yield
    except BaseException:
        for table, content in [*attributes, *tables]:
            table.clear()
            table.update(content)
        for parameter, data, requires_grad in weights:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for tensor, before in entries:
            tensor.copy_(before)
        raise
