"""What stands beside every arm: one word's statistics, no noise, the truth, and the likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.synthetic.arms import EXACT
from fastperturb.demo import language, training
from fastperturb.demo.training import Data, Setting

# Streaming has no training set to count: as many fresh pairs stand for it.
COUNTED = 120_000
_GOLDEN = (math.sqrt(5) - 1) / 2


def baselines(seed: int, setting: Setting) -> dict[str, Any]:
    """KL to the truth by region of the training targets' unigram, and the truth's own entropy.

    Where the trunk is held: also its KL without noise, and the likelihood's choice of sd.
    """
    data = training.make_data(seed, setting)
    laws = {name: language.truth(chosen, setting.noise_sd) for name, chosen in data.regions.items()}
    log_unigram = counted_targets(data, setting)
    found: dict[str, Any] = {
        "entropy": {
            name: -torch.xlogy(law, law).sum(1).mean().item() for name, law in laws.items()
        },
        "unigram": {
            name: training.divergence(law, log_unigram).mean().item() for name, law in laws.items()
        },
    }
    if setting.true_trunk:
        trunk = training.TrueResponse(data.world.axes)
        still = training.Model(data.world.embeddings, EXACT, trunk)
        found["exact"] = {
            name: training.distance(still, data.regions[name], law) for name, law in laws.items()
        }
        found["most_likely_sd"] = most_likely_sd(data)
    return found


def counted_targets(data: Data, setting: Setting) -> torch.Tensor:
    """log of the targets' frequencies, each word counted once more than it occurs: [V]."""
    targets = data.targets
    if targets is None:
        targets = training.draw_pairs(COUNTED, setting.noise_sd, data.generator)[1]
    counts = targets.bincount(minlength=language.VOCAB).double() + 1
    return (counts / counts.sum()).log()


def most_likely_sd(data: Data) -> float | None:
    """The sd of noise whose exact likelihood of the training pairs is largest, to 1e-4.

    What a held trunk with endless draws would learn; its distance from the truth is that of the
    sample. None where pairs are fresh every step.
    """
    if data.prefixes is None or data.targets is None:
        return None
    midpoint, outcome = (data.prefixes // language.SIDE).sum(1), data.targets // language.SIDE
    counts = torch.zeros(2 * language.SIDE - 1, language.SIDE, dtype=torch.float64)
    counts.index_put_((midpoint, outcome), torch.ones(len(outcome)).double(), accumulate=True)

    def loss(sd: float) -> float:
        noisy, _ = language.truth_tables(sd)
        return -torch.xlogy(counts, noisy).sum().item()

    low, high = 0.0, 1.0
    while high - low > 1e-4:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2
