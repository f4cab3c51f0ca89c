"""The KL from a model to linear combinations of other histories, and to baselines, step by step.

Continuations are sampled from the model after each target. At every step the next-token
distributions are compared, KL(model || predictor): added up over steps and averaged over
continuations, that is the divergence of a whole continuation. The weights of a combination were
fitted to the model's answers on the query futures of the target; after that the target is not read.
The baselines are those of the paper (arXiv 2510.24966):

    empty future    weights fitted on the next token alone; of several ridges the best in hindsight
    last k tokens   the model, given only the end of the target
    unigram         one distribution for all steps, the best in hindsight: their mean
    earlier         an earlier checkpoint of the model, where there is one
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastperturb.rank.ask.distributions import distributions_along, mean_kl, sample_continuations
from fastperturb.rank.ask.oracle import LogitOracle
from fastperturb.rank.combine.streams import follow, write
from fastperturb.rank.combine.weights import RIDGES, Fit, fit, shares_by_length
from fastperturb.rank.measure.matrix import LogitMatrix
from fastperturb.rank.types import Floats, Tokens
from fastperturb.report.bootstrap import Interval, mean_ratio

_MAX_EXAMPLES = 4


@dataclass(frozen=True, eq=False)
class Predictor:
    """A predictor of the next token, and the KL from the model to it, by target and step [T, K]."""

    name: str
    kl: Floats

    def cumulative(self, *, seed: int = 0) -> Interval:
        """Return the KL over all steps, with an interval over targets."""
        return _mean(self.kl.sum(-1), seed)

    def more_than(self, other: Predictor, *, seed: int = 0) -> Interval:
        """Return the KL over all steps less that of another predictor."""
        return _mean((self.kl - other.kl).sum(-1), seed)


class WrittenExample(NamedTuple):
    """A target, and its likeliest tokens by the model and by the first combination."""

    target: Tokens
    model: Tokens
    combination: Tokens


@dataclass(frozen=True, eq=False)
class Comparison:
    """The combinations of each pool of histories, and the baselines.

    asked: the share of judged contexts that were a query future too, at each step [K].
    """

    combinations: list[Predictor]
    baselines: list[Predictor]
    fits: list[Fit]
    written: list[WrittenExample]
    asked: Floats

    def to_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """Return plain data; `more` is the KL over that of the first combination."""
        first = self.combinations[0]
        ways = [
            {
                "name": predictor.name,
                "is_baseline": predictor in self.baselines,
                "kl_by_step": predictor.kl.mean(0).tolist(),
                "cumulative": predictor.cumulative(seed=seed).to_dict(),
                "more": predictor.more_than(first, seed=seed).to_dict(),
            }
            for predictor in (*self.combinations, *self.baselines)
        ]
        fits = [
            {
                "name": predictor.name,
                "histories": fitted.weights.shape[1],
                "ridge": fitted.ridge,
                "error": fitted.error,
                "held_out_error": fitted.held_out_error,
            }
            for predictor, fitted in zip(self.combinations, self.fits)
        ]
        return {
            "targets": len(first.kl),
            "ways": ways,
            "fits": fits,
            "written": [example._asdict() for example in self.written],
            "asked": self.asked.tolist(),
        }


def compare(
    oracle: LogitOracle,
    pools: Mapping[str, LogitMatrix],
    targets: LogitMatrix,
    *,
    steps: int = 15,
    continuations: int = 4,
    earlier: LogitOracle | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare combinations of each pool's histories with the model, and with baselines.

    pools, targets: matrices on the same futures and tokens, the empty future among them.
    continuations: the number of continuations of `steps` tokens, sampled after each target.
    earlier: an earlier checkpoint of the model.
    """
    if () not in targets.futures:
        raise ValueError("futures must have the empty one, on which a baseline is fitted")
    if earlier is not None and earlier.vocab_size != oracle.vocab_size:
        raise ValueError(
            f"earlier has a vocabulary of {earlier.vocab_size} tokens and the model one of "
            f"{oracle.vocab_size}: it is no checkpoint of it"
        )
    combinations = _Combinations.fit_to(pools, targets)
    generator = torch.Generator().manual_seed(seed)
    kl: dict[str, list[Floats]] = {}
    asked, query_futures = np.zeros(steps), set(targets.futures)
    unigram = _Unigram()
    for number, target in enumerate(targets.histories):
        tokens = sample_continuations(oracle, target, steps, continuations, generator)
        truth = distributions_along(oracle, target, tokens)
        asked += _share_known(tokens, query_futures)
        unigram.add(truth)
        for name, log_probs in combinations.along(oracle, number, tokens):
            kl.setdefault(name, []).append(mean_kl(truth, log_probs))
        for kept in truncations(len(target)):
            name = "last token" if kept == 1 else f"last {kept} tokens"
            log_probs = distributions_along(oracle, target[-kept:], tokens)
            kl.setdefault(name, []).append(mean_kl(truth, log_probs))
        if earlier is not None:
            log_probs = distributions_along(earlier, target, tokens)
            kl.setdefault("earlier checkpoint", []).append(mean_kl(truth, log_probs))
    kl["unigram"] = unigram.kl()
    predictors = {name: Predictor(name, np.stack(rows)) for name, rows in kl.items()}
    next_token_alone = [predictors.pop(name) for name in combinations.next_token_fits]
    best = min(next_token_alone, key=lambda predictor: predictor.kl.sum())
    return Comparison(
        [predictors.pop(name) for name in pools],
        [Predictor("empty future", best.kl), *predictors.values()],
        [*combinations.fits.values()],
        combinations.examples(oracle, targets, steps),
        asked / len(targets.histories),
    )


