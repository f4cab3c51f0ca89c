"""A model learned from logit queries: bases of histories, and every other history by them.

Our reconstruction of the model class of a published algorithm (arXiv 2512.09892). For each length
t it holds histories H_t and futures F_t, and the state after a history is the coefficients v over
H_t that give its row of logits: the next token is softmax(v L[H_t, empty]). A token z moves v to
coefficients over H_{t+1} of the row v L[H_t z, F_{t+1}]. Least squares gives them, a linear map of
v; but products of such maps can make what is wrong in them grow exponentially. So where a
coefficient would exceed the bound, a linear program finds the closest row of which none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastperturb.rank.ask.oracle import Tokens
from fastperturb.rank.learn.answers import Answers
from fastperturb.rank.learn.isan import ISAN
from fastperturb.rank.learn.spanner import bounded_fit
from fastperturb.rank.learn.states import Floats, Integers, StateModel


@dataclass(frozen=True, eq=False)
class Basis:
    """What is known of one length; C columns are pairs (future, token), the empty future first."""

    histories: tuple[Tokens, ...]
    futures: tuple[Tokens, ...]
    rows: Floats  # [R, C]: logits after the histories and futures
    inverse: Floats  # [C, R]: takes a row to its coefficients by least squares
    extended: Floats  # [V, R, C']: rows of the histories and one token, on the next futures
    transitions: Floats  # [V, R, R']: their coefficients over the next histories


class LearnedModel(StateModel):
    """What `learn` returns: a law of sequences of `length` tokens, and a `LogitOracle`.

    bases: of each length 0 .. length - 1.
    bound: on every coefficient.
    answers: all that the oracle was asked, to go on from.
    checked, failed: how many fresh contexts `learn` compared with the oracle at last, and how many
        were further off than tolerance explains with nothing in them left to learn from. None
        were compared where the budget ended learning.
    linear_programs: how many re-expressions have needed one so far.
    worst_residual: how far, in logits, the worst of them was from the row it stands for: what the
        bound has cost. Far above the tolerance, it says that the bound is too tight or that the
        oracle's rank is higher than what was found.
    """

    def __init__(
        self,
        answers: Answers,
        histories: Sequence[tuple[Tokens, ...]],
        futures: Sequence[tuple[Tokens, ...]],
        *,
        bound: float,
    ) -> None:
        self.vocab_size, self.length = answers.vocab_size, len(histories)
        self.bound, self.answers = bound, answers.logits
        self.checked = self.failed = 0
        self.linear_programs, self.worst_residual = 0, 0.0
        self.bases: list[Basis] = []
        following: Basis | None = None
        for each_histories, each_futures in reversed(list(zip(histories, futures))):
            following = _basis(answers, each_histories, each_futures, following)
            self.bases.insert(0, following)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each length's rows of logits."""
        return tuple(len(basis.histories) for basis in self.bases)

    @property
    def rank(self) -> int:
        return max(self.ranks)

    @property
    def queries(self) -> int:
        """How many contexts were asked."""
        return len(self.answers)

    def to_isan(self) -> ISAN:
        """The same without the bound on coefficients: the same law where none would exceed it."""
        return ISAN(
            self.initial_state(),
            [basis.transitions for basis in self.bases[:-1]],
            [basis.rows[:, : self.vocab_size] for basis in self.bases],
        )

    def initial_state(self) -> Floats:
        return np.ones(len(self.bases[0].histories))  # the empty history is its own basis

    def advance(self, step: int, states: Floats, tokens: Integers) -> Floats:
        basis, following = self.bases[step], self.bases[step + 1]
        moved = np.einsum("nr,nrs->ns", states, basis.transitions[tokens])
        beyond = np.abs(moved).max(1, initial=0.0) > self.bound
        for place in np.flatnonzero(beyond):
            row = states[place] @ basis.extended[tokens[place]]
            moved[place], residual = bounded_fit(row, following.rows, self.bound)
            self.linear_programs += 1
            self.worst_residual = max(self.worst_residual, residual)
        return moved

    def logits(self, step: int, states: Floats) -> Floats:
        return states @ self.bases[step].rows[:, : self.vocab_size]


def _basis(
    answers: Answers,
    histories: tuple[Tokens, ...],
    futures: tuple[Tokens, ...],
    following: Basis | None,
) -> Basis:
    size, vocab = len(histories), answers.vocab_size
    rows = answers.rows(histories, futures)
    extended, transitions = np.empty((vocab, size, 0)), np.empty((vocab, size, 0))
    if following is not None and following.histories:
        longer = [(*history, token) for token in range(vocab) for history in histories]
        extended = answers.rows(longer, following.futures).reshape(
            vocab, size, len(following.inverse)
        )
        transitions = extended @ following.inverse
    inverse = np.linalg.pinv(rows).astype(np.float64, copy=False)
    return Basis(histories, futures, rows, inverse, extended, transitions)
