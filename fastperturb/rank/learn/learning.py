"""Learn a model of low logit rank by asking an oracle for its logits.

Our reconstruction of a published algorithm (arXiv 2512.09892); its steps and their order are ours.
L_t[h, (f, z)] is the centred log-prob of z after h f, for histories h of length t and futures f.
For every t we look for histories H_t of which all rows of L_t are combinations with small
coefficients, and for futures F_t that suffice to find those.

Histories grow by closure. H_0 holds the empty one. If H_t spans all rows of length t, its
extensions by every token, the pool, span all of length t + 1, and H_{t+1} is a spanner of the pool
(`spanner.spanner`). Futures grow by the elliptical-potential rule (`spanner.admitted`): those join
that could tell histories apart where the present ones cannot. Candidates are z f' for f' in
F_{t+1}, whose answers on H_t are the pool's. At first there are also a few random ones, some of
full length: a parity shows in no shorter one.

That both are closed does not prove them complete, so the model is tested on fresh contexts, half of
uniform tokens and half sampled from itself, and learns from those it fails. Let v_t be the state
after t of the context's tokens, z the next and g the rest. Then v_t L[H_t z, g] predicts the last
token's logits by rows of length t + 1; it is right at t = 0 and wrong at the end. Where it jumps,
the pool has a row that H_{t+1} gives on F_{t+1} but not on g, so g joins F_{t+1}. But if a prefix
of the context is itself a row that H_t does not give, or not by coefficients within the bound, then
that prefix joins the pool. Either way a rank, a volume or a potential grows, so this ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastperturb.rank.ask.oracle import LogitOracle, QueryBudgetSpent
from fastperturb.rank.learn.answers import Answers
from fastperturb.rank.learn.learned import LearnedModel
from fastperturb.rank.learn.spanner import admitted, spanner
from fastperturb.rank.learn.states import by_length
from fastperturb.rank.types import Floats, Tokens

# Rows of the pool on which random futures are tried, beside those of the basis.
_TRIAL_ROWS = 4
# Failed contexts to learn from before the bases are closed again.
_FAILURES_PER_SWEEP = 4
# Contexts of a model's first test; a test that is passed is followed by one of twice as many.
_FIRST_CHECKS = 16


def learn(
    oracle: LogitOracle,
    length: int,
    *,
    tolerance: float = 1e-3,
    bound: float = 2.0,
    checks: int = 200,
    budget: int | None = 100_000,
    seed: int = 0,
    known: LearnedModel | None = None,
) -> LearnedModel:
    """Learn the distribution of `length` tokens behind an oracle whose logit ranks are low.

    Asks for every extension of every basis history by one token: some length * vocabulary * rank
    contexts, times the futures that a basis needs.

    tolerance: the distance in logits up to which a row counts as in the span of others. Choose
        about six times the error of the oracle's answers, as a combination of several rows has the
        errors of all. Below that, errors count as ranks, of which there is no end.
    bound: the largest coefficient by which a basis may give a history's row. A higher one needs
        fewer exchanges of histories and lets errors grow faster.
    checks: the number of fresh contexts in a row that must be predicted before learning ends. If a
        share q of all contexts failed, all checks would pass with probability (1 - q)^checks: 200
        say with 99% confidence that less than 2.3% fail. A context that fails with nothing left to
        learn from it is counted in the model's `failed`.
    budget: the largest number of contexts to ask about, those of `known` included; None is no
    limit.
    seed: the seed of everything drawn at random.
    known: a model learned from the same oracle, none of whose answers is asked for again; with the
        same seed and options, learning resumes where it was.

    Raises QueryBudgetSpent, whose `learned` is the last model whose logits were all known.
    """
    _check(oracle, length, tolerance, bound, checks, known)
    answers = Answers(oracle, budget=budget, known=known.answers if known else None)
    learner = _Learner(answers, length, tolerance, bound, np.random.default_rng(seed))
    try:
        learner.sweep(explore=True)
        return learner.tested(checks)
    except QueryBudgetSpent as error:
        model = learner.model()
        spent = QueryBudgetSpent(
            f"{error}. Learning stopped before asking for {learner.stage}, at ranks "
            f"{list(model.ranks)} by length; error.learned is the model of these: use it, or call "
            "learn again with known=error.learned and a larger budget, which asks nothing twice"
        )
        spent.learned = model
        raise spent from error


def _check(
    oracle: LogitOracle,
    length: int,
    tolerance: float,
    bound: float,
    checks: int,
    known: LearnedModel | None,
) -> None:
    for name, count in {"length": length, "checks": checks}.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    if not bound > 1:
        raise ValueError(f"bound must be above 1, which a basis's own rows need, got {bound}")
    if known and (known.vocab_size, known.length) != (oracle.vocab_size, length):
        raise ValueError(
            f"known has vocab_size {known.vocab_size} and length {known.length}, but the oracle "
            f"has {oracle.vocab_size} and length is {length}: pass a model learned from the same "
            "oracle"
        )


class _Learner:
    """The bases of all lengths as they grow."""

    def __init__(
        self,
        answers: Answers,
        length: int,
        tolerance: float,
        bound: float,
        random: np.random.Generator,
    ) -> None:
        self.answers, self.length = answers, length
        self.tolerance, self.bound, self.random = tolerance, bound, random
        self.histories: list[tuple[Tokens, ...]] = [()] * length
        self.futures: list[tuple[Tokens, ...]] = [((),)] * length
        self.extras: list[tuple[Tokens, ...]] = [()] * length  # histories that join the pools
        self.contexts: list[Tokens] = []  # on which models were tested
        self.stage = "nothing"  # the next question, for the error of a spent budget
        self._save()

    def _save(self) -> None:
        """Save the bases, all of whose logits are known, for when the budget is spent."""
        self._saved = tuple(self.histories), tuple(self.futures)

    def model(self) -> LearnedModel:
        """Return the model of the bases saved last."""
        return LearnedModel(self.answers, *self._saved, bound=self.bound)

    def sweep(self, *, explore: bool = False) -> None:
        """Grow histories and futures until both are closed; `explore` tries random futures too."""
        before: tuple[list[tuple[Tokens, ...]], ...] = ()
        while before != (self.histories, self.futures):
            before = list(self.histories), list(self.futures)
            for t in range(self.length):
                self._grow_histories(t, explore)
            self._save()
            for t in reversed(range(self.length - 1)):
                self._grow_futures(t)
            explore = False

    def _grow_histories(self, t: int, explore: bool) -> None:
        pool = self._pool(t)
        if explore and t < self.length - 1:
            self._try_random_futures(t, pool)
        self.stage = f"the logits of {len(pool)} histories of length {t}"
        rows = self.answers.rows(pool, self.futures[t])
        present = len(self.histories[t])
        chosen = spanner(rows, present, tolerance=self.tolerance, bound=self.bound)
        self.histories[t] = tuple(pool[index] for index in chosen)
        if explore:  # there are no longer histories yet, so all logits of a model are known
            self._save()

    def _pool(self, t: int) -> list[Tokens]:
        """Return the present basis, followed by the other histories that it must span."""
        extended: list[Tokens] = [()]
        if t > 0:
            tokens = range(self.answers.vocab_size)
            extended = [(*history, z) for history in self.histories[t - 1] for z in tokens]
        return list(dict.fromkeys([*self.histories[t], *self.extras[t], *extended]))

    def _try_random_futures(self, t: int, pool: list[Tokens]) -> None:
        """Try a random future of full length and one of a random length."""
        longest = self.length - 1 - t
        sizes = longest, int(self.random.integers(1, longest + 1))
        candidates = [
            tuple(self.random.integers(self.answers.vocab_size, size=size).tolist())
            for size in sizes
        ]
        trial = self.random.permutation(len(pool))[:_TRIAL_ROWS]
        self._admit(t, [*self.histories[t], *(pool[index] for index in trial)], candidates)

    def _grow_futures(self, t: int) -> None:
        tokens = range(self.answers.vocab_size)
        candidates = [(z, *future) for z in tokens for future in self.futures[t + 1]]
        self._admit(t, self.histories[t], candidates)

    def _admit(self, t: int, histories: Sequence[Tokens], candidates: Sequence[Tokens]) -> bool:
        """Add the candidates that tell histories apart where the present futures cannot."""
        new = [future for future in dict.fromkeys(candidates) if future not in self.futures[t]]
        if not histories or not new:
            return False
        self.stage = f"futures of {len(histories)} histories of length {t}"
        seen = self.answers.rows(histories, self.futures[t])
        joined = admitted(seen, self.answers.of(histories, new), tolerance=self.tolerance)
        self.futures[t] += tuple(new[index] for index in joined)
        return bool(joined)

    def tested(self, checks: int) -> LearnedModel:
        """Learn from failed contexts until a model predicts `checks` fresh ones; return it.

        Contexts on which an earlier model was tested are tested again: they cost no query.
        """
        model, fresh = self.model(), 0
        while True:
            learned_from = 0
            for context in self._failing(model, self.contexts):
                learned_from += self._learn_from(model, context)
                if learned_from == _FAILURES_PER_SWEEP:
                    break
            if learned_from:
                self.sweep()
                model, fresh = self.model(), 0
            elif fresh == checks:
                model.checked = checks
                model.failed = len(self._failing(model, self.contexts[-checks:]))
                return model
            else:
                count = min(max(fresh, _FIRST_CHECKS), checks - fresh)
                self.contexts += self._fresh(model, count)
                fresh += count

    def _fresh(self, model: LearnedModel, count: int) -> list[Tokens]:
        """Draw contexts of random lengths, in turn of uniform tokens and sampled from the model."""
        sampled = model.sample(count, seed=self.random)
        uniform = self.random.integers(self.answers.vocab_size, size=sampled.shape)
        lengths = self.random.integers(self.length, size=count)
        return [
            tuple((sampled if index % 2 else uniform)[index, :length].tolist())
            for index, length in enumerate(lengths)
        ]

    def _failing(self, model: LearnedModel, contexts: Sequence[Tokens]) -> list[Tokens]:
        """Return the contexts whose logits are not predicted, the worst first.

        At each step of a prediction the coefficients multiply rows that are right up to tolerance:
        independent errors of that size add up to the root of the sum of squares.
        """
        self.stage = f"{len(contexts)} contexts to test the model on"
        truth = self.answers.of(contexts, [()])[:, 0]
        excess = np.zeros(len(contexts))
        for indices, tokens in by_length(contexts):
            squares = np.ones(len(tokens))
            for step, states, numbers in model.prefixes(tokens):
                if step == tokens.shape[1]:
                    predicted = model.logits(step, states)[numbers]
                else:
                    squares += np.square(states).sum(1)[numbers]
            error = np.abs(predicted - truth[indices]).max(1)
            excess[indices] = error / (self.tolerance * np.sqrt(squares))
        return [contexts[index] for index in (-excess).argsort() if excess[index] > 1]

    def _learn_from(self, model: LearnedModel, context: Tokens) -> bool:
        """Add a history or a future that a failed context needs; return True if there was one."""
        return self._add_history(model, context) or self._add_future(model, context)

    def _add_history(self, model: LearnedModel, context: Tokens) -> bool:
        """Add the shortest prefix that its basis does not give within tolerance and bound."""
        for t in range(1, len(context) + 1):
            basis, prefix = model.bases[t], context[:t]
            self.stage = f"the logits of a history of length {t}"
            row = self.answers.rows([prefix], basis.futures)[0]
            coefficients = row @ basis.inverse
            is_outside = np.abs(row - coefficients @ basis.rows).max() > self.tolerance
            is_beyond = np.abs(coefficients).max(initial=0.0) > self.bound
            if (is_outside or is_beyond) and prefix not in self.extras[t]:
                self.extras[t] += (prefix,)
                return True
        return False

    def _add_future(self, model: LearnedModel, context: Tokens) -> bool:
        """Add the rest of the context where the prediction jumps most and it helps."""
        if not model.bases[0].histories:
            return self._add_if_needed(0, context, self.answers.of([()], [context]))
        prefixes = model.prefixes(np.array([context], dtype=np.int64))
        states = [prefix.states[0] for prefix in prefixes]
        jumps = []
        for t, token in enumerate(context):
            basis, following, rest = model.bases[t], model.bases[t + 1], context[t + 1 :]
            self.stage = f"a future of {len(basis.histories)} histories of length {t}"
            extended = self.answers.of(basis.histories, [(token, *rest)])[:, 0]
            shorter = self.answers.of(following.histories, [rest])[:, 0]
            jump = np.abs(states[t] @ extended - states[t + 1] @ shorter).max()
            jumps.append((jump, t + 1, rest, extended - basis.transitions[token] @ shorter))
        jumps.sort(key=lambda entry: -entry[0])
        return any(self._add_if_needed(t, rest, errors) for _, t, rest, errors in jumps)

    def _add_if_needed(self, t: int, future: Tokens, errors: Floats) -> bool:
        """Add a future if its rows have errors above tolerance, or if it tells histories apart."""
        if np.abs(errors).max(initial=0.0) <= self.tolerance or future in self.futures[t]:
            return self._admit(t, self.histories[t], [future])
        self.futures[t] += (future,)
        return True
