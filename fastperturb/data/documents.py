"""Documents as tokens, kept in a cache.

A source that was read to its end once is not tokenised again: `datasets` caches its tokens under a
key that changes with the text, the tokenizer and how both are used.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastperturb.checkpoint.atomic import digest
from fastperturb.data.packing import Tokens
from fastperturb.data.sources import Source, no_progress_bars, no_text_error

if TYPE_CHECKING:
    from datasets import Dataset

# Documents that wait in memory to be written to the cache.
_WRITER_BATCH = 128
# Part of the cache's key; to be raised when the same text gives other tokens.
_CACHE_VERSION = 1


class DocumentTokenizer:
    """Turns texts into tokens, with EOS at the end and BOS where the tokenizer puts one itself."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, which separates documents: set "
                "tokenizer.eos_token, or eos_token in its tokenizer_config.json"
            )
        self.eos: int = tokenizer.eos_token_id
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[Tokens]:
        encoded = self._tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        ended = (ids if ids[-1:] == [self.eos] else [*ids, self.eos] for ids in encoded)
        return [np.array(ids, dtype=np.int32) for ids in ended]

    def fingerprint(self) -> str:
        """Return a hash that changes when the tokens of a text could."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        settings = {} if backend is None else json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # of the last call, not of the tokenizer
            settings.pop(name, None)
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        [probe] = self(["The quick brown fox, 12345\n\tjumps.  Ünïcödé ❄"])
        return digest([settings, vocabulary, probe.tolist(), self.eos])


def tokenised_documents(source: Source, tokenize: DocumentTokenizer) -> Dataset:
    """Return the tokens of all documents of a source in order, one row each, memory-mapped.

    Processes that ask for the same source at once wait for the first of them to tokenise it.
    """
    import datasets

    def rows() -> Iterator[dict[str, Tokens]]:
        is_empty = True
        for tokens in itertools.chain.from_iterable(map(tokenize, source.batches())):
            is_empty = False
            yield {"tokens": tokens}
        if is_empty:
            raise no_text_error([source])

    key = digest([_CACHE_VERSION, source.key, source.field, tokenize.fingerprint()])
    try:
        with no_progress_bars():
            return datasets.Dataset.from_generator(
                rows, features=token_features(), fingerprint=key, writer_batch_size=_WRITER_BATCH
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # ours, which says it better
            raise error.__cause__ from None
        raise


def token_features() -> Any:
    """Return the columns that `PackedDocuments` reads: `tokens`, a list of int32 a document."""
    import datasets

    return datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
