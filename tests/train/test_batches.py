"""Batches: their shares over processes and their micro-batches."""

import dataclasses

import pytest
import tiny_run
import torch
from tiny_run import loop_of

from fastperturb.train import distributed
from fastperturb.train.batches import label_count, micro_batches

pytestmark = pytest.mark.usefixtures("own_cache")


def labels_of(parts):
    return [row for part in parts for row in part["labels"]]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_the_shares_of_all_processes_hold_every_label_once_in_parts_of_one_count(
    micro_batch_size, folder, tmp_path
):
    options = tiny_run.options(folder, output_dir=tmp_path, micro_batch_size=micro_batch_size)
    blocks = loop_of(options).data.next_blocks(3)  # over two processes: one share is short
    alone = distributed.start(device="cpu")
    shares = [
        micro_batches(blocks, options, dataclasses.replace(alone, dp_rank=rank, dp_size=2))
        for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1])
    *rows, filler = [row for share in shares for row in labels_of(share)]
    assert torch.equal(torch.stack(rows), torch.tensor([block.labels.tolist() for block in blocks]))
    assert (filler == -100).all()
    assert label_count(blocks) == sum(int((row[1:] != -100).sum()) for row in rows)
