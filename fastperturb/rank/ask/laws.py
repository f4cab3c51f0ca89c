"""Laws of the next token along continuations of a history: drawn, told, and how far apart."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.rank.ask.oracle import LogitOracle, Tokens
from fastperturb.rank.measure.spectrum import Floats
from fastperturb.rank.texts import with_prefixes


def drawn(
    oracle: LogitOracle, history: Tokens, steps: int, count: int, generator: torch.Generator
) -> Tensor:
    """Continuations of a history, sampled from the oracle [C, K]."""
    written: list[Tokens] = [()] * count
    for _ in range(steps):
        different = list(dict.fromkeys(written))
        law = oracle.log_probs([history], different)[0].cpu()
        rows = law[[different.index(each) for each in written]].exp()
        tokens = torch.multinomial(rows, 1, generator=generator)[:, 0].tolist()
        written = [(*each, token) for each, token in zip(written, tokens)]
    return torch.tensor(written)


def told(oracle: LogitOracle, history: Tokens, tokens: Tensor) -> Tensor:
    """The log-law before each token of continuations [C, K] of one history [C, K, V]."""
    rows = [tuple(row) for row in tokens.tolist()]
    futures = with_prefixes([row[:-1] for row in rows])
    law = oracle.log_probs([history], futures)[0].cpu()
    number = {future: index for index, future in enumerate(futures)}
    return law[torch.tensor([[number[row[:step]] for step in range(len(row))] for row in rows])]


def divergence(truth: Tensor, law: Tensor) -> Floats:
    """KL in nats of laws [C, K, V], the mean over continuations [K]."""
    truth, law = truth.double(), law.double()
    found: Floats = (truth.exp() * (truth - law)).sum(-1).mean(0).numpy()
    return found
