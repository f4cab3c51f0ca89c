"""The tokens with labels, which alone the head works on."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.engine.host_copy import HostCopy, true_first

# To leave out no more than this share of the tokens does not pay for the copies of the others.
_TOO_FEW = 1 / 64


class LabelledTokens:
    """The numbers of a batch's tokens with labels, found while the trunk runs.

    The device starts at once. The head waits for their count, once a batch: all chunks,
    recomputations and estimators share it.
    """

    def __init__(self, has_label: Tensor) -> None:  # [N] bool
        self._tokens = len(has_label)
        self._order = true_first(has_label)
        self._count = HostCopy(has_label.sum()[None])
        self._numbers: Tensor | None = None

    def numbers(self) -> Tensor | None:
        """Return the numbers [n] in rising order; None if nearly all tokens have labels."""
        if self._numbers is None:
            (count,) = self._count.read()
            self._numbers = self._order[:count]
        spared = self._tokens - len(self._numbers)
        return self._numbers if spared > _TOO_FEW * self._tokens else None

    def rows(self, samples: int) -> Tensor | None:
        """Return the numbers [m n] of the labelled rows [m N] of all samples."""
        numbers = self.numbers()
        if numbers is None or samples == 1:
            return numbers
        first = torch.arange(0, samples * self._tokens, self._tokens, device=numbers.device)
        return (first[:, None] + numbers).flatten()
