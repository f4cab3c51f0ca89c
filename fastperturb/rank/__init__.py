"""Low logit rank: measure it, write with it, learn from it; and `fastperturb rank`.

`ask` asks a model for logits, `measure` builds the logit matrix and measures it, `combine` writes
with combinations of histories, and `learn` learns a model from queries (arXiv 2510.24966,
2512.09892: *published*; the code is our reconstruction).
"""

from fastperturb.rank.ask import (
    FunctionOracle,
    LogitOracle,
    Metered,
    ModelOracle,
    QueryBudgetSpent,
)
from fastperturb.rank.combine import compare, fit, follow, open_streams, write
from fastperturb.rank.command import run
from fastperturb.rank.learn import ISAN, LearnedModel, learn
from fastperturb.rank.measure import (
    LogitMatrix,
    exponent_difference,
    kl_by_rank,
    logit_matrix,
    power_law,
    spectrum,
)
from fastperturb.rank.options import RankOptions
from fastperturb.rank.types import Tokens

__all__ = [
    "ISAN",
    "FunctionOracle",
    "LearnedModel",
    "LogitMatrix",
    "LogitOracle",
    "Metered",
    "ModelOracle",
    "QueryBudgetSpent",
    "RankOptions",
    "Tokens",
    "compare",
    "exponent_difference",
    "fit",
    "follow",
    "kl_by_rank",
    "learn",
    "logit_matrix",
    "open_streams",
    "power_law",
    "run",
    "spectrum",
    "write",
]
