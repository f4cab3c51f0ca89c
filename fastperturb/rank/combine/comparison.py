"""How close a linear combination comes to the model that it stands for, step by step.

Continuations are drawn from the model after each target, and at every step of them the law of the
next token is compared, KL(model || way): added up over steps and averaged over continuations, that
is the divergence of a whole continuation. The combination's weights were fitted to the model's
answers on the query futures of the target, and the target is read no more. Beside it stand other
ways to tell the law, those of the paper (arXiv 2510.24966):

    empty future    weights fitted on the next token alone; of several ridges the best in hindsight
    last k tokens   the model, given only the end of the target
    unigram         one law for all steps, the best in hindsight: their mean
    earlier         an earlier checkpoint of the model, where there is one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastperturb.rank.ask.laws import divergence, drawn, told
from fastperturb.rank.ask.oracle import LogitOracle, Tokens
from fastperturb.rank.combine.combination import RIDGES, Fit, fit, shares_by_length
from fastperturb.rank.combine.streams import follow, write
from fastperturb.rank.measure.matrix import LogitMatrix
from fastperturb.rank.measure.spectrum import Floats
from fastperturb.report.bootstrap import Interval, mean_ratio

_SHOWN = 4  # targets of which is shown what was written


@dataclass(frozen=True, eq=False)
class Way:
    """A way to tell the law of the next token, and its KL [T, K] of each target at each step."""

    name: str
    kl: Floats

    def cumulative(self, *, seed: int = 0) -> Interval:
        """Over all steps; the interval is over targets."""
        return _mean(self.kl.sum(-1), seed)

    def more_than(self, other: Way, *, seed: int = 0) -> Interval:
        """The same of the difference."""
        return _mean((self.kl - other.kl).sum(-1), seed)


class Written(NamedTuple):
    """A target, and its likeliest tokens by the model and by the first combination."""

    target: Tokens
    model: Tokens
    combination: Tokens


@dataclass(frozen=True, eq=False)
class Comparison:
    """The combinations of each pool of histories, and what they are compared with.

    asked: at each step, what share of the contexts that are judged was a query future too [K].
    """

    combinations: list[Way]
    baselines: list[Way]
    fits: list[Fit]
    written: list[Written]
    asked: Floats

    def to_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """`more`: than the first combination."""
        ours = self.combinations[0]
        ways = [
            {
                "name": way.name,
                "is_baseline": way in self.baselines,
                "kl_by_step": way.kl.mean(0).tolist(),
                "cumulative": way.cumulative(seed=seed).to_dict(),
                "more": way.more_than(ours, seed=seed).to_dict(),
            }
            for way in (*self.combinations, *self.baselines)
        ]
        fits = [
            {
                "name": way.name,
                "histories": each.weights.shape[1],
                "ridge": each.ridge,
                "error": each.error,
                "held_out_error": each.held_out_error,
            }
            for way, each in zip(self.combinations, self.fits)
        ]
        written = [each._asdict() for each in self.written]
        return {
            "targets": len(ours.kl),
            "ways": ways,
            "fits": fits,
            "written": written,
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
    """Combinations of each pool's histories, for targets that were asked on the same futures.

    continuations: of `steps` tokens, drawn from the oracle after each target.
    earlier: a checkpoint of the model from before.
    """
    if () not in targets.futures:
        raise ValueError("futures must have the empty one, whose fit is compared with")
    empty = [targets.futures.index(())]
    shares = shares_by_length(targets.futures)
    fits = {name: fit(pool.values, targets.values, shares=shares) for name, pool in pools.items()}
    first = next(iter(pools.values()))
    narrow = {
        f"empty future, ridge {ridge:g}": fit(
            first.values[:, empty], targets.values[:, empty], ridges=[ridge]
        )
        for ridge in RIDGES
    }
    if earlier is not None and earlier.vocab_size != oracle.vocab_size:
        raise ValueError(
            f"earlier has a vocabulary of {earlier.vocab_size} tokens and the model one of "
            f"{oracle.vocab_size}: it is no checkpoint of it"
        )
    generator = torch.Generator().manual_seed(seed)
    kl: dict[str, list[Floats]] = {}
    asked, known = np.zeros(steps), set(targets.futures)
    means, negative_entropies = [], []
    for number, target in enumerate(targets.histories):
        tokens = drawn(oracle, target, steps, continuations, generator)
        truth = told(oracle, target, tokens)
        asked += [
            np.mean([tuple(row[:step]) in known for row in tokens.tolist()])
            for step in range(steps)
        ]
        means.append(truth.double().exp().mean(0))
        negative_entropies.append((truth.double().exp() * truth).sum(-1).mean(0))
        laws: dict[str, Tensor] = {}
        for name, pool in pools.items():
            read = {name: fits[name], **(narrow if pool is first else {})}
            weights = np.stack([each.weights[number] for each in read.values()])
            along = follow(oracle, pool.histories, weights, tokens[:, :-1])
            laws |= zip(read, along.cpu())
        for kept in truncations(len(target)):
            name = "last token" if kept == 1 else f"last {kept} tokens"
            laws[name] = told(oracle, target[-kept:], tokens)
        if earlier is not None:
            laws["earlier checkpoint"] = told(earlier, target, tokens)
        for name, law in laws.items():
            kl.setdefault(name, []).append(divergence(truth, law))
    unigram = torch.stack(means).mean((0, 1)).log()
    kl["unigram"] = [
        (entropy - mean @ unigram).numpy() for mean, entropy in zip(means, negative_entropies)
    ]
    ways = {name: Way(name, np.stack(each)) for name, each in kl.items()}
    best = min((ways.pop(name) for name in narrow), key=lambda way: way.kl.sum())
    written = [
        Written(
            target,
            write(oracle, [target], np.ones(1), steps),
            write(oracle, first.histories, weights, steps),
        )
        for target, weights in zip(targets.histories[:_SHOWN], fits[next(iter(pools))].weights)
    ]
    return Comparison(
        [ways.pop(name) for name in pools],
        [Way("empty future", best.kl), *ways.values()],
        [*fits.values()],
        written,
        asked / len(targets.histories),
    )


def truncations(length: int) -> list[int]:
    """How many last tokens of a target of this length are tried: one, and by quarters."""
    return sorted({1, *(length * quarters // 4 for quarters in (1, 2, 3))} - {0, length})


def _mean(values: Floats, seed: int) -> Interval:
    return mean_ratio([values], [np.ones(len(values))], seed=seed)
