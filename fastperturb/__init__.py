"""FastPerturb: language models with learned random prefix perturbations, trained fast."""

import importlib
from typing import TYPE_CHECKING

from fastperturb.version import __version__

if TYPE_CHECKING:
    from fastperturb import estimators, noise, ops, transforms
    from fastperturb.config import PerturbConfig
    from fastperturb.edits import EditConfig, EditedLM, edit
    from fastperturb.model import PerturbedLM, PerturbedOutput, wrap
    from fastperturb.saving import load
    from fastperturb.train.trainer import PerturbTrainer as PerturbTrainer

_HOMES = {
    "EditConfig": "fastperturb.edits",
    "EditedLM": "fastperturb.edits",
    "PerturbConfig": "fastperturb.config",
    "PerturbTrainer": "fastperturb.train.trainer",
    "PerturbedLM": "fastperturb.model",
    "PerturbedOutput": "fastperturb.model",
    "edit": "fastperturb.edits",
    "load": "fastperturb.saving",
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
