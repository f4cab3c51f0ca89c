"""PEFT adapters on a base: putting a saved one on, rejecting weights that PEFT would not save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastperturb.checkpoint.format import Checkpoint
from fastperturb.engine.adapters import is_adapted, unadapted, without_peft_deprecations


def reject_unsaved_weights(base: Any, save_base: bool | None) -> None:
    """Raise if PEFT's files would leave out trained weights, unless save_base is False."""
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


def reject_hidden_adapters(model: nn.Module) -> None:
    """Raise on adapters inside a model that is no PeftModel: only PEFT saves them."""
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


def put_on(
    model: nn.Module, adapter: Mapping[str, Tensor], saved: Checkpoint, *, is_trainable: bool
) -> nn.Module:
    """Return the model with the saved adapter, put on by PEFT."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{saved.folder} holds a PEFT adapter: pip install peft") from error
    half = any(value.dtype in (torch.bfloat16, torch.float16) for value in adapter.values())
    try:
        with without_peft_deprecations():
            # By default PEFT widens a half-precision adapter.
            return PeftModel.from_pretrained(
                model, saved.folder, is_trainable=is_trainable, autocast_adapter_dtype=not half
            )
    except Exception as error:  # PEFT promises no types of errors
        raise ValueError(
            f"the adapter of {saved.folder} does not fit this {class_name(model)}: {error}; it was "
            f"saved over {saved.base}"
        ) from error


def check_adapter(model: Any, adapter: Mapping[str, Tensor], saved: Checkpoint) -> None:
    """Raise if the adapter on the model is not the saved one."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    own = model.state_dict()  # PEFT also saves resized embeddings, which held lacks
    held = {name: own[name] for name in adapter if name in own} | held
    names = sorted(held.keys() | adapter.keys())
    differ = [name for name in names if not _same(held.get(name), adapter.get(name))]
    if differ:
        raise ValueError(
            f"the adapter of {saved.folder} and the one on this {class_name(model)} differ in "
            f"{len(differ)} of {len(names)} tensors, the first {differ[0]!r}; give the base that "
            f"it was saved over, without an adapter: {saved.base}"
        )


def _same(held: Tensor | None, saved: Tensor | None) -> bool:
    if held is None or saved is None or held.shape != saved.shape:
        return False
    return torch.equal(saved.to(held), held)


def base_name(adapter_key: str) -> str:
    """Return the plain model's name of an adapter file's tensor."""
    return adapter_key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def class_name(model: nn.Module) -> str:
    return type(unadapted(model)).__name__
