"""What a model is asked, laid out for its passes, and the answers that these bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastperturb.rank.ask.oracle import Tokens


@dataclass(frozen=True)
class FutureRuns:
    """Futures, as the runs that answer them.

    runs: those with which no other one begins, the longest first.
    ids: the same, padded [R, W].
    table: for each future that is not empty its run, column and length [3, A].
    at_once: the columns of empty ones, which need no run.
    lengths: how many different lengths there are.
    """

    runs: list[Tokens]
    ids: Tensor
    table: Tensor
    at_once: list[int]
    lengths: int

    @classmethod
    def of(cls, futures: Sequence[Tokens], device: torch.device) -> FutureRuns:
        runs: list[Tokens] = []
        owners: dict[Tokens, Tokens] = {}
        # In this order a future comes after all that begin with it, and next to one of them.
        for future in sorted(filter(None, set(futures)), reverse=True):
            if not runs or runs[-1][: len(future)] != future:
                runs.append(future)
            owners[future] = runs[-1]
        runs.sort(key=len, reverse=True)
        number = {run: index for index, run in enumerate(runs)}
        table = [
            (number[owners[future]], column, len(future))
            for column, future in enumerate(futures)
            if future
        ]
        return cls(
            runs,
            torch.tensor([run + (0,) * (len(runs[0]) - len(run)) for run in runs], device=device),
            torch.tensor(table, dtype=torch.int64, device=device).view(-1, 3).T,
            [column for column, future in enumerate(futures) if not future],
            len(set(map(len, futures))),
        )

    def answered(self, run: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What rows with these runs [n] answer: which row, which column, after which position."""
        owner, column, length = self.table
        row, answer = (run[:, None] == owner).nonzero(as_tuple=True)
        return row, column[answer], length[answer] - 1


class Mixture:
    """The law of the next token of each pair, as draws bring in their parts of it."""

    def __init__(
        self, shape: tuple[int, int, int], draws: int, weighted: bool, device: torch.device
    ) -> None:
        self.log_probs = torch.full(shape, -torch.inf, device=device)
        self.weighted = weighted
        self._draws = draws
        self._log_weights = torch.full(shape[:2], -torch.inf, dtype=torch.float64, device=device)

    def add(self, numbers: Tensor, columns: Tensor, logits: Tensor, log_weights: Tensor) -> None:
        """Of some pairs, the logits [m, P, V] of m more draws of weights [m, P]."""
        at = (numbers, columns)
        log_probs = logits.log_softmax(-1)
        if self._draws == 1:
            self.log_probs[at] = log_probs[0]
            return
        before = self._log_weights[at]
        after = torch.logaddexp(before, log_weights.logsumexp(0))
        shares = (log_weights - after).float()
        new = (log_probs + shares[..., None]).logsumexp(0)
        old = self.log_probs[at] + (before - after).float()[:, None]
        self.log_probs[at], self._log_weights[at] = torch.logaddexp(old, new), after
