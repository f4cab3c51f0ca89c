"""Baselines of every arm: token frequencies, no noise, the truth, and the exact likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.synthetic.arms import EXACT
from fastperturb.demo import language, training
from fastperturb.demo.training import Data, Setting

# Fresh pairs that are counted where there is no training set.
COUNTED = 120_000
_GOLDEN = (math.sqrt(5) - 1) / 2


def baselines(seed: int, setting: Setting) -> dict[str, Any]:
    """Return, by region, the truth's entropy and the KL of the training targets' unigram to it.

    Where the trunk is held at the truth: also its KL without noise, and the most likely noise.
    """
    data = training.make_data(seed, setting)
    truths = training.true_distributions(data, setting)
    log_unigram = counted_targets(data, setting)
    by_baseline: dict[str, Any] = {
        "entropy": {name: training.mean_entropy(truth) for name, truth in truths.items()},
        "unigram": {
            name: training.divergence(truth, log_unigram).mean().item()
            for name, truth in truths.items()
        },
    }
    if setting.contextual:
        by_baseline["blind"] = {
            name: training.divergence(truth, blind(data.regions[name], setting)).mean().item()
            for name, truth in truths.items()
        }
    if setting.true_trunk:
        trunk = training.TrueResponse(data.world.axes)
        without_noise = training.Model(data.world.embeddings, EXACT, trunk)
        by_baseline["exact"] = {
            name: training.distance(without_noise, data.regions[name], truth)
            for name, truth in truths.items()
        }
        by_baseline["most_likely_sd"] = most_likely_sd(data)
    return by_baseline


def blind(prefixes: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the best log-probs [N, V] of a model that cannot tell the first token's half."""
    half = language.SIDE // 2
    column = prefixes[:, 0] % language.SIDE
    other = prefixes.clone()
    other[:, 0] += (column + half) % language.SIDE - column
    both = (training.true_distribution(tokens, setting) for tokens in (prefixes, other))
    return (sum(both) / 2).log()


def counted_targets(data: Data, setting: Setting) -> torch.Tensor:
    """Return the log frequencies of the targets, with one added to each count: [V]."""
    targets = data.targets
    if targets is None:
        targets = training.draw_pairs(COUNTED, setting, data.generator)[1]
    counts = targets.bincount(minlength=language.VOCAB).double() + 1
    return (counts / counts.sum()).log()


def most_likely_sd(data: Data) -> float | None:
    """Return the noise scale under which the training pairs are most likely, to 1e-4.

    It is what a held trunk with unlimited samples would learn: its error is due to the pairs alone.
    None where pairs are fresh every step.
    """
    if data.prefixes is None or data.targets is None:
        return None
    midpoint, target = (data.prefixes // language.SIDE).sum(1), data.targets // language.SIDE
    counts = torch.zeros(2 * language.SIDE - 1, language.SIDE, dtype=torch.float64)
    counts.index_put_((midpoint, target), torch.ones(len(target)).double(), accumulate=True)

    def loss(sd: float) -> float:
        noisy, _ = language.truth_tables(sd)
        return -torch.xlogy(counts, noisy).sum().item()

    low, high = 0.0, 1.0
    while high - low > 1e-4:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2
