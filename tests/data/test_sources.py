"""Sources: every kind gives its texts in order, and every mistake is named with what to do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from letters import TEXTS, laid_out, one_epoch, options_of, tokens_of
from transformers import PreTrainedTokenizerFast

from fastperturb.data import documents, evaluation_blocks, sources, training_data


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
        dataset = datasets.Dataset.from_dict({"body": TEXTS, "n": range(len(TEXTS))})
        return dataset.to_iterable_dataset() if kwargs["streaming"] else dataset

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


def test_a_separator_is_found_wherever_a_read_of_the_file_ends(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<>".join(TEXTS))
    for size in range(14, 40):  # longer than any text
        monkeypatch.setattr(sources, "_MAX_DOCUMENT_CHARACTERS", size)
        monkeypatch.setattr(documents, "_CACHE_VERSION", size)
        options = options_of(str(path), document_separator="<>")
        blocks = evaluation_blocks([str(path)], options, tokenizer)
        assert tokens_of(list(blocks))[: len(laid_out(TEXTS))] == laid_out(TEXTS)


def test_a_document_too_long_to_tokenise_at_once_is_cut_at_a_line_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_DOCUMENT_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("a b c d\ne f g h\ni j k l\nm n o p\n")
    options = options_of(str(tmp_path))
    blocks = evaluation_blocks(options.data, options, tokenizer)
    expected = laid_out(["a b c d e f g h", "i j k l m n o p"])
    assert tokens_of(list(blocks))[: len(expected)] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "a.txt' has no text"),
        ("a.txt", b"\n \n", "a.txt' has no text"),
        ("a.txt", "größe".encode("latin1"), r"a.txt is not UTF-8 \(.* 0xf6\); convert it"),
        (
            "a.txt.gz",
            gzip.compress(b"a b" * 99, mtime=0)[:-9],
            "a.txt.gz is not a complete gzip file",
        ),
        ("a.txt.gz", b"a b c", "a.txt.gz is not a complete gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2: no field 'text' .*are body"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', "line 2: field 'text' .* no text: None"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n7', "a.jsonl, line 2: no field 'text'.* not a mapping"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: field 'text' .* is not Unicode"),
        ("a.json", b'[{"text": "a"}, {"texts": "b"}]', "a.json, record 2: no field 'text'"),
        ("a.json", b'[{"text": "a"},\n', "a.json, line 2 is not JSON"),
        ("a.csv", b"text\na", "a.csv cannot be read; files must end in .txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_the_error(
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
        ("empty", "data .*nothing to read; it needs files that end in .txt"),
        ("empty/*.jsonl", "data .*nothing to read; it needs files that end in .txt"),
    ],
)
def test_a_missing_source_is_named_in_the_error(
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


def test_a_hub_id_without_a_network_raises_with_advice(
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
        ({"split": "dev"}, "has no split 'dev'; its splits are "),
    ],
)
def test_a_saved_folder_without_the_field_or_the_split_raises(
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
