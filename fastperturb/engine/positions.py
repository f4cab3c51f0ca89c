"""Where tokens stand: under padding, in packed documents, and what that means for the noise."""

from __future__ import annotations

import torch
from torch import Tensor

_ONE_A_ROW = (
    "the sequence marginal is of one document a row, and {} several: give each a row of its own, "
    "or use marginal='token'"
)


def document_starts(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Which real tokens are the first of a document in their row: bool [B, T].

    The first of a row; one whose position is no higher than the last real token's; and one that
    does not go on from a real neighbour, as where a document was cut off from its beginning.
    """
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    real = real.bool()
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = index.where(real, -1).cummax(1).values.roll(1, 1)
    last[:, 0] = -1  # the real token before, if there is one
    step = position_ids - position_ids.gather(1, last.clamp_min(0))
    goes_on = (step == 1) | ((step > 1) & (last < index - 1))
    return real & ((last < 0) | ~goes_on)


def documents_apart(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    rows: Tensor | None,
    marginal: str,
) -> Tensor | None:
    """The attention_mask; None where packed documents are kept apart by position_ids alone."""
    if marginal == "sequence" and rows is not None and rows.ndim == 2:
        raise ValueError(_ONE_A_ROW.format("rows [B, T] number"))
    if position_ids is None or (attention_mask is None and marginal == "token"):
        return attention_mask
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    packed = (document_starts(position_ids, real).sum(1) > 1).any()
    is_packed, is_whole = torch.stack([packed, real.bool().all()]).tolist()  # one wait for a GPU
    if is_packed and marginal == "sequence":
        raise ValueError(_ONE_A_ROW.format("position_ids pack"))
    if is_packed and not is_whole:
        raise ValueError(
            "packed position_ids take no attention_mask, under which models let documents see each "
            "other: leave it out, with padding as a document of its own"
        )
    return None if is_packed else attention_mask


def own_positions(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Where each token stands in its document, as `generate` counts: from the first real one."""
    if position_ids is not None or attention_mask is None:
        return position_ids
    return real_positions(attention_mask)


def real_positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.bool().cumsum(1) - 1).clamp_min(0)


def moving_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, perturb_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which positions move, not padding; and where they stand, for the model and for the noise."""
    if attention_mask is None:
        return perturb_mask, position_ids
    real = attention_mask.bool()
    moving = real if perturb_mask is None else perturb_mask & real
    return moving, own_positions(attention_mask, position_ids)
