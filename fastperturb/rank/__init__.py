"""Low logit rank: measure it, write by it, learn from it; and `fastperturb rank`.

`ask` asks a model, `measure` makes the matrix and looks at it, `combine` writes by combinations of
histories, `learn` learns a model from queries (arXiv 2510.24966, 2512.09892: *published*; the code
is our reconstruction).
"""

from fastperturb.rank.ask.models import ModelOracle
from fastperturb.rank.ask.oracle import (
    FunctionOracle,
    LogitOracle,
    Metered,
    QueryBudgetSpent,
    Tokens,
)
from fastperturb.rank.combine.combination import fit
from fastperturb.rank.combine.comparison import compare
from fastperturb.rank.combine.streams import follow, open_streams, write
from fastperturb.rank.command import run
from fastperturb.rank.learn.isan import ISAN
from fastperturb.rank.learn.learned import LearnedModel
from fastperturb.rank.learn.learning import learn
from fastperturb.rank.measure.matrix import LogitMatrix, logit_matrix
from fastperturb.rank.options import RankOptions

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
    "fit",
    "follow",
    "learn",
    "logit_matrix",
    "open_streams",
    "run",
    "write",
]
