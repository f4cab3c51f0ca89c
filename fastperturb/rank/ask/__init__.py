"""Ask a model for log-probs of the next token after histories and futures."""

from fastperturb.rank.ask.distributions import distributions_along, mean_kl, sample_continuations
from fastperturb.rank.ask.model_oracle import ModelOracle
from fastperturb.rank.ask.oracle import FunctionOracle, LogitOracle, Metered, QueryBudgetSpent

__all__ = [
    "FunctionOracle",
    "LogitOracle",
    "Metered",
    "ModelOracle",
    "QueryBudgetSpent",
    "distributions_along",
    "mean_kl",
    "sample_continuations",
]
