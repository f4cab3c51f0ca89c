"""Saving a perturbed model: the files of `format`, written whole or not at all.

Beside the transform go the adapter, by PEFT, or the base that trained without one, by its own
save_pretrained. Files are written aside, flushed and renamed into place, the config that vouches
for the others last. Whatever interrupts a save leaves the old checkpoint, the new one, or one that
`load` rejects.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fastperturb.checkpoint.adapters import reject_hidden_adapters, reject_unsaved_weights
from fastperturb.checkpoint.atomic import explaining, flush
from fastperturb.checkpoint.format import (
    ADAPTER_NAMES,
    CONFIG_NAME,
    FORMAT_VERSION,
    TENSORS_NAME,
    Base,
    reject_non_finite,
    write_manifest,
)
from fastperturb.engine import sharding
from fastperturb.engine.adapters import is_adapted
from fastperturb.engine.architectures import embedding_rms, understand
from fastperturb.engine.protocol import WrappedModel
from fastperturb.version import __version__


def save_pretrained(
    lm: WrappedModel,
    save_directory: str | os.PathLike[str],
    *,
    save_base: bool | None = None,
    is_main_process: bool = True,
) -> None:
    """Write a checkpoint; `PerturbedLM.save_pretrained` describes the arguments."""
    if sharding.is_sharded(lm):
        is_main_process = dist.get_rank() == 0
        with sharding.made_whole(lm, here=is_main_process):
            if is_main_process:
                _save(lm, Path(save_directory), save_base)
    elif is_main_process:
        _save(lm, Path(save_directory), save_base)


def _save(lm: WrappedModel, folder: Path, save_base: bool | None) -> None:
    tensors = _tensors(lm)
    reject_hidden_adapters(lm.base)
    if is_adapted(lm.base):
        reject_unsaved_weights(lm.base, save_base)
        save_base = False
    elif save_base is None:
        save_base = any(parameter.requires_grad for parameter in lm.base.parameters())
    if save_base and (folder / ADAPTER_NAMES[0]).exists():
        raise ValueError(
            f"{folder} holds the adapter of another model, which from_pretrained would put on "
            "the base saved there; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staging:
        with explaining(f"could not save to {folder}; what was there is as it was"):
            _write(lm, tensors, staging, with_base=save_base)
        with explaining(
            f"could not replace every file of {folder}: load rejects what is there now if it "
            "is of two saves; save again"
        ):
            _commit(staging, folder, with_base=save_base)


def push_to_hub(
    lm: WrappedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    save_base: bool | None = None,
    commit_message: str = "Upload a FastPerturb checkpoint",
    **upload_options: Any,
) -> Any:
    """Upload the files of save_pretrained as one commit; options go to `upload_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        # Of several processes all take part in gathering shards, and one uploads.
        here = not dist.is_initialized() or dist.get_rank() == 0
        save_pretrained(lm, folder, save_base=save_base, is_main_process=here)
        if not here:
            return None
        repo = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        return huggingface_hub.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            token=token,
            commit_message=commit_message,
            **upload_options,
        )


def _tensors(lm: WrappedModel) -> dict[str, Tensor]:
    """Return the transform's state in fp32 on the CPU, if its config describes it."""
    transform, config = lm.transform, lm.config
    tensors = {name: value.detach() for name, value in transform.state_dict().items()}
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    kind = lm.perturbation
    same = all(_value(config, key) == _value(transform, key) for key in kind.described_by)
    if not same or shapes != kind.transform_shapes(config, transform.embed_dim):
        raise ValueError(
            f"lm.config no longer describes lm.transform: {config} against {transform}; wrap "
            "the base anew instead of replacing one of them"
        )
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"transform parameter {name} is {value.dtype}, which fp32 would round: call "
                "lm.transform.float() first"
            )
    trained = {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad}
    reject_non_finite(tensors | trained, "not saved: training diverged")
    return {name: value.float().cpu().contiguous() for name, value in tensors.items()}


def _value(owner: object, key: str) -> object:
    """Return what a key like "edits.rate" names, None if there is nothing of that name."""
    for name in key.split("."):
        owner = getattr(owner, name, None)
    return owner


def _write(lm: WrappedModel, tensors: dict[str, Tensor], staging: Path, *, with_base: bool) -> None:
    base: Any = lm.base
    names: tuple[str, ...] = (TENSORS_NAME,)
    if is_adapted(base):
        _write_adapter(base, staging)
        names += ADAPTER_NAMES
    elif with_base:
        base.save_pretrained(staging)
    versions = {"format_version": str(FORMAT_VERSION), "fastperturb_version": __version__}
    content = safetensors.torch.save(tensors, {"format": "pt"} | versions)
    (staging / TENSORS_NAME).write_bytes(content)
    rms, embed_dim = embedding_rms(understand(base).embed)
    write_manifest(
        staging, config=lm.config, embed_dim=embed_dim, base=Base.of(base, rms), names=names
    )
    for path in staging.iterdir():
        flush(path)


def _write_adapter(base: Any, staging: Path) -> None:
    """Write PEFT's two files at the top of the folder, whatever the adapter's run-time name."""
    name = base.active_adapter
    base.save_pretrained(staging, selected_adapters=[name])
    if name != "default":
        for file in ADAPTER_NAMES:
            os.replace(staging / name / file, staging / file)
        (staging / name).rmdir()
    # Only a template, and it would replace a card that somebody wrote.
    (staging / "README.md").unlink(missing_ok=True)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Make a folder inside the folder: on the same disk, so that renaming is atomic."""
    with explaining(f"could not write to {folder}"):
        path = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _commit(staging: Path, folder: Path, *, with_base: bool) -> None:
    """Rename every file into place, the one that vouches for the others last."""
    names = sorted(path.name for path in staging.iterdir() if path.name != CONFIG_NAME)
    if with_base:
        # The base's files, which may be huge, have no digest: nothing would tell a mix.
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        flush(folder)
        for stale in folder.glob("model*.safetensors*"):
            if stale.name not in names:
                stale.unlink()
    for name in [*names, CONFIG_NAME]:
        os.replace(staging / name, folder / name)
    flush(folder)
