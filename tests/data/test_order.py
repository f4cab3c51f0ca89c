"""The order of a run: an epoch is every token once, and a resumed run continues exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from letters import (
    IGNORED,
    TEXTS,
    assert_equal,
    in_order,
    laid_out,
    make_tokenizer,
    one_epoch,
    options_of,
    tokens_of,
)
from safetensors.torch import load, save
from transformers import PreTrainedTokenizerFast

from fastperturb.data import training_data


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_is_every_token_once_in_an_order_of_its_own(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    options = options_of(jsonl, block_size=3, streaming=streaming, shuffle_buffer=5)
    data, same, other = (training_data(options, tokenizer, seed=seed) for seed in (0, 0, 1))
    first, second = one_epoch(data), one_epoch(data)
    everything = laid_out(TEXTS)
    for blocks in (first, second):
        assert tokens_of(blocks)[: len(everything)] == everything
        assert sum(np.sum(block.labels != IGNORED) for block in blocks) > 0
    assert_equal(in_order(first), in_order(second))
    orders = [[int(block.rows[0]) for block in blocks] for blocks in (first, second)]
    assert orders[0] != orders[1]
    assert orders[0] == [int(block.rows[0]) for block in one_epoch(same)]
    assert orders[0] != [int(block.rows[0]) for block in one_epoch(other)]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_last_batch_of_an_epoch_may_be_short_and_is_never_empty(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    data = training_data(options_of(jsonl, streaming=streaming), tokenizer, seed=0)
    total = -(-len(laid_out(TEXTS)) // 4)
    assert data.blocks_per_epoch == (None if streaming else total)
    for epoch, count in ((0, total), (1, total - 1), (2, total + 1)):
        sizes = []
        while data.epoch == epoch:
            sizes.append(len(data.next_blocks(count)))
        assert sizes == [min(total, count)] + [1] * (total > count)


def test_a_streamed_block_is_one_of_the_next_shuffle_buffer_blocks(
    jsonl: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = options_of(jsonl, streaming=True, shuffle_buffer=3, packing="stream")
    numbers = [int(block.rows[0]) for block in one_epoch(training_data(options, tokenizer, seed=0))]
    assert all(number < index + 3 for index, number in enumerate(numbers))
    unshuffled = dataclasses.replace(options, shuffle_buffer=1)
    blocks = one_epoch(training_data(unshuffled, tokenizer, seed=0))
    assert_equal(blocks, in_order(blocks))


def test_a_run_continues_exactly_from_every_position(
    jsonl: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, small_reads: None
) -> None:
    (tmp_path / "more").mkdir()
    for name, text in (("a.txt", "a b c d e"), ("b.txt", "f g h"), ("c.txt", "i j k l")):
        (tmp_path / "more" / name).write_text(text)
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": TEXTS[:3]}).save_to_disk(saved)
    sources = (jsonl, str(tmp_path / "more"), str(saved))
    for streaming in (False, True):
        options = options_of(*sources, streaming=streaming, shuffle_buffer=4)
        whole = training_data(options, tokenizer, seed=0)
        states, blocks = [], []
        while whole.epoch < 2:
            states.append(frozen(whole.state()))
            blocks += whole.next_blocks(1)
        assert len(blocks) > 2 * 12
        for position, (values, tensors) in enumerate(states):
            resumed = training_data(options, tokenizer, seed=0)
            resumed.restore(json.loads(values), load(tensors))
            assert frozen(resumed.state()) == (values, tensors)
            # One block, and a second resume from there: a state of a resumed run holds too.
            rest = resumed.next_blocks(1)
            again = training_data(options, tokenizer, seed=0)
            values, tensors = frozen(resumed.state())
            again.restore(json.loads(values), load(tensors))
            while len(rest) < len(blocks) - position:
                rest += again.next_blocks(1)
            assert_equal(rest, blocks[position:])


def frozen(state: tuple[dict[str, int | str], dict[str, torch.Tensor]]) -> tuple[str, bytes]:
    """A state as a checkpoint keeps it."""
    return json.dumps(state[0]), save(state[1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"block_size": 5}, "its block_size was 4 and is now 5"),
        ({"packing": "stream"}, "its packing was 'documents' and is now 'stream'"),
        ({"max_tokens": 9}, "tokens was"),
        ({"seed": 1}, "its seed was 0 and is now 1"),
        ({"template": "^ $A"}, "its tokenizer was"),
        ({"text": "a b c d e"}, "is of other data: its d"),
    ],
)
def test_restoring_a_state_of_other_data_raises(
    jsonl: str, streaming: bool, change: dict[str, Any], complaint: str
) -> None:
    options = options_of(jsonl, streaming=streaming)
    state = training_data(options, make_tokenizer(), seed=0).state()
    if "text" in change:
        with open(jsonl, "a") as file:
            file.write(json.dumps(change))
    tokenizer = make_tokenizer(template=change.get("template"))
    others = {name: value for name, value in change.items() if hasattr(options, name)}
    options = dataclasses.replace(options, **others)
    other = training_data(options, tokenizer, seed=change.get("seed", 0))
    with pytest.raises(ValueError, match=complaint):
        other.restore(*state)
