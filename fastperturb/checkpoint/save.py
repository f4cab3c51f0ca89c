"""Saving a perturbed model, and loading one: the files of `checkpoint`, written whole or not.

Beside the transform go the adapter, by PEFT, or the base that trained without one, by its own
save_pretrained. Files are written aside, flushed and renamed into place, the config that vouches
for the others last: whatever interrupts a save, what is left is the old checkpoint, the new one,
or one that `load` refuses. A model that a checkpoint does not fit stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastperturb.checkpoint.atomic import explaining, flush
from fastperturb.checkpoint.format import (
    ADAPTER_NAMES,
    CONFIG_NAME,
    FORMAT_VERSION,
    TENSORS_NAME,
    Base,
    Checkpoint,
    is_adapted,
    layout,
    refuse_non_finite,
    unadapted,
    without_peft_deprecations,
    write_manifest,
)
from fastperturb.engine import sharding
from fastperturb.engine.architectures import understand
from fastperturb.model.edits import EditConfig, edit
from fastperturb.model.wrapper import PerturbedLM, embedding_rms, wrap
from fastperturb.version import __version__


def save_pretrained(
    lm: PerturbedLM,
    save_directory: str | os.PathLike[str],
    *,
    save_base: bool | None = None,
    is_main_process: bool = True,
) -> None:
    """Write everything that trained into a folder that `load` reads.

    save_base: whether to write a base without adapters too, by its own save_pretrained; None
        is whether any of its parameters requires a gradient.
    is_main_process: the other processes of a distributed run write nothing. Under FSDP2 all of
        them must call: the first one writes, and gathers the model in its CPU memory for it.
    """
    if sharding.is_sharded(lm):
        is_main_process = dist.get_rank() == 0
        with sharding.made_whole(lm, here=is_main_process):
            if is_main_process:
                _save(lm, Path(save_directory), save_base)
    elif is_main_process:
        _save(lm, Path(save_directory), save_base)


def _save(lm: PerturbedLM, folder: Path, save_base: bool | None) -> None:
    tensors = _tensors(lm)
    _refuse_hidden_adapters(lm.base)
    if is_adapted(lm.base):
        _refuse_unsaved_weights(lm.base, save_base)
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
            f"could not replace every file of {folder}: load refuses what is there now if it "
            "is of two saves; save again"
        ):
            _commit(staging, folder, with_base=save_base)


def push_to_hub(
    lm: PerturbedLM,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    save_base: bool | None = None,
    commit_message: str = "Upload a FastPerturb checkpoint",
    **upload_options: Any,
) -> Any:
    """Upload what save_pretrained writes as one commit; options go to `upload_folder`."""
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


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PerturbedLM:
    """Wrap a model with a saved perturbation, and with the adapter saved beside it.

    model: the base that it was saved over, plain; or a PeftModel with that adapter on it. Where
        the base was saved too, `from_pretrained(directory)` makes it.
    directory: a folder, or the id of a repository on the Hugging Face Hub (`revision` and
        `token` are for it).
    is_trainable: go on learning. As in PEFT, what is loaded is frozen by default, and the model
        is in eval mode.

    Raises ValueError or OSError on files that are missing, damaged, changed or made for another
    model, and leaves the model as it was.
    """
    embed: Any = understand(model).embed
    width = embed.weight.shape[-1]
    _refuse_hidden_adapters(model)
    saved = Checkpoint.read(_find(directory, revision, token))
    tensors = saved.tensors()
    if width != saved.embed_dim:
        raise ValueError(
            f"{saved.folder} moves embeddings {saved.embed_dim} wide, and those of this "
            f"{_kind(model)} are {width}; it was saved over {saved.base}"
        )
    adapter = saved.adapter_tensors() if saved.has_adapter else {}
    with _restored_on_error(model, overwritten=map(_base_name, adapter)):
        base = model
        if adapter and not is_adapted(model):
            base = _put_on(model, adapter, saved, is_trainable=is_trainable)
        if adapter:
            _check_adapter(base, adapter, saved)
        config = saved.config
        lm = edit(base, config) if isinstance(config, EditConfig) else wrap(base, config)
        saved.base.check(Base.of(base, lm.transform.embed_rms), saved.folder)
        lm.transform.load_state_dict(tensors)
        lm.transform.requires_grad_(is_trainable)
    return lm if is_trainable else lm.eval()


# Writing


def _tensors(lm: PerturbedLM) -> dict[str, Tensor]:
    """The transform's state in fp32 on the CPU, as its config describes it."""
    transform, config = lm.transform, lm.config
    tensors = {name: value.detach() for name, value in transform.state_dict().items()}
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    edits = isinstance(config, EditConfig)
    keys = ("rate", "kinds", "neighbors") if edits else ("latent", "scope", "min_scale")
    same = all(getattr(config, key) == getattr(transform, key, None) for key in keys)
    if not same or shapes != layout(config, transform.embed_dim):
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
    refuse_non_finite(tensors | trained, "not saved: training diverged")
    return {name: value.float().cpu().contiguous() for name, value in tensors.items()}


