"""The three ops of the engine: one schema each, the implementation chosen in `dispatch`."""

from fastperturb.ops.head import linear_logprob, linear_quadratic
from fastperturb.ops.perturb_embed import perturb_embed

__all__ = ["linear_logprob", "linear_quadratic", "perturb_embed"]
