"""`fastperturb eval`: compare models by the likelihood of texts."""

from fastperturb.eval.command import run
from fastperturb.eval.options import EvalOptions

__all__ = ["EvalOptions", "run"]
