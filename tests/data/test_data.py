"""Training data: blocks as they should be, in an order that a resumed run continues exactly."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fastperturb
from fastperturb.data import documents
from fastperturb.data.options import (
    Block,
    DataOptions,
    TrainingData,
    collate,
    evaluation_blocks,
    training_data,
)

WORDS = "abcdefghijklmnopqrstuvwxyz"
EOS, BOS, UNKNOWN = 0, 1, 2
IGNORED = -100
TEXTS = ["a b c", "d", "e f g h i", "j k", "l m n o p q r", "s", "t u v", "w x y z"]


def word(letter: str) -> int:
    return 3 + WORDS.index(letter)


def make_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """A word each of a to z is a token."""
    vocabulary = {".": EOS, "^": BOS, "?": UNKNOWN} | {letter: word(letter) for letter in WORDS}
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


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document or two are read at a time, as thousands are of real data."""
    monkeypatch.setattr(documents, "_BATCH", 6)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def options_of(*data: str, **changes: Any) -> DataOptions:
    return DataOptions(data=data, **{"block_size": 4, **changes})


def one_epoch(data: TrainingData, count: int = 3) -> list[Block]:
    blocks, epoch = [], data.epoch
    while data.epoch == epoch:
        blocks += data.next_blocks(count)
    return blocks


def in_order(blocks: list[Block]) -> list[Block]:
    return sorted(blocks, key=lambda block: int(block.rows[0]))


def assert_equal(found: list[Block], wanted: list[Block]) -> None:
    assert len(found) == len(wanted)
    for block, other in zip(found, wanted):
        for name, value, same in zip(Block._fields, block, other):
            assert np.array_equal(value, same), (name, value, same)


def tokens_of(blocks: list[Block]) -> list[int]:
    return [int(token) for block in in_order(blocks) for token in block.tokens]


def laid_out(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*map(word, text.split()), EOS]]


# Blocks.


def test_documents_that_share_a_block_are_pieces_with_their_own_positions_and_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\nd e f g h i j")
    options = options_of(str(tmp_path), block_size=8, document_separator="\n\n")
    first, last = evaluation_blocks(options.data, options, tokenizer)
    a, b, c, d, e, f, g, h, i, j = map(word, "abcdefghij")
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


def test_a_stream_runs_on_over_the_ends_of_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\nd e f g h i j")
    options = options_of(str(tmp_path), block_size=8, document_separator="\n\n", packing="stream")
    first, last = evaluation_blocks(options.data, options, tokenizer)
    assert first.labels.tolist() == [IGNORED, *first.tokens[1:].tolist()]
    assert last.labels.tolist() == [IGNORED, *last.tokens[1:4].tolist()] + [IGNORED] * 4
    assert first.positions is last.positions is None
    assert (first.rows.tolist(), last.rows.tolist()) == ([0] * 8, [1] * 8)


@pytest.mark.parametrize("template", ["^ $A", "^ $A ."])
def test_bos_comes_where_the_tokenizer_puts_it_and_eos_comes_once(
    jsonl: str, template: str
) -> None:
    options = options_of(jsonl)
    blocks = list(evaluation_blocks([jsonl], options, make_tokenizer(template=template)))
    wanted = [token for text in TEXTS for token in [BOS, *map(word, text.split()), EOS]]
    assert tokens_of(blocks)[: len(wanted)] == wanted


def test_a_piece_is_scored_in_its_block_as_it_is_alone(data_dir: Path, tmp_path: Path) -> None:
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
def test_a_batch_is_what_the_model_takes(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, packing: str
) -> None:
    options = options_of(jsonl, packing=packing)
    batch = collate(training_data(options, tokenizer, seed=0).next_blocks(3))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    everywhere = {"input_ids": (3, 4), "labels": (3, 4)}
    by_packing = {"documents": {"position_ids": (3, 4), "rows": (3, 4)}, "stream": {"rows": (3,)}}
    assert shapes == everywhere | by_packing[packing]
    assert {value.dtype for value in batch.values()} == {torch.int64}


