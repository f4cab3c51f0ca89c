"""Documents as tokens: how they begin and end, and when they are tokenised again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from letters import BOS, EOS, TEXTS, make_tokenizer, options_of, token, tokens_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastperturb.data import documents, evaluation_blocks, training_data


@pytest.mark.parametrize("template", ["^ $A", "^ $A ."])
def test_bos_comes_where_the_tokenizer_puts_it_and_eos_comes_once(
    jsonl: str, template: str
) -> None:
    options = options_of(jsonl)
    blocks = list(evaluation_blocks([jsonl], options, make_tokenizer(template=template)))
    expected = [number for text in TEXTS for number in [BOS, *map(token, text.split()), EOS]]
    assert tokens_of(blocks)[: len(expected)] == expected


def test_a_text_is_tokenised_again_only_when_it_or_the_tokenizer_changed(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    call = documents.DocumentTokenizer.__call__

    def watched(self: documents.DocumentTokenizer, texts: list[str]) -> Any:
        seen.extend(text for text in texts if text in (*TEXTS, "x y z"))
        return call(self, texts)

    monkeypatch.setattr(documents.DocumentTokenizer, "__call__", watched)
    options = options_of(jsonl)
    training_data(options, tokenizer, seed=0)
    assert seen == TEXTS
    training_data(dataclasses.replace(options, block_size=7), tokenizer, seed=1)
    assert seen == TEXTS
    with open(jsonl, "a") as file:
        file.write(json.dumps({"text": "x y z"}) + "\n")
    training_data(options, tokenizer, seed=0)
    assert seen == [*TEXTS, *TEXTS, "x y z"]
    training_data(options, make_tokenizer(template="^ $A"), seed=0)
    assert len(seen) == 3 * len(TEXTS) + 2


def test_a_tokenizer_without_eos_raises(jsonl: str) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="no eos_token, .*: set tokenizer.eos_token"):
        training_data(options_of(jsonl), PreTrainedTokenizerFast(tokenizer_object=backend), seed=0)
