"""Packing: documents in blocks, with the labels, positions and rows that a model needs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from letters import EOS, IGNORED, options_of, token
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fastperturb
from fastperturb.data import Block, DataOptions, collate, evaluation_blocks, training_data


def test_documents_that_share_a_block_are_pieces_with_their_own_positions_and_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\nd e f g h i j")
    options = options_of(str(tmp_path), block_size=8, document_separator="\n\n")
    first, last = evaluation_blocks(options.data, options, tokenizer)
    a, b, c, d, e, f, g, h, i, j = map(token, "abcdefghij")
    no = IGNORED
    assert first.tokens.tolist() == [a, b, c, EOS, d, e, f, g]
    assert first.labels.tolist() == [no, b, c, EOS, no, e, f, g]
    assert first.positions is not None and last.positions is not None
    assert first.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert first.rows.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert last.tokens.tolist() == [h, i, j, EOS, EOS, EOS, EOS, EOS]
    assert last.labels.tolist() == [no, i, j, EOS, no, no, no, no]
    assert last.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert last.rows.tolist() == [8, 8, 8, 8, 12, 12, 12, 12]
    assert {value.dtype for block in (first, last) for value in block} == {np.dtype(np.int64)}


def test_a_stream_block_is_one_piece_across_the_ends_of_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\nd e f g h i j")
    options = options_of(str(tmp_path), block_size=8, document_separator="\n\n", packing="stream")
    first, last = evaluation_blocks(options.data, options, tokenizer)
    assert first.labels.tolist() == [IGNORED, *first.tokens[1:].tolist()]
    assert last.labels.tolist() == [IGNORED, *last.tokens[1:4].tolist()] + [IGNORED] * 4
    assert first.positions is last.positions is None
    assert (first.rows.tolist(), last.rows.tolist()) == ([0] * 8, [1] * 8)


def test_a_piece_has_the_log_probs_in_its_block_that_it_has_alone(
    data_dir: Path, tmp_path: Path
) -> None:
    folder = data_dir / "models" / "stories260K-hf"
    (tmp_path / "a.txt").write_text("Once there was a cat.|One day, Tim ran.|The end of it all")
    options = options_of(str(tmp_path), block_size=64, document_separator="|")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [block] = evaluation_blocks(options.data, options, tokenizer)
    lm = fastperturb.wrap(
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        fastperturb.PerturbConfig(num_samples=2, init_scale=0.5),
    )
    with torch.no_grad():
        together = lm(**collate([block]), seed=3).log_probs[..., 0, :]
        for row in np.unique(block.rows):
            piece = np.flatnonzero(block.rows == row)
            alone = Block(*(value[piece] for value in block if value is not None))
            log_probs = lm(**collate([alone]), seed=3).log_probs[..., 0, :]
            assert torch.allclose(log_probs, together[:, piece[:-1]], atol=1e-5)


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_collate_gives_the_arguments_of_the_models_forward(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, packing: str
) -> None:
    options = options_of(jsonl, packing=packing)
    batch = collate(training_data(options, tokenizer, seed=0).next_blocks(3))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    everywhere = {"input_ids": (3, 4), "labels": (3, 4)}
    by_packing = {"documents": {"position_ids": (3, 4), "rows": (3, 4)}, "stream": {"rows": (3,)}}
    assert shapes == everywhere | by_packing[packing]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_the_tokens_of_packed_blocks_decode_to_the_text(data_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260K-hf")
    path = data_dir / "stories" / "valid.txt"
    options = DataOptions(data=(str(path),))
    blocks = list(evaluation_blocks(options.data, options, tokenizer))
    real = sum(int(np.sum(block.labels != IGNORED)) + 1 for block in blocks)
    tokens = list(itertools.chain.from_iterable(block.tokens.tolist() for block in blocks))[:real]
    assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[1:-1]).strip() == path.read_text(encoding="utf-8").strip()
