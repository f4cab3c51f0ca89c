"""Sums of positions' log weights, for the labels that depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.engine.batch import Batch
from fastperturb.engine.positions import document_starts
from fastperturb.transforms import linear_scan


def of_labels(batch: Batch, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return what to add to log-probs [m, B, T-1], from each position's log weight [m, B, T].

    A label gets the weights of its document up to the position before it. Under the sequence
    marginal the whole row's weight is on its first label, since a row's log-probs are summed.

    starts: bool [B, T], where a sum begins anew; default where documents start.
    """
    starts = first_positions(batch) if starts is None else starts
    running = running_sums(weights, starts)[..., :-1]  # label t + 1 depends on positions up to t
    if batch.marginal == "token" or not running.shape[-1]:
        return running
    labelled = batch.token_mask()
    count = labelled.cumsum(1)
    is_first = labelled & (count == 1)
    is_last = labelled & (count == count[:, -1:])
    return is_first * (running * is_last).sum(-1, keepdim=True)


def first_positions(batch: Batch) -> Tensor:
    """Return where documents start, bool [B, T]; the first position always does."""
    if batch.attention_mask is None and batch.positions is not None:
        starts = document_starts(batch.positions)
    else:
        shape = batch.embeddings.shape[:2]
        starts = torch.zeros(shape, dtype=torch.bool, device=batch.embeddings.device)
    starts[:, 0] = True
    return starts


def running_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Return sums [m, B, T] of values from the last start on, in an order that is fixed."""
    # CUDA's cumsum of floats, and the gradient of a gather, have none.
    kept = (~starts).to(torch.float64).expand_as(values)[..., None]
    return linear_scan(kept, values.double()[..., None])[..., 0].to(values.dtype)
