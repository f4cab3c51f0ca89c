"""From text to blocks, the same for any number of processes.

--data -> documents -> tokens, EOS after each -> blocks of T -> the run's order -> batches
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastperturb.data.documents import DocumentTokenizer, tokenised_documents
from fastperturb.data.options import DataOptions
from fastperturb.data.order import ShuffledData, StreamedData, TrainingData
from fastperturb.data.packing import Block, Layout, PackedDocuments
from fastperturb.data.sources import open_source


def training_data(options: DataOptions, tokenizer: Any, *, seed: int) -> TrainingData:
    """Return the blocks of `options.data` in the order of a run, which is a function of the seed.

    tokenizer: one of transformers.
    """
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
        documents = [tokenised_documents(source, tokenize) for source in sources]
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
    """Return all blocks of `paths` in order, read and packed as `options` say for `data`.

    Nothing is streamed, and max_tokens, which limits training, is not applied.
    """
    if not paths:
        raise ValueError("paths must name at least one file, folder or hub id to evaluate on")
    tokenize = DocumentTokenizer(tokenizer)
    mapped = dataclasses.replace(options, streaming=False)
    documents = [tokenised_documents(open_source(path, mapped), tokenize) for path in paths]
    return PackedDocuments(documents, Layout(options.block_size, options.packing, tokenize.eos))
