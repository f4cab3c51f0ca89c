"""Futures laid out for a model's passes: a future that another one extends needs no pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastperturb.rank.types import Tokens


@dataclass(frozen=True)
class MergedFutures:
    """The futures to run, and the columns of the answer that each of them serves.

    to_run: the futures that no other future extends, the longest first.
    ids: the same, padded on the right [R, W].
    served: for each future that is not empty its row of `ids`, its column and its length [3, A].
    empty_columns: the columns of empty futures, which need no run.
    distinct_lengths: the number of different lengths of the futures.
    """

    to_run: list[Tokens]
    ids: Tensor
    served: Tensor
    empty_columns: list[int]
    distinct_lengths: int

    @classmethod
    def of(cls, futures: Sequence[Tokens], device: torch.device) -> MergedFutures:
        to_run: list[Tokens] = []
        longest_of: dict[Tokens, Tokens] = {}
        # In this order a future comes after all that extend it, and next to one of them.
        for future in sorted(filter(None, set(futures)), reverse=True):
            if not to_run or to_run[-1][: len(future)] != future:
                to_run.append(future)
            longest_of[future] = to_run[-1]
        to_run.sort(key=len, reverse=True)
        row = {future: index for index, future in enumerate(to_run)}
        served = [
            (row[longest_of[future]], column, len(future))
            for column, future in enumerate(futures)
            if future
        ]
        padded = [future + (0,) * (len(to_run[0]) - len(future)) for future in to_run]
        return cls(
            to_run,
            torch.tensor(padded, device=device),
            torch.tensor(served, dtype=torch.int64, device=device).view(-1, 3).T,
            [column for column, future in enumerate(futures) if not future],
            len(set(map(len, futures))),
        )

    def served_by(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a batch of rows of `ids` [n] answers: place in it, column, last position."""
        row, column, length = self.served
        place, future = (rows[:, None] == row).nonzero(as_tuple=True)
        return place, column[future], length[future] - 1
