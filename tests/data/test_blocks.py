"""From text to blocks: streamed, tokenised first, for training and for evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from letters import EOS, TEXTS, assert_equal, in_order, laid_out, one_epoch, options_of, tokens_of
from transformers import PreTrainedTokenizerFast

from fastperturb.data import evaluation_blocks, training_data


def test_streaming_gives_the_blocks_that_tokenising_first_gives(
    jsonl: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, small_reads: None
) -> None:
    (tmp_path / "more.txt").write_text("a b c d e f g h")
    options = options_of(jsonl, str(tmp_path / "more.txt"))
    streamed = dataclasses.replace(options, streaming=True, shuffle_buffer=3)
    assert_equal(
        in_order(one_epoch(training_data(streamed, tokenizer, seed=0))),
        in_order(one_epoch(training_data(options, tokenizer, seed=0))),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_max_tokens_keeps_the_first_tokens_in_every_epoch(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, streaming: bool, small_reads: None
) -> None:
    data = training_data(options_of(jsonl, max_tokens=10, streaming=streaming), tokenizer, seed=0)
    for _ in range(2):
        assert tokens_of(one_epoch(data)) == [*laid_out(TEXTS)[:10], EOS, EOS]


def test_evaluation_blocks_hold_all_tokens_in_order_despite_max_tokens_and_streaming(
    jsonl: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = options_of("elsewhere.txt", max_tokens=4, streaming=True)
    blocks = list(evaluation_blocks([jsonl, jsonl], options, tokenizer))
    assert_equal(blocks, in_order(blocks))
    everything = laid_out(TEXTS * 2)
    assert tokens_of(blocks)[: len(everything)] == everything
