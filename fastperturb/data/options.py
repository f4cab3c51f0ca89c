"""Training data: from text to blocks in a run's order, the same for any number of processes.

--data -> documents -> tokens, EOS after each -> blocks of T -> the run's order -> batches
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastperturb.data.documents import DocumentTokenizer, open_source, tokenised
from fastperturb.data.order import ShuffledData, StreamedData, TrainingData
from fastperturb.data.packing import Block, Layout, PackedDocuments, Packing, collate

__all__ = [
    "Block",
    "DataOptions",
    "TrainingData",
    "collate",
    "evaluation_blocks",
    "training_data",
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read, and how it is laid into blocks."""

    data: tuple[str, ...]
    """Files (.txt, .jsonl, .json, each also .gz), folders or globs of them, folders of
    save_to_disk, or hub ids (id or id:config)."""

    text_field: str = "text"
    """Where a record of JSON or of a dataset holds its text."""

    split: str = "train"
    """Of a dataset that has several."""

    document_separator: str | None = None
    """What stands between the documents of one text file (a blank line is $'\\n\\n' in a shell);
    default: a file is one document."""

    block_size: int = 256
    """Tokens a block."""

    packing: Packing = "documents"
    """documents: those that share a block do not see each other. stream: they do."""

    streaming: bool = False
    """Read while training, instead of tokenising everything first."""

    shuffle_buffer: int = 1000
    """Streaming: the blocks among which the next one is drawn."""

    max_tokens: int | None = None
    """Train on the first so many tokens only."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one file, folder or hub id")
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2 to predict, got {self.block_size}")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2 to predict, got {self.max_tokens}")
        if self.document_separator == "":
            raise ValueError("document_separator must not be empty; None: a file is a document")


def training_data(options: DataOptions, tokenizer: Any, *, seed: int) -> TrainingData:
    """The blocks of `options.data` in the order of a run, which is a function of the seed."""
    tokenize = DocumentTokenizer(tokenizer)
    sources = [open_source(name, options) for name in options.data]
    layout = Layout(options.block_size, options.packing, tokenize.eos)
    identity: dict[str, int | str] = {
        "streaming": int(options.streaming),
        "tokenizer": tokenize.fingerprint(),
        "packing": options.packing,
        "block_size": options.block_size,
    }
    if not options.streaming:
        documents = [tokenised(source, tokenize) for source in sources]
        blocks = PackedDocuments(documents, layout, max_tokens=options.max_tokens)
        return ShuffledData(blocks, identity, seed=seed)
    identity["data"] = ", ".join(str(source) for source in sources)
    for name in ("text_field", "split", "document_separator", "shuffle_buffer", "max_tokens"):
        identity[name] = str(getattr(options, name))
    return StreamedData(
        sources,
        tokenize,
        layout,
        identity,
        seed=seed,
        buffer_size=options.shuffle_buffer,
        max_tokens=options.max_tokens,
    )


def evaluation_blocks(
    paths: Sequence[str], options: DataOptions, tokenizer: Any
) -> Sequence[Block]:
    """All blocks of `paths`, in the order of their documents, read and laid out as `options` say.

    Nothing is streamed and max_tokens, which is about training, leaves nothing out.
    """
    if not paths:
        raise ValueError("paths must name at least one file, folder or hub id to evaluate on")
    tokenize = DocumentTokenizer(tokenizer)
    mapped = dataclasses.replace(options, streaming=False)
    documents = [tokenised(open_source(path, mapped), tokenize) for path in paths]
    return PackedDocuments(documents, Layout(options.block_size, options.packing, tokenize.eos))
