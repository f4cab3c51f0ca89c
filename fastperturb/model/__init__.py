"""The wrapper that people call: `wrap`, `PerturbedLM`, `load`."""

from fastperturb.model.edits import EditConfig, EditedLM, edit
from fastperturb.model.wrapper import PerturbedLM, PerturbedOutput, wrap

__all__ = ["EditConfig", "EditedLM", "PerturbedLM", "PerturbedOutput", "edit", "wrap"]
