"""The state of decoding: token sequences and the numbers that key their noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sequences(NamedTuple):
    """The tokens decoded so far and the keys of their noise, for N = B S sequences."""

    ids: Tensor  # [N, T]
    mask: Tensor  # [N, T], 1 where there is a token
    perturb_mask: Tensor  # [N, T] bool, the perturbed positions
    rows: Tensor  # [N]
    samples: Tensor  # [N, M], the numbers of its samples

    def append(self, tokens: Tensor) -> Sequences:
        """Return the sequences with one more token each."""
        return self._replace(
            ids=torch.cat([self.ids, tokens[:, None]], dim=1),
            mask=F.pad(self.mask, (0, 1), value=1),
            perturb_mask=F.pad(self.perturb_mask, (0, 1), value=True),
        )

    def select(self, kept: Tensor) -> Sequences:
        """Return the sequences where `kept` is set."""
        return Sequences(*(tensor[kept] for tensor in self))


@dataclass
class Encoded:
    """The encoding of all tokens but the last ones, which a step of decoding adds to."""

    cache: Any  # transformers', of all samples' keys and values
    context: Tensor | None = None  # [N, H], the state of a context transform, one for all samples

    @property
    def length(self) -> int:
        """The number of tokens that are encoded."""
        return int(self.cache.get_seq_length())
