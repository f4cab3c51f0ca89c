"""Documents of text, from wherever they lie, and their tokens.

A source is one entry of `--data`. Every source is opened as an `IterableDataset`, whose position
can be saved; read to its end once, its tokens are cached by `datasets`, under a key that changes
with the text, the tokenizer and what is done to them. Nothing that comes with the data is
executed, and no path that stands in a file is followed.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from fastperturb.checkpoint.atomic import digest
from fastperturb.data.packing import Tokens

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from fastperturb.data.options import DataOptions

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
# A tokenizer takes many times a document's memory: longer ones of a text file are cut.
_LONGEST_DOCUMENT = 1 << 20  # characters
# What is tokenised at once: enough for a fast tokenizer's threads, little to carry in a state.
_BATCH = 1 << 18  # characters
# Documents that wait in memory to be written to the cache.
_WRITTEN_AT_ONCE = 128
# Part of the cache's key; to be raised when the same text gives other tokens.
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Source:
    """The texts of one entry of `--data`.

    rows: each has a text in `field`. size: bytes or rows, where known, to tell another version by
    wherever it lies. key: changes when the texts could have changed.
    """

    name: str
    rows: IterableDataset
    field: str
    size: int | None
    key: str

    def __str__(self) -> str:
        return f"{Path(self.name).name} ({self.size})"

    def batches(self) -> Iterator[list[str]]:
        """The texts that are not blank, as many at a time as are tokenised at once."""
        batch: list[str] = []
        characters = 0
        for row in self.rows:
            text = _text(row, self.field, f"data {self.name!r}")
            if not text.strip():
                continue
            batch.append(text)
            characters += len(text)
            if characters >= _BATCH:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


class DocumentTokenizer:
    """Texts to tokens: BOS where the tokenizer puts one by itself, EOS always."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, which separates documents: set "
                "tokenizer.eos_token, or eos_token in its tokenizer_config.json"
            )
        self.eos: int = tokenizer.eos_token_id
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[Tokens]:
        found = self._tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        ended = (ids if ids[-1:] == [self.eos] else [*ids, self.eos] for ids in found)
        return [np.array(ids, dtype=np.int32) for ids in ended]

    def fingerprint(self) -> str:
        """Changes when the tokens of a text could."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        settings = {} if backend is None else json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # of the last call, not of the tokenizer
            settings.pop(name, None)
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        [probe] = self(["The quick brown fox, 12345\n\tjumps.  Ünïcödé ❄"])
        return digest([settings, vocabulary, probe.tolist(), self.eos])


def open_source(name: str, options: DataOptions) -> Source:
    """The source behind an entry of `--data`; only a hub id reaches for the network."""
    path = Path(name).expanduser()
    if path.is_file():
        return _files(name, [path], options)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(name, path, options)
        return _files(name, [each for each in sorted(path.rglob("*")) if _readable(each)], options)
    if glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))
        return _files(name, [Path(each) for each in found if Path(each).is_file()], options)
    if _readable(path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"data {name!r}: there is no such file or folder")
    return _hub(name, options)


def tokenised(source: Source, tokenize: DocumentTokenizer) -> Dataset:
    """The tokens of all of a source's documents in order, one row each, memory-mapped.

    Processes that ask for the same at once wait for the first of them to have it.
    """
    import datasets

    def rows() -> Iterator[dict[str, Tokens]]:
        empty = True
        for tokens in itertools.chain.from_iterable(map(tokenize, source.batches())):
            empty = False
            yield {"tokens": tokens}
        if empty:
            raise no_text([source])

    key = digest([_CACHE_VERSION, source.key, source.field, tokenize.fingerprint()])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    try:
        with _no_progress_bars():
            return datasets.Dataset.from_generator(
                rows, features=features, fingerprint=key, writer_batch_size=_WRITTEN_AT_ONCE
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # ours, which says it better
            raise error.__cause__ from None
        raise


def no_text(sources: Sequence[Source]) -> ValueError:
    names = ", ".join(repr(source.name) for source in sources)
    return ValueError(f"data {names} has no text: its documents are empty, or there are none")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """They would garble the training bar. The switch is global: it is put back."""
    import datasets
    from datasets.utils import are_progress_bars_disabled

    if are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _text(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        fields = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is no mapping"
        raise ValueError(f"{where}: no field {field!r} (text_field); {fields}")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: field {field!r} (text_field) holds no text: {row[field]!r}")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a character
        raise ValueError(f"{where}: field {field!r} (text_field) is no Unicode: {error}") from None
    return row[field]


# Files of text and JSON.


def _readable(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES)


def _files(name: str, paths: list[Path], options: DataOptions) -> Source:
    import datasets

    if not paths:
        raise ValueError(f"data {name!r}: nothing to read; wanted are {', '.join(_SUFFIXES)}")
    for path in paths:
        if not _readable(path):
            raise ValueError(
                f"data {name!r}: {path} is of no kind that is read: {', '.join(_SUFFIXES)}"
            )
    stats = [path.stat() for path in paths]
    versions = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = digest([[str(path.resolve()) for path in paths], versions, options.document_separator])
    rows = datasets.IterableDataset.from_generator(
        _file_rows,
        gen_kwargs={
            "paths": [str(path) for path in paths],  # a list: a saved position names the file
            "field": options.text_field,
            "separator": options.document_separator,
        },
    )
    return Source(name, rows, options.text_field, sum(stat.st_size for stat in stats), key)


def _file_rows(paths: list[str], field: str, separator: str | None) -> Iterator[dict[str, str]]:
    for path in map(Path, paths):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                is_text = ".txt" in path.suffixes[-2:]
                texts = _plain(file, separator) if is_text else _records(file, field, path)
                for text in texts:
                    yield {field: text}
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 ({error.reason} {error.object[error.start]:#x}); convert it, "
                f"as by: iconv -f latin1 -t utf-8 {path}"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from error


def _plain(file: TextIO, separator: str | None) -> Iterator[str]:
    rest = ""
    while part := file.read(_LONGEST_DOCUMENT):
        rest += part + file.readline(_LONGEST_DOCUMENT)
        if separator is not None:
            *documents, rest = rest.split(separator)
            yield from documents
        if len(rest) >= _LONGEST_DOCUMENT:
            yield rest
            rest = ""
    yield rest


def _records(file: TextIO, field: str, path: Path) -> Iterator[str]:
    """Of JSON lines, or of one JSON array."""
    number = 0
    try:
        if file.read(1) == "[":
            file.seek(0)
            for number, record in enumerate(json.load(file), 1):
                yield _text(record, field, f"{path}, record {number}")
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text(json.loads(line), field, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number or error.lineno} is not JSON: {error.msg}"
        ) from None


# Folders and repositories of the datasets library.


def _saved(name: str, folder: Path, options: DataOptions) -> Source:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        folder = folder / options.split
        if not (folder / "state.json").is_file():
            raise ValueError(f"data {name!r} has no split {options.split!r}")
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        outside = [each for each in files if Path(each["filename"]).name != each["filename"]]
        if outside:
            raise ValueError(f"it names files outside its folder: {outside[0]['filename']}")
        dataset = datasets.Dataset.load_from_disk(str(folder)).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data {name!r} is no whole folder of save_to_disk: {error}") from error
    return _rows(name, dataset, options)


def _hub(name: str, options: DataOptions) -> Source:
    import datasets

    repository, _, config = name.partition(":")
    try:
        with _no_progress_bars():
            dataset = datasets.load_dataset(
                repository, config or None, split=options.split, streaming=options.streaming
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data {name!r} is no file or folder here, and the Hugging Face hub does not give it "
            f"(split {options.split!r}): {error}. Without a network, give a folder that "
            "save_to_disk wrote elsewhere"
        ) from error
    return _rows(name, dataset, options)


def _rows(name: str, dataset: Dataset | IterableDataset, options: DataOptions) -> Source:
    import datasets

    columns = dataset.column_names or list(next(iter(dataset), {}))
    if options.text_field not in columns:
        raise ValueError(
            f"data {name!r}: no field {options.text_field!r} (text_field); "
            f"its fields are {', '.join(columns)}"
        )
    # Other columns could decode images or sound, or open the files that these name.
    dataset = dataset.select_columns([options.text_field])
    if isinstance(dataset, datasets.Dataset):
        rows, size, key = dataset.to_iterable_dataset(), len(dataset), dataset._fingerprint
        return Source(name, rows, options.text_field, size, key)
    return Source(name, dataset, options.text_field, None, name)
