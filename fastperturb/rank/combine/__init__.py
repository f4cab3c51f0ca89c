"""Write with linear combinations of the logits of other histories."""

from fastperturb.rank.combine.comparison import Comparison, Predictor, WrittenExample, compare
from fastperturb.rank.combine.streams import Streams, follow, open_streams, write
from fastperturb.rank.combine.weights import Fit, fit

__all__ = [
    "Comparison",
    "Fit",
    "Predictor",
    "Streams",
    "WrittenExample",
    "compare",
    "fit",
    "follow",
    "open_streams",
    "write",
]
