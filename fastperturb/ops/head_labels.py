"""The tokens that a head works on: those with labels, where it knows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """The targets of a call, and which tokens are worked on.

    Ignored tokens are left out. A GPU would have to wait for their number: if it has not been told
    which have labels, ignored ones are computed like the others and set to 0 in the end.
    """

    target: Tensor  # of the tokens worked on
    tokens: int  # in all
    chosen: Tensor | None  # the numbers of the tokens worked on, if not all
    ignored: Tensor | None  # [N], where results are to become 0

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, labelled: Tensor | None) -> Labels:
        target = target.contiguous()
        tokens = target.shape[0]
        if labelled is None and target.device.type == "cpu":
            labelled = (target != ignore_index).nonzero()[:, 0]
        if labelled is None:
            return cls(target, tokens, None, target == ignore_index)
        if labelled.shape[0] == tokens:
            return cls(target, tokens, None, None)
        return cls(target.index_select(0, labelled), tokens, labelled, None)

    def select(self, values: Tensor, *, dim: int) -> Tensor:
        """Return the values of the tokens worked on, which lie in dimension `dim`."""
        return values if self.chosen is None else values.index_select(dim, self.chosen)

    def row_weights(self, row_weights: Tensor | None, like: Tensor) -> Tensor:
        """Return each sample's weights of the tokens worked on, [M, n]; 1 by default."""
        if row_weights is None:
            return like.new_ones(like.shape[0], len(self.target))
        return self.select(row_weights.to(like), dim=1)

    def scatter(self, values: Tensor, *, dim: int) -> Tensor:
        """Undo `select`: return values for all tokens, 0 for ignored ones."""
        if self.chosen is not None:
            shape = *values.shape[:dim], self.tokens, *values.shape[dim + 1 :]
            return values.new_zeros(shape).index_copy_(dim, self.chosen, values)
        if self.ignored is not None:
            values.masked_fill_(self.ignored.view(-1, *[1] * (values.ndim - dim - 1)), 0)
        return values

    def mask_gradient(
        self, upstream: Tensor, lse: Tensor, valid_vocab: int
    ) -> tuple[Tensor, Tensor]:
        """Return upstream gradients [n] and lse [2, .., n] that give ignored rows no gradient.

        Their upstream is 0 and their lse infinite, so that every probability is 0 whatever the
        logits are. A target out of range gets an upstream of NaN, so that its row shows.
        """
        in_range = (self.target >= 0) & (self.target < valid_vocab)
        upstream = upstream.where(in_range, torch.nan).contiguous()
        if self.ignored is None:
            return upstream, lse
        return upstream.masked_fill_(self.ignored, 0.0), lse.masked_fill(self.ignored, torch.inf)
