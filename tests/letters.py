"""A tokenizer whose tokens are letters, texts of letters and their blocks, for the data tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastperturb.data import Block, DataOptions, TrainingData

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EOS, BOS, UNKNOWN = 0, 1, 2
IGNORED = -100
TEXTS = ["a b c", "d", "e f g h i", "j k", "l m n o p q r", "s", "t u v", "w x y z"]


def token(letter: str) -> int:
    return 3 + LETTERS.index(letter)


def make_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """Each of the letters a to z, between spaces, is a token."""
    letters = {letter: token(letter) for letter in LETTERS}
    vocabulary = {".": EOS, "^": BOS, "?": UNKNOWN} | letters
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [(".", EOS), ("^", BOS)]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=".", bos_token="^", unk_token="?"
    )


def options_of(*data: str, **changes: Any) -> DataOptions:
    return DataOptions(data=data, **{"block_size": 4, **changes})


def one_epoch(data: TrainingData, count: int = 3) -> list[Block]:
    """The blocks up to the end of the epoch, `count` at a time."""
    blocks, epoch = [], data.epoch
    while data.epoch == epoch:
        blocks += data.next_blocks(count)
    return blocks


def in_order(blocks: list[Block]) -> list[Block]:
    """The blocks in the order of their documents."""
    return sorted(blocks, key=lambda block: int(block.rows[0]))


def assert_equal(blocks: list[Block], expected: list[Block]) -> None:
    assert len(blocks) == len(expected)
    for block, expected_block in zip(blocks, expected):
        for name, value, wanted in zip(Block._fields, block, expected_block):
            assert np.array_equal(value, wanted), (name, value, wanted)


def tokens_of(blocks: list[Block]) -> list[int]:
    """The tokens of blocks, in the order of their documents."""
    return [int(number) for block in in_order(blocks) for number in block.tokens]


def laid_out(texts: list[str]) -> list[int]:
    """The tokens of texts laid end to end, EOS after each."""
    return [number for text in texts for number in [*map(token, text.split()), EOS]]
