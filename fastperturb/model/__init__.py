"""The wrapper that people call: `wrap`, `PerturbedLM`, `load`."""

from fastperturb.engine.edits import EditConfig
from fastperturb.engine.forward import PerturbedOutput
from fastperturb.model.loading import load
from fastperturb.model.wrapper import EditedLM, PerturbedLM, edit, wrap

__all__ = ["EditConfig", "EditedLM", "PerturbedLM", "PerturbedOutput", "edit", "load", "wrap"]
