"""Sources of text: opening each entry of `--data`, wherever it lies.

A source is a text file, a JSON file, a folder or glob of them, a folder of `save_to_disk`, or a
dataset on the Hugging Face hub. All are opened as an `IterableDataset`, whose position can be
saved. Nothing that comes with the data is executed, and no path inside a file is followed.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastperturb.checkpoint.atomic import digest
from fastperturb.data.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
# A tokenizer takes many times a document's memory: longer documents of a text file are cut.
_MAX_DOCUMENT_CHARACTERS = 1 << 20
# A batch is tokenised at once: enough for a fast tokenizer's threads, little to save with a state.
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Source:
    """The texts of one entry of `--data`.

    rows: mappings with a text in `field`.
    size: bytes or rows, where known. It tells two versions apart, whatever folder they are in.
    key: changes when the texts could have changed.
    """

    name: str
    rows: IterableDataset
    field: str
    size: int | None
    key: str

    def __str__(self) -> str:
        return f"{Path(self.name).name} ({self.size})"

    def batches(self) -> Iterator[list[str]]:
        """Yield the texts that are not blank, as many at a time as are tokenised at once."""
        batch: list[str] = []
        characters = 0
        for row in self.rows:
            text = _text(row, self.field, f"data {self.name!r}")
            if not text.strip():
                continue
            batch.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


def open_source(name: str, options: DataOptions) -> Source:
    """Open the source that an entry of `--data` names; only a hub id uses the network."""
    path = Path(name).expanduser()
    if path.is_file():
        return _open_files(name, [path], options)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _open_saved(name, path, options)
        return _open_files(name, list(filter(_has_suffix, sorted(path.rglob("*")))), options)
    if glob.has_magic(name):
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        return _open_files(name, [match for match in matches if match.is_file()], options)
    looks_local = _has_suffix(path) or path.is_absolute() or name.startswith((".", "~"))
    if looks_local or name.count("/") > 1:
        raise ValueError(f"data {name!r}: there is no such file or folder")
    return _open_hub(name, options)


def no_text_error(sources: Sequence[Source]) -> ValueError:
    names = ", ".join(repr(source.name) for source in sources)
    return ValueError(f"data {names} has no text: its documents are empty, or there are none")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the bars of `datasets`, which would garble ours; the global switch is put back."""
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
    """Return the text of a row; `where` begins the error about a row without one."""
    if not isinstance(row, dict) or field not in row:
        fields = (
            f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is not a mapping"
        )
        raise ValueError(f"{where}: no field {field!r} (text_field); {fields}")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: field {field!r} (text_field) holds no text: {row[field]!r}")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a character
        raise ValueError(f"{where}: field {field!r} (text_field) is not Unicode: {error}") from None
    return row[field]


# Files of text and JSON


def _has_suffix(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES)


def _open_files(name: str, paths: list[Path], options: DataOptions) -> Source:
    import datasets

    if not paths:
        raise ValueError(
            f"data {name!r}: nothing to read; it needs files that end in {', '.join(_SUFFIXES)}"
        )
    for path in paths:
        if not _has_suffix(path):
            raise ValueError(
                f"data {name!r}: {path} cannot be read; files must end in {', '.join(_SUFFIXES)}"
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
                texts = _documents(file, separator) if is_text else _records(file, field, path)
                for text in texts:
                    yield {field: text}
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 ({error.reason} {error.object[error.start]:#x}); convert it, "
                f"as by: iconv -f latin1 -t utf-8 {path}"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a complete gzip file: {error}; copy or compress it again"
            ) from error


def _documents(file: TextIO, separator: str | None) -> Iterator[str]:
    """Yield the documents of a text file, the longest of them cut at the end of a line."""
    rest = ""
    while part := file.read(_MAX_DOCUMENT_CHARACTERS):
        rest += part + file.readline(_MAX_DOCUMENT_CHARACTERS)
        if separator is not None:
            *documents, rest = rest.split(separator)
            yield from documents
        if len(rest) >= _MAX_DOCUMENT_CHARACTERS:
            yield rest
            rest = ""
    yield rest


def _records(file: TextIO, field: str, path: Path) -> Iterator[str]:
    """Yield the texts of JSON lines, or of one JSON array."""
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


# Folders and repositories of the datasets library


def _open_saved(name: str, folder: Path, options: DataOptions) -> Source:
    """Open a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(state.parent.name for state in folder.glob("*/state.json"))
        if options.split not in splits:
            raise ValueError(
                f"data {name!r} has no split {options.split!r}; its splits are {', '.join(splits)}"
            )
        folder = folder / options.split
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        names = [file["filename"] for file in files]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"it names files outside its folder: {outside[0]}")
        dataset = datasets.Dataset.load_from_disk(str(folder)).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data {name!r} is not a complete folder of save_to_disk: {error}; save it again"
        ) from error
    return _from_dataset(name, dataset, options)


def _open_hub(name: str, options: DataOptions) -> Source:
    import datasets

    repository, _, config = name.partition(":")
    try:
        with no_progress_bars():
            dataset = datasets.load_dataset(
                repository, config or None, split=options.split, streaming=options.streaming
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data {name!r} is no file or folder here, and the Hugging Face hub does not give it "
            f"(split {options.split!r}): {error}. Without a network, give a folder that "
            "save_to_disk wrote elsewhere"
        ) from error
    return _from_dataset(name, dataset, options)


def _from_dataset(name: str, dataset: Dataset | IterableDataset, options: DataOptions) -> Source:
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
