"""Options about the text of a run and its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from fastperturb.data.packing import Packing


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The text that is read, and how it becomes blocks of tokens."""

    data: tuple[str, ...]
    """Texts to read: files (.txt, .jsonl or .json, also with .gz), folders or globs of such files,
    folders written by Dataset.save_to_disk, or Hugging Face hub ids (id or id:config)."""

    text_field: str = "text"
    """Name of the field that holds the text in each JSON record or dataset row."""

    split: str = "train"
    """Split to read of a dataset that has several."""

    document_separator: str | None = None
    """String between the documents of a text file (write a blank line as $'\\n\\n' in a shell);
    without it each file is one document."""

    block_size: int = 256
    """Number of tokens in a block, the unit that batches are made of."""

    packing: Packing = "documents"
    """Rule for documents that share a block. documents: each attends only to itself. stream: each
    also attends to the documents before it in the block."""

    streaming: bool = False
    """Read the text while training, instead of tokenising all of it first."""

    shuffle_buffer: int = 1000
    """Number of blocks held in memory to draw the next one from; used only with streaming."""

    max_tokens: int | None = None
    """Train on this many tokens from the start of the data; default: on all."""

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
            raise ValueError(
                "document_separator must not be empty; leave it unset for one document a file"
            )
