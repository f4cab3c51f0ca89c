"""A model learned from logit queries: it expresses every history by bases of histories.

Our reconstruction of the model class of a published algorithm (arXiv 2512.09892). For each length
t it holds histories H_t and futures F_t. The state after a history is the coefficients v over H_t
that give its row of logits: the next token is distributed as softmax(v L[H_t, empty]). After a
token z the state is the coefficients over H_{t+1} of the row v L[H_t z, F_{t+1}]. Least squares
gives them as a linear map of v, but in products of such maps errors can grow exponentially. So
where a coefficient would exceed the bound, a linear program finds the closest row with none above
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastperturb.rank.learn.answers import Answers
from fastperturb.rank.learn.isan import ISAN
from fastperturb.rank.learn.spanner import bounded_fit
from fastperturb.rank.learn.states import StateModel
from fastperturb.rank.types import Floats, Integers, Tokens


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis of one length; its C columns are pairs (future, token), the empty future first."""

    histories: tuple[Tokens, ...]
    futures: tuple[Tokens, ...]
    rows: Floats  # [R, C]: logits after the histories and futures
    inverse: Floats  # [C, R]: maps a row to its coefficients by least squares
    extended: Floats  # [V, R, C']: rows of the histories and one token, on the next futures
    transitions: Floats  # [V, R, R']: their coefficients over the next histories


class LearnedModel(StateModel):
    """A learned distribution of sequences of `length` tokens, which is a `LogitOracle` too.

    bases: one for each number of tokens read, 0 .. length - 1.
    bound: the largest coefficient allowed.
    answers: the oracle's logits by context, with which learning can resume.
    checked: the number of fresh contexts that `learn` compared with the oracle at last; 0 if the
        budget ended learning before.
    failed: the number of these that were further off than the tolerance explains, although nothing
        was left to learn from them.
    linear_programs: the number of linear programs that the bound has needed so far.
    worst_residual: the largest error, in logits, of such a program: the cost of the bound. Far
        above the tolerance, it says that the bound is too tight or that the oracle's rank is higher
        than the learned one.
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
        for t in reversed(range(self.length)):
            following = _basis(answers, histories[t], futures[t], following)
            self.bases.insert(0, following)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of the rows of logits for each number of tokens read."""
        return tuple(len(basis.histories) for basis in self.bases)

    @property
    def rank(self) -> int:
        """The largest of the ranks."""
        return max(self.ranks)

    @property
    def queries(self) -> int:
        """The number of contexts that the oracle was asked about."""
        return len(self.answers)

    def to_isan(self) -> ISAN:
        """Return the model without its bound, which is the same where no coefficient exceeds it."""
        return ISAN(
            self.initial_state(),
            [basis.transitions for basis in self.bases[:-1]],
            [basis.rows[:, : self.vocab_size] for basis in self.bases],
        )

    def initial_state(self) -> Floats:
        return np.ones(len(self.bases[0].histories))  # the empty history is its own basis

    def advance(self, step: int, states: Floats, tokens: Integers) -> Floats:
        basis, following = self.bases[step], self.bases[step + 1]
        coefficients = np.einsum("nr,nrs->ns", states, basis.transitions[tokens])
        beyond = np.abs(coefficients).max(1, initial=0.0) > self.bound
        for index in np.flatnonzero(beyond):
            row = states[index] @ basis.extended[tokens[index]]
            coefficients[index], residual = bounded_fit(row, following.rows, self.bound)
            self.linear_programs += 1
            self.worst_residual = max(self.worst_residual, residual)
        return coefficients

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