@dataclass(frozen=True)
class _Combinations:
    """Weights of each pool's histories, and of the first pool's fitted on the next token alone."""

    pools: Mapping[str, LogitMatrix]
    fits: dict[str, Fit]
    next_token_fits: dict[str, Fit]

    @classmethod
    def fit_to(cls, pools: Mapping[str, LogitMatrix], targets: LogitMatrix) -> _Combinations:
        shares = shares_by_length(targets.futures)
        fits = {
            name: fit(pool.values, targets.values, shares=shares) for name, pool in pools.items()
        }
        empty = [targets.futures.index(())]
        first = next(iter(pools.values())).values[:, empty]
        next_token_fits = {
            f"empty future, ridge {ridge:g}": fit(first, targets.values[:, empty], ridges=[ridge])
            for ridge in RIDGES
        }
        return cls(pools, fits, next_token_fits)

    def along(
        self, oracle: LogitOracle, target: int, tokens: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each fit's name and its log-probs before each of a target's tokens [C, K, V]."""
        for number, (name, pool) in enumerate(self.pools.items()):
            fits = {name: self.fits[name], **({} if number else self.next_token_fits)}
            weights = np.stack([fitted.weights[target] for fitted in fits.values()])
            yield from zip(fits, follow(oracle, pool.histories, weights, tokens[:, :-1]).cpu())

    def examples(
        self, oracle: LogitOracle, targets: LogitMatrix, steps: int
    ) -> list[WrittenExample]:
        """Write a few targets on, by the model and by the first pool's histories."""
        first, pool = next(iter(self.pools.items()))
        return [
            WrittenExample(
                target,
                write(oracle, [target], np.ones(1), steps),
                write(oracle, pool.histories, weights, steps),
            )
            for target, weights in zip(targets.histories[:_MAX_EXAMPLES], self.fits[first].weights)
        ]


class _Unigram:
    """The mean distribution over all targets, continuations and steps: the best constant one."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []  # of each target, over continuations [K, V]
        self._negative_entropies: list[Tensor] = []  # [K]

    def add(self, truth: Tensor) -> None:
        """Add the model's log-probs [C, K, V] of one target."""
        probabilities = truth.double().exp()
        self._means.append(probabilities.mean(0))
        self._negative_entropies.append((probabilities * truth).sum(-1).mean(0))

    def kl(self) -> list[Floats]:
        """Return the KL from the model to the unigram, of each target [K]."""
        unigram = torch.stack(self._means).mean((0, 1)).log()
        return [
            (negative_entropy - mean @ unigram).numpy()
            for mean, negative_entropy in zip(self._means, self._negative_entropies)
        ]


def truncations(length: int) -> list[int]:
    """Return the numbers of last tokens of a target to try: one, and by quarters of its length."""
    return sorted({1, *(length * quarters // 4 for quarters in (1, 2, 3))} - {0, length})


def _share_known(tokens: Tensor, futures: set[Tokens]) -> Floats:
    """Return the share of continuations [C, K] whose first tokens are a future, by step [K]."""
    rows = [tuple(row) for row in tokens.tolist()]
    steps = range(tokens.shape[1])
    return np.array([np.mean([row[:step] in futures for row in rows]) for step in steps])


def _mean(values: Floats, seed: int) -> Interval:
    return mean_ratio([values], [np.ones(len(values))], seed=seed)
