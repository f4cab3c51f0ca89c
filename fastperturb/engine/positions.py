"""Positions of tokens: under padding, in packed documents, and as they key the noise."""

from __future__ import annotations

import torch
from torch import Tensor

_ONE_DOCUMENT_A_ROW = (
    "the sequence marginal is of one document a row, and {} several: give each a row of its own, "
    "or use marginal='token'"
)


def document_starts(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return which real tokens are the first of a document in their row: bool [B, T].

    A document starts at the first real token of a row; at a token whose position is no higher than
    the last real token's; and at one that does not go on from a real neighbour, as where a document
    was cut off from its beginning.
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
    """Return the attention_mask, or None where position_ids alone keep packed documents apart."""
    if marginal == "sequence" and rows is not None and rows.ndim == 2:
        raise ValueError(_ONE_DOCUMENT_A_ROW.format("rows [B, T] number"))
    if position_ids is None or (attention_mask is None and marginal == "token"):
        return attention_mask
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    packed = (document_starts(position_ids, real).sum(1) > 1).any()
    is_packed, is_whole = torch.stack([packed, real.bool().all()]).tolist()  # one wait for a GPU
    if is_packed and marginal == "sequence":
        raise ValueError(_ONE_DOCUMENT_A_ROW.format("position_ids pack"))
    if is_packed and not is_whole:
        raise ValueError(
            "packed position_ids take no attention_mask, under which models let documents see each "
            "other: leave it out, with padding as a document of its own"
        )
    return None if is_packed else attention_mask


def own_positions(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Return each token's position in its document; by default it counts real tokens."""
    if position_ids is not None or attention_mask is None:
        return position_ids
    return real_positions(attention_mask)


def real_positions(attention_mask: Tensor) -> Tensor:
    """Count real tokens from the first one of each row, as `generate` does: [B, T]."""
    return (attention_mask.bool().cumsum(1) - 1).clamp_min(0)


def perturbed_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, perturb_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return which positions are perturbed, never padding, and each position's number."""
    if attention_mask is None:
        return perturb_mask, position_ids
    real = attention_mask.bool()
    perturbed = real if perturb_mask is None else perturb_mask & real
    return perturbed, own_positions(attention_mask, position_ids)
