"""`fastperturb eval`: how likely texts are under models."""

from fastperturb.eval.command import run
from fastperturb.eval.options import EvalOptions

__all__ = ["EvalOptions", "run"]
