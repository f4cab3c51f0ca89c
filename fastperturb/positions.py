"""Where tokens stand: under padding, in packed documents, and what that means for the noise."""

from __future__ import annotations

import torch
from torch import Tensor


def without_mask(
    attention_mask: Tensor | None, position_ids: Tensor | None, marginal: str
) -> Tensor | None:
    """The attention_mask, or None where packed documents are kept apart by position_ids alone."""
    if position_ids is None or (attention_mask is None and marginal == "token"):
        return attention_mask
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    real = real.bool()
    begins = real[:, 1:] & real[:, :-1] & (position_ids.diff(dim=1) != 1)
    if not begins.any():
        return attention_mask
    if marginal == "sequence":
        raise ValueError(
            "the sequence marginal is of one document a row, and position_ids pack several: unpack "
            "them, or use marginal='token'"
        )
    if not real.all():
        raise ValueError(
            "packed position_ids take no attention_mask, under which models let documents see each "
            "other: leave it out, with padding as a document of its own"
        )
    return None


def own_positions(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Where each token stands in its document, as `generate` counts: from the first real one."""
    if position_ids is not None or attention_mask is None:
        return position_ids
    return (attention_mask.bool().cumsum(1) - 1).clamp_min(0)


def moving_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, perturb_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which positions move, and the positions that key their noise: padding does neither."""
    if attention_mask is None:
        return perturb_mask, position_ids
    real = attention_mask.bool()
    moving = real if perturb_mask is None else perturb_mask & real
    return moving, own_positions(attention_mask, position_ids)
