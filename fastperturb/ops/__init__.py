"""The ops of the engine: one schema each; `dispatch` chooses the implementation."""

from fastperturb.ops.combine import Combined, combine
from fastperturb.ops.context import context_scale
from fastperturb.ops.context_scan import context_scan
from fastperturb.ops.embed import perturb_embed, perturb_embed_per_sample_grad
from fastperturb.ops.head import linear_logprob, linear_quadratic

__all__ = [
    "Combined",
    "combine",
    "context_scale",
    "context_scan",
    "linear_logprob",
    "linear_quadratic",
    "perturb_embed",
    "perturb_embed_per_sample_grad",
]
