"""Learn a model of low logit rank from queries, and make targets of known rank."""

from fastperturb.rank.learn.isan import ISAN, noisy_parity
from fastperturb.rank.learn.learned import LearnedModel
from fastperturb.rank.learn.learning import learn
from fastperturb.rank.learn.states import StateModel

__all__ = ["ISAN", "LearnedModel", "StateModel", "learn", "noisy_parity"]
