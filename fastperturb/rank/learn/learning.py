"""Learning a model of low logit rank by asking for its logits.

Our reconstruction of a published algorithm (arXiv 2512.09892); which steps it takes in which order
is ours. L_t[h, (f, z)] is the centred log-prob of z after h f, of histories h of length t and
futures f. For every t we look for histories H_t whose rows give all rows of L_t as combinations of
small coefficients, and futures F_t that suffice to find those.

Histories grow by closure. H_0 is the empty one. If H_t spans all rows of length t, its extensions
by every token span all of length t + 1: their pool, and H_{t+1} is a spanner of it
(`spanner.spanner`). Futures grow by the elliptical-potential rule (`spanner.admitted`): those that
could tell apart what the present ones cannot. Candidates are z f' of f' in F_{t+1}, whose answers
on H_t are the pool's, and to begin with a few random ones, some as long as can be: a parity shows
in no shorter one.

That both are closed does not prove them complete, so the model is tested on fresh contexts, half
of uniform tokens and half of its own. What fails is learned from. Let v_t be the state after t of
the context's tokens, z the next and g the rest: v_t L[H_t z, g] is what the rows of length t + 1
make of the context, right at t = 0 and wrong at the end. Where it jumps, there is a row of the
pool that H_{t+1} gives on F_{t+1} but not on g, so g joins F_{t+1}. Unless a beginning of the
context is itself a row that H_t does not give, or not by coefficients within the bound: then that
beginning joins the pool. Either way a rank, a volume or a potential grows, so this ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastperturb.rank.ask.oracle import LogitOracle, QueryBudgetSpent, Tokens
from fastperturb.rank.learn.answers import Answers
from fastperturb.rank.learn.learned import LearnedModel
from fastperturb.rank.learn.spanner import admitted, spanner
from fastperturb.rank.learn.states import Floats, by_length

# Rows of the pool that random futures are tried on, beside those of the basis.
_TRIED = 4
# Failures that are learned from before the bases are closed again.
_AT_ONCE = 4
# Contexts that the first test of a model takes; one that is passed is followed by as many again.
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
    """The law of `length` tokens whose logits `oracle` tells, if its logit ranks are low.

    Asks for every extension of every basis history by one token: some length * vocabulary * rank
    contexts, times the futures that a basis needs.

    tolerance: by how much, in logits, a row may miss the span of the others and still count as in
        it: six times or so the error of the oracle's answers, as a combination of several rows
        has the errors of all. Below that, errors count as ranks, of which there is no end.
    bound: on the coefficients by which a history's row is given. A higher one needs fewer swaps
        of histories and lets errors grow faster.
    checks: so many fresh contexts in a row must be predicted before learning ends. If a part q of
        them failed, all would pass with probability (1 - q)^checks: 200 say with 99% confidence
        that less than 2.3% fail. One that fails with nothing in it left to learn is counted in
        the model's `failed`.
    budget: how many contexts may be asked, those of `known` included; None is no limit.
    seed: of everything drawn at random.
    known: a model learned from the same oracle, of which no answer is asked for again; with the
        same seed and options learning goes on from where it was.

    Raises QueryBudgetSpent, whose `learned` is the last model that was known in full.
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
            f"known is of vocab_size {known.vocab_size} and length {known.length}, this is of "
            f"{oracle.vocab_size} and {length}: pass a model learned from the same oracle"
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
        self.contexts: list[Tokens] = []  # that models were tested on
        self.stage = "nothing"
        self._keep()

    def _keep(self) -> None:
        """What is known in full now is what is left when the budget is spent."""
        self._kept = tuple(self.histories), tuple(self.futures)

    def model(self) -> LearnedModel:
        return LearnedModel(self.answers, *self._kept, bound=self.bound)

    # Closure

    def sweep(self, *, explore: bool = False) -> None:
        """Histories and futures grow until both are closed."""
        before: tuple[list[tuple[Tokens, ...]], ...] = ()
        while before != (self.histories, self.futures):
            before = list(self.histories), list(self.futures)
            for t in range(self.length):
                self._grow_histories(t, explore)
            self._keep()
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
        self.histories[t] = tuple(pool[place] for place in chosen)
        if explore:  # nothing longer is there yet, so what was asked is all that a model needs
            self._keep()

    def _pool(self, t: int) -> list[Tokens]:
        """The basis that is there, and what it must span."""
        extended: list[Tokens] = [()]
        if t > 0:
            tokens = range(self.answers.vocab_size)
            extended = [(*history, z) for history in self.histories[t - 1] for z in tokens]
        return list(dict.fromkeys([*self.histories[t], *self.extras[t], *extended]))

    def _try_random_futures(self, t: int, pool: list[Tokens]) -> None:
        """One that is as long as can be and one of any length."""
        longest = self.length - 1 - t
        sizes = longest, int(self.random.integers(1, longest + 1))
        candidates = [
            tuple(self.random.integers(self.answers.vocab_size, size=size).tolist())
            for size in sizes
        ]
        some = self.random.permutation(len(pool))[:_TRIED]
        self._admit(t, [*self.histories[t], *(pool[place] for place in some)], candidates)

    def _grow_futures(self, t: int) -> None:
        tokens = range(self.answers.vocab_size)
        candidates = [(z, *future) for z in tokens for future in self.futures[t + 1]]
        self._admit(t, self.histories[t], candidates)

    def _admit(self, t: int, histories: Sequence[Tokens], candidates: Sequence[Tokens]) -> bool:
        """Candidates join that tell these histories apart as the present futures cannot."""
        new = [future for future in dict.fromkeys(candidates) if future not in self.futures[t]]
        if not histories or not new:
            return False
        self.stage = f"futures of {len(histories)} histories of length {t}"
        seen = self.answers.rows(histories, self.futures[t])
        joined = admitted(seen, self.answers.of(histories, new), tolerance=self.tolerance)
        self.futures[t] += tuple(new[place] for place in joined)
        return bool(joined)

    # Tests

    def tested(self, checks: int) -> LearnedModel:
        """A model that predicts so many fresh contexts, having learned from those it did not.

        Contexts that an earlier model was tested on are tested again: they cost no query.
        """
        model, fresh = self.model(), 0
        while True:
            learned_from = 0
            for context in self._failing(model, self.contexts):
                learned_from += self._learn_from(model, context)
                if learned_from == _AT_ONCE:
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
        """Contexts of random lengths, in turn of uniform tokens and as the model speaks."""
        own = model.sample(count, seed=self.random)
        uniform = self.random.integers(self.answers.vocab_size, size=own.shape)
        lengths = self.random.integers(self.length, size=count)
        return [
            tuple((own if place % 2 else uniform)[place, :length].tolist())
            for place, length in enumerate(lengths)
        ]

    def _failing(self, model: LearnedModel, contexts: Sequence[Tokens]) -> list[Tokens]:
        """Contexts whose logits are not predicted, the worst first.

        A prediction sums, over its steps, rows given up to tolerance, by that step's coefficients:
        independent errors of that size add up to the root of the sum of squares.
        """
        self.stage = f"{len(contexts)} contexts to test the model on"
        asked = self.answers.of(contexts, [()])[:, 0]
        excess = np.zeros(len(contexts))
        for places, tokens in by_length(contexts):
            squares = np.ones(len(tokens))
            for step, states, numbers in model.prefixes(tokens):
                if step == tokens.shape[1]:
                    predicted = model.logits(step, states)[numbers]
                else:
                    squares += np.square(states).sum(1)[numbers]
            error = np.abs(predicted - asked[places]).max(1)
            excess[places] = error / (self.tolerance * np.sqrt(squares))
        return [contexts[place] for place in (-excess).argsort() if excess[place] > 1]

    def _learn_from(self, model: LearnedModel, context: Tokens) -> bool:
        """Something joins that the context's logits need, if there is anything."""
        return self._add_history(model, context) or self._add_future(model, context)

    def _add_history(self, model: LearnedModel, context: Tokens) -> bool:
        """The shortest beginning that its basis does not give within tolerance and bound."""
        for t in range(1, len(context) + 1):
            basis, beginning = model.bases[t], context[:t]
            self.stage = f"the logits of a history of length {t}"
            row = self.answers.rows([beginning], basis.futures)[0]
            coefficients = row @ basis.inverse
            missed = np.abs(row - coefficients @ basis.rows).max() > self.tolerance
            beyond = np.abs(coefficients).max(initial=0.0) > self.bound
            if (missed or beyond) and beginning not in self.extras[t]:
                self.extras[t] += (beginning,)
                return True
        return False

    def _add_future(self, model: LearnedModel, context: Tokens) -> bool:
        """What is left of the context where the prediction jumps most, of what tells anything."""
        if not model.bases[0].histories:
            return self._add_missed(0, context, self.answers.of([()], [context]))
        states = [each.states[0] for each in model.prefixes(np.array([context], dtype=np.int64))]
        jumps = []
        for t, token in enumerate(context):
            basis, following, rest = model.bases[t], model.bases[t + 1], context[t + 1 :]
            self.stage = f"a future of {len(basis.histories)} histories of length {t}"
            extended = self.answers.of(basis.histories, [(token, *rest)])[:, 0]
            given = self.answers.of(following.histories, [rest])[:, 0]
            jump = np.abs(states[t] @ extended - states[t + 1] @ given).max()
            jumps.append((jump, t + 1, rest, extended - basis.transitions[token] @ given))
        jumps.sort(key=lambda each: -each[0])
        return any(self._add_missed(t, rest, missed) for _, t, rest, missed in jumps)

    def _add_missed(self, t: int, future: Tokens, missed: Floats) -> bool:
        """A future joins if rows are missed there, or if it tells histories apart."""
        if np.abs(missed).max(initial=0.0) <= self.tolerance or future in self.futures[t]:
            return self._admit(t, self.histories[t], [future])
        self.futures[t] += (future,)
        return True