def _refuse_unsaved_weights(base: Any, save_base: bool | None) -> None:
    """Refuse what PEFT's files would leave out, unless asked to."""
    from peft import get_peft_model_state_dict

    if len(base.peft_config) > 1:
        raise ValueError(
            f"lm.base has the adapters {list(base.peft_config)} and a checkpoint holds one: "
            "delete_adapter the others, or save them by PEFT"
        )
    if save_base:
        raise ValueError(
            "save_base=True is for a base without adapters: put lm.base.merge_and_unload() in "
            "the place of lm.base first, or save the adapter alone"
        )
    held = get_peft_model_state_dict(
        base, adapter_name=base.active_adapter, save_embedding_layers=False
    )
    pointers = {value.data_ptr() for value in held.values()}
    lost = [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad
        and parameter.data_ptr() not in pointers
        and base.base_model.prefix not in name
    ]
    if lost and save_base is None:
        raise ValueError(
            f"{len(lost)} parameters train outside the adapter and would be lost, the first "
            f"{lost[0]}: name their modules in the adapter's modules_to_save, freeze them, or "
            "leave them out by save_base=False"
        )


def _refuse_hidden_adapters(model: nn.Module) -> None:
    """Refuse adapters inside a model that is no PeftModel, by which alone they are saved."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"this {type(model).__name__} carries an adapter that transformers put on it, whose "
            "saving and loading are its own: load the base by its own name, and let PEFT "
            "(PeftModel) or fastperturb.load put the adapter on"
        )
    if not is_adapted(model) and any(is_adapted(module) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is no PeftModel, but get_peft_model or an earlier "
            "fastperturb.load put an adapter into its layers: to save, set lm.base to the "
            "PeftModel that get_peft_model returned; to load another checkpoint, give it a base of "
            "its own, or take the first adapter off by lm.base.unload()"
        )


def _write(lm: PerturbedLM, tensors: dict[str, Tensor], staging: Path, *, with_base: bool) -> None:
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
    """PEFT's two files at the top of the folder, whatever the adapter is called at run time."""
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
    """A folder inside the folder: on the same disk, so that renaming is atomic."""
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


# Reading


def _find(directory: str | os.PathLike[str], revision: str | None, token: Any) -> Path:
    """The folder itself, or what the Hub has under that name."""
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


def _put_on(
    model: nn.Module, adapter: Mapping[str, Tensor], saved: Checkpoint, *, is_trainable: bool
) -> nn.Module:
    """The model with the saved adapter, by PEFT."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{saved.folder} holds a PEFT adapter: pip install peft") from error
    half = any(value.dtype in (torch.bfloat16, torch.float16) for value in adapter.values())
    try:
        with without_peft_deprecations():
            # PEFT widens a half-precision adapter unless told not to.
            return PeftModel.from_pretrained(
                model, saved.folder, is_trainable=is_trainable, autocast_adapter_dtype=not half
            )
    except Exception as error:  # PEFT raises whatever its methods do
        raise ValueError(
            f"the adapter of {saved.folder} does not fit this {_kind(model)}: {error}; it was "
            f"saved over {saved.base}"
        ) from error


def _check_adapter(model: Any, adapter: Mapping[str, Tensor], saved: Checkpoint) -> None:
    """Refuse an adapter on the model that is not the saved one."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    own = model.state_dict()  # of which PEFT saves resized embeddings too
    held = {name: own[name] for name in adapter if name in own} | held
    names = sorted(held.keys() | adapter.keys())
    differ = [name for name in names if not _same(held.get(name), adapter.get(name))]
    if differ:
        raise ValueError(
            f"the adapter of {saved.folder} and the one on this {_kind(model)} differ in "
            f"{len(differ)} of {len(names)} tensors, the first {differ[0]!r}; give the base that "
            f"it was saved over, without an adapter: {saved.base}"
        )


def _same(held: Tensor | None, saved: Tensor | None) -> bool:
    if held is None or saved is None or held.shape != saved.shape:
        return False
    return torch.equal(saved.to(held), held)


def _base_name(adapter_key: str) -> str:
    """What the tensor of an adapter file would be called in the plain model."""
    return adapter_key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _kind(model: nn.Module) -> str:
    return type(unadapted(model)).__name__


@contextlib.contextmanager
def _restored_on_error(model: nn.Module, *, overwritten: Iterable[str]) -> Iterator[None]:
    """Undo what happens to a model's modules and weights, should the body raise.

    overwritten: names of tensors whose entries the body writes; it may replace all the others.
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
