"""FastPerturb: language models with learned random prefix perturbations, trained fast."""

import importlib
from typing import TYPE_CHECKING

from fastperturb.version import __version__

if TYPE_CHECKING:
    from fastperturb import estimators, noise, ops, transforms
    from fastperturb.config import PerturbConfig
    from fastperturb.integrations.trainer import PerturbTrainer as PerturbTrainer
    from fastperturb.model import (
        EditConfig,
        EditedLM,
        PerturbedLM,
        PerturbedOutput,
        edit,
        load,
        wrap,
    )

_HOMES = {
    "EditConfig": "fastperturb.model",
    "EditedLM": "fastperturb.model",
    "PerturbConfig": "fastperturb.config",
    "PerturbTrainer": "fastperturb.integrations.trainer",
    "PerturbedLM": "fastperturb.model",
    "PerturbedOutput": "fastperturb.model",
    "edit": "fastperturb.model",
    "load": "fastperturb.model",
    "wrap": "fastperturb.model",
}
_MODULES = ("estimators", "noise", "ops", "transforms")

# Not PerturbTrainer: Trainer imports packages of the extras, as `import *` should not.
__all__ = [
    "EditConfig",
    "EditedLM",
    "PerturbConfig",
    "PerturbedLM",
    "PerturbedOutput",
    "__version__",
    "edit",
    "estimators",
    "load",
    "noise",
    "ops",
    "transforms",
    "wrap",
]


def __getattr__(name: str) -> object:
    """Load torch and transformers when something needs them, not on `import fastperturb`."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastperturb.{name}")
    raise AttributeError(f"module 'fastperturb' has no attribute {name!r}")