# The order of a run.


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
def test_the_end_of_an_epoch_cuts_a_batch_short_and_is_never_empty(
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


def test_a_streamed_block_is_drawn_from_the_next_of_the_buffers_size(
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
            found = resumed.next_blocks(1)
            again = training_data(options, tokenizer, seed=0)
            values, tensors = frozen(resumed.state())
            again.restore(json.loads(values), load(tensors))
            while len(found) < len(blocks) - position:
                found += again.next_blocks(1)
            assert_equal(found, blocks[position:])


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
def test_other_data_refuse_a_state(
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


@pytest.mark.parametrize("streaming", [False, True])
def test_max_tokens_are_the_first_in_every_epoch(
    jsonl: str, tokenizer: PreTrainedTokenizerFast, streaming: bool, small_reads: None
) -> None:
    data = training_data(options_of(jsonl, max_tokens=10, streaming=streaming), tokenizer, seed=0)
    for _ in range(2):
        assert tokens_of(one_epoch(data)) == [*laid_out(TEXTS)[:10], EOS, EOS]


def test_evaluation_is_everything_in_order_whatever_training_leaves_out(
    jsonl: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = options_of("elsewhere.txt", max_tokens=4, streaming=True)
    blocks = list(evaluation_blocks([jsonl, jsonl], options, tokenizer))
    assert_equal(blocks, in_order(blocks))
    everything = laid_out(TEXTS * 2)
    assert tokens_of(blocks)[: len(everything)] == everything


# Sources.


def as_text(folder: Path) -> str:
    (folder / "a.txt").write_text("\ufeff" + "\r\n---\r\n".join(TEXTS), encoding="utf-8")
    return str(folder / "a.txt")


def as_zipped_text(folder: Path) -> str:
    (folder / "a.txt.gz").write_bytes(gzip.compress("\n---\n".join(TEXTS).encode()))
    return str(folder / "a.txt.gz")


def as_folder(folder: Path) -> str:
    (folder / "deep").mkdir()
    for index, text in enumerate(TEXTS):
        (folder / "deep" / f"{index}.txt").write_text(text)
    (folder / "notes.md").write_text("not read")
    return str(folder)


def as_glob(folder: Path) -> str:
    return as_folder(folder) + "/**/?.txt"


def as_lines(folder: Path) -> str:
    records = [{"text": text, "id": str(n) if n else n} for n, text in enumerate(TEXTS)]
    lines = "\n\n".join(map(json.dumps, [*records, {"text": "  "}]))
    (folder / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    return str(folder / "a.json.gz")


def as_array(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    return str(folder / "a.json")


def as_saved(folder: Path) -> str:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    splits = {"train": TEXTS, "test": ["z"]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    ).save_to_disk(folder / "saved")
    return str(folder / "saved")


SOURCES = [as_text, as_zipped_text, as_folder, as_glob, as_lines, as_array, as_saved]


@pytest.mark.parametrize("write", [*SOURCES, as_saved_splits])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_source_gives_its_texts_in_order(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[[Path], str],
    streaming: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = write(folder)
    before = sorted(folder.rglob("*"))
    capfd.readouterr()
    options = options_of(source, document_separator="\n---\n", streaming=streaming)
    everything = laid_out(TEXTS)
    blocks = one_epoch(training_data(options, tokenizer, seed=0))
    assert tokens_of(blocks)[: len(everything)] == everything
    assert capfd.readouterr() == ("", "")  # nothing that would garble the training bar
    assert not datasets.utils.are_progress_bars_disabled()
    assert sorted(folder.rglob("*")) == before


def test_a_hub_id_may_name_a_configuration_and_runs_no_code_of_the_repository(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((args, kwargs))
        found = datasets.Dataset.from_dict({"body": TEXTS, "n": range(len(TEXTS))})
        return found.to_iterable_dataset() if kwargs["streaming"] else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    everything = laid_out(TEXTS)
    for streaming in (False, True):
        options = options_of(
            "some/texts:english", text_field="body", split="test", streaming=streaming
        )
        blocks = one_epoch(training_data(options, tokenizer, seed=0))
        assert tokens_of(blocks)[: len(everything)] == everything
        assert calls.pop() == (
            ("some/texts", "english"),
            {"split": "test", "streaming": streaming},
        )


def test_what_is_tokenised_once_is_not_tokenised_again_until_the_text_changes(
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


def test_documents_are_told_apart_wherever_a_read_ends(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<>".join(TEXTS))
    for size in range(14, 40):  # longer than any text
        monkeypatch.setattr(documents, "_LONGEST_DOCUMENT", size)
        monkeypatch.setattr(documents, "_CACHE_VERSION", size)
        options = options_of(str(path), document_separator="<>")
        blocks = evaluation_blocks([str(path)], options, tokenizer)
        assert tokens_of(list(blocks))[: len(laid_out(TEXTS))] == laid_out(TEXTS)


def test_a_text_too_long_to_tokenise_at_once_is_cut_at_a_line_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_LONGEST_DOCUMENT", 10)
    (tmp_path / "a.txt").write_text("a b c d\ne f g h\ni j k l\nm n o p\n")
    options = options_of(str(tmp_path))
    blocks = evaluation_blocks(options.data, options, tokenizer)
    wanted = laid_out(["a b c d e f g h", "i j k l m n o p"])
    assert tokens_of(list(blocks))[: len(wanted)] == wanted


# Mistakes.


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "a.txt' has no text"),
        ("a.txt", b"\n \n", "a.txt' has no text"),
        ("a.txt", "größe".encode("latin1"), r"a.txt is not UTF-8 \(.* 0xf6\); convert it"),
        ("a.txt.gz", gzip.compress(b"a b" * 99, mtime=0)[:-9], "a.txt.gz is no whole gzip file"),
        ("a.txt.gz", b"a b c", "a.txt.gz is no whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2: no field 'text' .*are body"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', "line 2: field 'text' .* no text: None"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n7', "a.jsonl, line 2: no field 'text'.* no mapping"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: field 'text' .* is no Unicode"),
        ("a.json", b'[{"text": "a"}, {"texts": "b"}]', "a.json, record 2: no field 'text'"),
        ("a.json", b'[{"text": "a"},\n', "a.json, line 2 is not JSON"),
        ("a.csv", b"text\na", "a.csv is of no kind that is read: .txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    streaming: bool,
    name: str,
    content: bytes,
    complaint: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    options = options_of(str(tmp_path / name), streaming=streaming)
    with pytest.raises(ValueError, match=complaint):
        training_data(options, tokenizer, seed=0).next_blocks(1)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("missing.txt", "data 'missing.txt': there is no such file or folder"),
        ("./missing", "there is no such file or folder"),
        ("empty", "data .*nothing to read; wanted are .txt"),
        ("empty/*.jsonl", "data .*nothing to read; wanted are .txt"),
    ],
)
def test_a_source_that_is_not_there_is_named(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    complaint: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        training_data(options_of(source), tokenizer, seed=0)


def test_a_hub_id_without_a_network_says_what_helps(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/texts' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    complaint = "'some/texts' is no file or folder here.*Couldn't reach.*save_to_disk wrote"
    with pytest.raises(ValueError, match=complaint):
        training_data(options_of("some/texts"), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"text_field": "body"}, "no field 'body' .*its fields are text"),
        ({"split": "dev"}, "has no split 'dev'"),
    ],
)
def test_a_saved_folder_without_what_is_asked_for_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, changes: dict[str, str], complaint: str
) -> None:
    options = options_of(as_saved_splits(tmp_path), **changes)
    with pytest.raises(ValueError, match=complaint):
        training_data(options, tokenizer, seed=0)


@pytest.mark.parametrize("inside", [True, False])
def test_no_path_in_a_saved_folder_is_followed_out_of_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, inside: bool
) -> None:
    folder = Path(as_saved(tmp_path))
    [arrow] = folder.glob("*.arrow")
    elsewhere = tmp_path / "elsewhere.arrow"
    arrow.rename(elsewhere)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": "../elsewhere.arrow" if inside else str(elsewhere)}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="names files outside its folder: .*elsewhere.arrow"):
        training_data(options_of(str(folder)), tokenizer, seed=0)


def test_a_tokenizer_without_eos_is_refused(jsonl: str) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="no eos_token, .*: set tokenizer.eos_token"):
        training_data(options_of(jsonl), PreTrainedTokenizerFast(tokenizer_object=backend), seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": ()},
        {"block_size": 1},
        {"shuffle_buffer": 0},
        {"max_tokens": 1},
        {"document_separator": ""},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_that_make_no_sense_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(options_of("a.txt"), **changes)


# Real text.


def test_real_text_survives_packing(data_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260K-hf")
    path = data_dir / "stories" / "valid.txt"
    options = DataOptions(data=(str(path),))
    blocks = list(evaluation_blocks(options.data, options, tokenizer))
    real = sum(int(np.sum(block.labels != IGNORED)) + 1 for block in blocks)
    tokens = list(itertools.chain.from_iterable(block.tokens.tolist() for block in blocks))[:real]
    assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[1:-1]).strip() == path.read_text(encoding="utf-8").strip()
