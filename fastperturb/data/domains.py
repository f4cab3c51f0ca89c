"""The texts that models are evaluated on: blocks that know the document of each token.

A domain is read by the code that reads training texts: a text file, a folder of them, JSONL, a
saved dataset or a hub id. Besides, the names in `KNOWN` stand for texts on the Hugging Face hub
that many evaluate on, each with its field and split; a file or folder of that name here comes
first. `openwebtext` is a sample of 100 k documents of it, `germanquad` the passages of its test
split, once each. Confidence intervals are made over documents, so no document attends to another.
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

from fastperturb.data.documents import DocumentTokenizer, token_features
from fastperturb.data.options import DataOptions
from fastperturb.data.packing import Block, Layout, PackedDocuments, Tokens
from fastperturb.data.sources import no_text_error, open_source


class HubText(NamedTuple):
    """A text on the Hugging Face hub.

    hub: id or id:config.
    heading: the pattern of a line that begins a document, where each row is one line.
    """

    hub: str
    text_field: str
    split: str
    heading: str | None = None


# The title of an article has one sign on each side, those of its sections more.
_ARTICLE = r" = [^=]+ = \s*$"

KNOWN = {
    "wikitext2": HubText("Salesforce/wikitext:wikitext-2-raw-v1", "text", "test", _ARTICLE),
    "wikitext103": HubText("Salesforce/wikitext:wikitext-103-raw-v1", "text", "test", _ARTICLE),
    "writingprompts": HubText("euclaise/writingprompts", "story", "test"),
    "codeparrot": HubText("codeparrot/codeparrot-clean-valid", "content", "train"),
    "germanquad": HubText("mteb/germanquad-retrieval:corpus", "text", "corpus"),
    "openwebtext": HubText("Elriggs/openwebtext-100k", "text", "train"),
}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Rules for reading texts."""

    text_field: str = "text"
    """Name of the field that holds the text in each JSON record or dataset row."""

    split: str = "test"
    """Split to read of a dataset that has several."""

    document_separator: str | None = None
    """String between the documents of a text file (write a blank line as $'\\n\\n' in a shell);
    without it each file is one document."""

    max_documents: int | None = None
    """Number of documents to read from the start of each text; default: all."""

    document_tokens: int | None = None
    """Number of tokens to keep from the start of each document; default: all."""

    def __post_init__(self) -> None:
        self.data_options("text")  # raises where training would
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, got {self.max_documents}")
        if self.document_tokens is not None and self.document_tokens < 2:
            raise ValueError(
                f"document_tokens must be at least 2 to predict, got {self.document_tokens}"
            )

    def data_options(self, where: str) -> DataOptions:
        """Return the options by which training reads the same text."""
        return DataOptions(
            data=(where,),
            text_field=self.text_field,
            split=self.split,
            document_separator=self.document_separator,
            # Fetches no more of a text on the hub than is needed.
            streaming=self.max_documents is not None,
        )


@dataclass(frozen=True, kw_only=True)
class DomainOptions(TextOptions):
    """Rules for reading texts and cutting them into blocks of tokens."""

    block_size: int = 256
    """Number of tokens in a block; a longer document is cut, and each part is predicted without
    the others."""

    def data_options(self, where: str) -> DataOptions:
        return dataclasses.replace(super().data_options(where), block_size=self.block_size)


@dataclass(frozen=True)
class Domain:
    """A text in blocks, under packing="documents".

    documents: for each block, the number of each token's document [T], from 0; -1 for padding.
    """

    name: str
    blocks: Sequence[Block]
    documents: Sequence[NDArray[np.int64]]

    @cached_property
    def document_count(self) -> int:
        return 1 + max(int(numbers.max()) for numbers in self.documents)

    def tokens(self) -> list[NDArray[np.int64]]:
        """Return the tokens of each document."""
        numbers = np.concatenate(self.documents)
        tokens = np.concatenate([block.tokens for block in self.blocks])
        ends = np.flatnonzero(np.diff(numbers)) + 1  # padding, if any, comes last
        return np.split(tokens, ends)[: self.document_count]


def read(name: str, where: str | Sequence[str], options: DomainOptions, tokenizer: Any) -> Domain:
    """Read a domain from the text at `where`, or from several texts laid end to end."""
    tokenize = DocumentTokenizer(tokenizer)
    places = [where] if isinstance(where, str) else where
    documents = [tokens for place in places for tokens in read_documents(place, options, tokenize)]
    layout = Layout(options.block_size, "documents", tokenize.eos)
    blocks = PackedDocuments([_in_memory(documents)], layout)
    return Domain(name, blocks, [blocks.documents(number) for number in range(len(blocks))])


def read_documents(
    where: str, options: TextOptions, tokenize: DocumentTokenizer
) -> list[NDArray[np.int32]]:
    """Return the tokens of each document of the text at `where`."""
    known = None if Path(where).expanduser().exists() else KNOWN.get(where)
    data_options = options.data_options(where)
    if known is not None:
        data_options = dataclasses.replace(
            data_options, text_field=known.text_field, split=known.split
        )
    source = open_source(where if known is None else known.hub, data_options)
    batches: Iterable[list[str]] = source.batches()
    if known is not None and known.heading is not None:
        lines = itertools.chain.from_iterable(batches)
        batches = ([text] for text in _join_lines(lines, known.heading))
    all_tokens = itertools.chain.from_iterable(map(tokenize, batches))
    wanted = itertools.islice(all_tokens, options.max_documents)
    documents = [tokens[: options.document_tokens] for tokens in wanted]
    if not documents:
        raise no_text_error([source])
    return documents


def _join_lines(lines: Iterable[str], heading: str) -> Iterator[str]:
    """Yield the documents of which `lines` are the lines."""
    document: list[str] = []
    for line in lines:
        if document and re.match(heading, line):
            yield "".join(document)
            document = []
        document.append(line)
    if document:
        yield "".join(document)


def _in_memory(documents: Sequence[Tokens]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"tokens": documents}, features=token_features())
