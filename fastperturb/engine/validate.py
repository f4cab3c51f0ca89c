"""Validation of a call's tensors: errors name the argument, the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32)


def tensor(name: str, value: object, layout: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `value` is a tensor of this layout, as "[B, T]", and one of these dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    if value.ndim != layout.count(",") + 1 or value.dtype not in dtypes:
        raise ValueError(
            f"{name} must be {layout} of {' or '.join(map(str, dtypes))}, "
            f"got {value.dtype} {list(value.shape)}"
        )
    if value.numel() == 0:
        raise ValueError(f"{name} must hold at least one token, got {list(value.shape)}")


def like(embeddings: Tensor, name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `value` is None or lies [B, T] beside the embeddings."""
    if value is None:
        return
    tensor(name, value, "[B, T]", dtypes)
    assert isinstance(value, Tensor)
    if value.shape != embeddings.shape[:2] or value.device != embeddings.device:
        raise ValueError(
            f"{name} must be [B, T] = {list(embeddings.shape[:2])} on {embeddings.device}, "
            f"got {list(value.shape)} on {value.device}"
        )


def range(name: str, numbers: Tensor, size: int, also: str = "") -> None:
    """Raise if numbers lie outside [0, size), where looking at them costs no synchronisation."""
    if numbers.device.type != "cpu" or numbers.numel() == 0:
        return
    wrong = numbers[(numbers < 0) | (numbers >= size)]
    if wrong.numel():
        raise IndexError(f"{name} must {also}lie in [0, {size}), got {int(wrong[0])}")
