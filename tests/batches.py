"""Batches of token ids, attention masks and labels that the tests share."""

import torch

IGNORED = -100


def batch(size=3, length=9, *, vocab=97, lowest=3, right=3, left=0, unlabelled=0, seed=1):
    """Return random ids with their mask and labels.

    Row 1 ends in `right` padding tokens, row 2 begins with `left`, and row 0 ignores its first
    `unlabelled` labels.
    """
    torch.manual_seed(seed)
    ids = torch.randint(lowest, vocab, (size, length))
    mask = torch.ones_like(ids)
    if right:
        mask[1, -right:] = 0
    if left:
        mask[2, :left] = 0
    labels = ids.where(mask.bool(), IGNORED)
    labels[0, :unlabelled] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def labelled(inputs):
    """Return the mask [B, T - 1] of the tokens that have a label."""
    return inputs["labels"][:, 1:] != IGNORED


def row_of(inputs, row):
    """Return one row of a batch as a batch."""
    return {name: value[row : row + 1] for name, value in inputs.items()}


def positions_of(mask):
    """Return the position [B, T] of each token of its row, padding not counted."""
    return (mask.cumsum(1) - 1).clamp_min(0)
