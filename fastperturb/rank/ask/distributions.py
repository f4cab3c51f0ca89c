"""Next-token distributions along continuations of a history: sampled, read and compared."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.rank.ask.oracle import LogitOracle
from fastperturb.rank.texts import with_prefixes
from fastperturb.rank.types import Floats, Tokens


def sample_continuations(
    oracle: LogitOracle, history: Tokens, steps: int, count: int, generator: torch.Generator
) -> Tensor:
    """Sample `count` continuations of a history, `steps` tokens each [C, K]."""
    continuations: list[Tokens] = [()] * count
    for _ in range(steps):
        distinct = list(dict.fromkeys(continuations))
        log_probs = oracle.log_probs([history], distinct)[0].cpu()
        rows = log_probs[[distinct.index(tokens) for tokens in continuations]].exp()
        sampled = torch.multinomial(rows, 1, generator=generator)[:, 0].tolist()
        continuations = [(*tokens, token) for tokens, token in zip(continuations, sampled)]
    return torch.tensor(continuations)


def distributions_along(oracle: LogitOracle, history: Tokens, tokens: Tensor) -> Tensor:
    """Return log-probs before each token of continuations [C, K] of one history [C, K, V]."""
    rows = [tuple(row) for row in tokens.tolist()]
    futures = with_prefixes([row[:-1] for row in rows])
    log_probs = oracle.log_probs([history], futures)[0].cpu()
    number = {future: index for index, future in enumerate(futures)}
    index = [[number[row[:step]] for step in range(len(row))] for row in rows]
    return log_probs[torch.tensor(index)]


def mean_kl(truth: Tensor, log_probs: Tensor) -> Floats:
    """Return KL(truth || log_probs) in nats, both [C, K, V], averaged over continuations [K]."""
    truth, log_probs = truth.double(), log_probs.double()
    kl: Floats = (truth.exp() * (truth - log_probs)).sum(-1).mean(0).numpy()
    return kl
