"""Models with PEFT adapters, and the models inside them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model is one of PEFT's."""
    return type(model).__module__.startswith("peft.")


def unadapted(model: Any) -> nn.Module:
    """Return the transformers model, inside PEFT's or itself."""
    return model.get_base_model() if is_adapted(model) else model


@contextlib.contextmanager
def without_peft_deprecations() -> Iterator[None]:
    """Hide a warning of an attribute that peft 0.21 reads: a user could do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
