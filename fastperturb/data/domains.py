"""The texts that models are judged on: blocks that know which document each token is of.

A domain is read like a training text, by the same code: a text file, a folder of them, JSONL, a
saved dataset, a hub id; or one of the names below, which stand for texts on the Hugging Face hub
that many evaluate on, each with the field and split it wants. (A file or folder of that name here
comes first. `openwebtext` is a sample of 100 k documents of it; `germanquad` the passages of its
test split, once each.) Documents are what intervals are made over, so they never see each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastperturb.data.documents import DocumentTokenizer, no_text, open_source
from fastperturb.data.options import DataOptions
from fastperturb.data.packing import Block, Layout, PackedDocuments, Tokens


class Known(NamedTuple):
    """Where a text lies on the hub: id or id:config, field, split.

    heading: its rows are lines, of which one like this begins a document.
    """

    hub: str
    text_field: str
    split: str
    heading: str | None = None


# The title of an article has one sign on each side, those of its sections more.
_ARTICLE = r" = [^=]+ = \s*$"

KNOWN = {
    "wikitext2": Known("Salesforce/wikitext:wikitext-2-raw-v1", "text", "test", _ARTICLE),
    "wikitext103": Known("Salesforce/wikitext:wikitext-103-raw-v1", "text", "test", _ARTICLE),
    "writingprompts": Known("euclaise/writingprompts", "story", "test"),
    "codeparrot": Known("codeparrot/codeparrot-clean-valid", "content", "train"),
    "germanquad": Known("mteb/germanquad-retrieval:corpus", "text", "corpus"),
    "openwebtext": Known("Elriggs/openwebtext-100k", "text", "train"),
}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts are read."""

    text_field: str = "text"
    """Where a record of JSON or of a dataset holds its text."""

    split: str = "test"
    """Of a dataset that has several."""

    document_separator: str | None = None
    """What stands between the documents of one text file (a blank line is $'\\n\\n' in a shell);
    default: a file is one document."""

    max_documents: int | None = None
    """Read the first so many documents of each text only."""

    document_tokens: int | None = None
    """Keep the first so many tokens of each document only."""

    def __post_init__(self) -> None:
        self.reading("text")  # which refuses what training refuses
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, got {self.max_documents}")
        if self.document_tokens is not None and self.document_tokens < 2:
            raise ValueError(
                f"document_tokens must be at least 2 to predict, got {self.document_tokens}"
            )

    def reading(self, where: str) -> DataOptions:
        """The options by which training reads the same text."""
        return DataOptions(
            data=(where,),
            text_field=self.text_field,
            split=self.split,
            document_separator=self.document_separator,
            # Of a text on the hub only what is needed is fetched.
            streaming=self.max_documents is not None,
        )


@dataclass(frozen=True, kw_only=True)
class DomainOptions(TextOptions):
    """How texts are read, and how they are laid into blocks."""

    block_size: int = 256
    """Tokens a block: of longer documents each piece of a block is predicted by itself."""

    def reading(self, where: str) -> DataOptions:
        return dataclasses.replace(super().reading(where), block_size=self.block_size)


@dataclass(frozen=True)
class Domain:
    """A text in blocks, under packing="documents".

    documents: for each block, the document of each token [T], counted from 0; -1 for padding.
    """

    name: str
    blocks: Sequence[Block]
    documents: Sequence[NDArray[np.int64]]

    @cached_property
    def document_count(self) -> int:
        return 1 + max(int(each.max()) for each in self.documents)

    def tokens(self) -> list[NDArray[np.int64]]:
        """The tokens of each document."""
        owners = np.concatenate(self.documents)
        tokens = np.concatenate([block.tokens for block in self.blocks])
        ends = np.flatnonzero(np.diff(owners)) + 1  # padding, if any, comes last
        return np.split(tokens, ends)[: self.document_count]


def read(name: str, where: str | Sequence[str], options: DomainOptions, tokenizer: Any) -> Domain:
    """A domain of this name, of the text at `where`, or of several laid end to end."""
    tokenize = DocumentTokenizer(tokenizer)
    places = [where] if isinstance(where, str) else where
    documents = [tokens for place in places for tokens in read_documents(place, options, tokenize)]
    layout = Layout(options.block_size, "documents", tokenize.eos)
    blocks = PackedDocuments([_table(documents)], layout)
    return Domain(name, blocks, [blocks.documents(number) for number in range(len(blocks))])


def read_documents(
    where: str, options: TextOptions, tokenize: DocumentTokenizer
) -> list[NDArray[np.int32]]:
    """The tokens of each document at one place."""
    known = None if Path(where).expanduser().exists() else KNOWN.get(where)
    reading = options.reading(where)
    if known is not None:
        reading = dataclasses.replace(reading, text_field=known.text_field, split=known.split)
    source = open_source(where if known is None else known.hub, reading)
    batches: Iterable[list[str]] = source.batches()
    if known is not None and known.heading is not None:
        lines = itertools.chain.from_iterable(batches)
        batches = ([text] for text in _joined(lines, known.heading))
    found = itertools.chain.from_iterable(map(tokenize, batches))
    first = itertools.islice(found, options.max_documents)
    documents = [tokens[: options.document_tokens] for tokens in first]
    if not documents:
        raise no_text([source])
    return documents


def _joined(lines: Iterable[str], heading: str) -> Iterator[str]:
    """The documents that are given line by line."""
    document: list[str] = []
    for line in lines:
        if document and re.match(heading, line):
            yield "".join(document)
            document = []
        document.append(line)
    if document:
        yield "".join(document)


def _table(documents: Sequence[Tokens]) -> Any:
    """As `PackedDocuments` reads them, in memory."""
    import datasets

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"tokens": documents}, features=features)
