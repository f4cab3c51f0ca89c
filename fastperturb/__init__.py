"""FastPerturb: language models with learned random prefix perturbations, trained fast."""

import importlib
from typing import TYPE_CHECKING

from fastperturb.version import __version__

if TYPE_CHECKING:
    from fastperturb import estimators, noise, ops, transforms
    from fastperturb.config import PerturbConfig
    from fastperturb.model import PerturbedLM, PerturbedOutput, wrap
    from fastperturb.saving import load

_HOMES = {
    "PerturbConfig": "fastperturb.config",
    "PerturbedLM": "fastperturb.model",
    "PerturbedOutput": "fastperturb.model",
    "load": "fastperturb.saving",
    "wrap": "fastperturb.model",
}
_MODULES = ("estimators", "noise", "ops", "transforms")

__all__ = [
    "PerturbConfig",
    "PerturbedLM",
    "PerturbedOutput",
    "__version__",
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
