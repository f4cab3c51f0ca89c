"""Marginal perplexity on held-out blocks, while a run trains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from fastperturb import noise
from fastperturb.data import Block
from fastperturb.model import PerturbedLM
from fastperturb.train import distributed, methods
from fastperturb.train.batches import autocast, micro_batches
from fastperturb.train.distributed import World
from fastperturb.train.options import TrainOptions

# In place of the step, which counts from 0, this keys the noise of evaluations.
EVALUATION = -1


@torch.no_grad()
def evaluate(
    lm: PerturbedLM, held_out: Sequence[Block], options: TrainOptions, world: World
) -> dict[str, float]:
    """Return the marginal perplexity of blocks, under noise that every evaluation shares."""
    num_samples = 1 if options.has_one_sample else options.eval_samples
    seed = noise.fold_in(options.seed, EVALUATION)
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    with _eval_mode(lm), methods.at_evaluation(lm, options), autocast(options, world):
        for first in range(0, len(held_out), options.batch_size):
            batch = held_out[first : first + options.batch_size]
            for part in micro_batches(batch, options, world):
                score = lm.score(**part, num_samples=num_samples, seed=seed)
                sums[0] -= score.sum
                sums[1] += score.count
                sums[2] += (score.nll_standard_error * score.count).nan_to_num().square()
                sums[3] += score.ess.sum()
                sums[4] += (score.ess > 0).sum()
    # The first process's numbers: all must agree on which model is best and when to stop.
    sums = distributed.from_main(world, distributed.sum_over_dp(world, sums))
    total, count, squares, ess, ess_count = sums.tolist()
    metrics = {"nll": total / count, "perplexity": perplexity(total / count)}
    if num_samples > 1:
        metrics |= {"nll_standard_error": math.sqrt(squares) / count, "ess": ess / ess_count}
    return metrics


def perplexity(nll: float) -> float:
    """Return exp(nll), finite whatever the nll of a run that diverged."""
    return math.exp(min(nll, 700.0))


@contextlib.contextmanager
def _eval_mode(lm: PerturbedLM) -> Iterator[None]:
    lm.eval()
    try:
        yield
    finally:
        lm.train()
