"""Histories and futures out of texts: pieces of documents, the same in disorder, their prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastperturb.rank.oracle import Tokens


def pieces(
    documents: Sequence[NDArray[np.integer]],
    count: int,
    length: int,
    generator: np.random.Generator,
) -> list[Tokens]:
    """Different pieces of `length` tokens, in random order, no two of which share a token."""
    found = [
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    ]
    order = generator.permutation(len(found))
    different = list(dict.fromkeys(tuple(found[number].tolist()) for number in order))
    if len(different) < count:
        raise ValueError(
            f"the text has only {len(different)} different pieces of {length} tokens, and {count} "
            "were asked for: give more text, or ask for fewer or shorter histories and futures"
        )
    return different[:count]


def shuffled(sequences: Sequence[Tokens], generator: np.random.Generator) -> list[Tokens]:
    """Each with its own tokens in another order."""
    return [tuple(map(int, generator.permutation(tokens))) for tokens in sequences]


def with_prefixes(sequences: Sequence[Tokens]) -> list[Tokens]:
    """All of their prefixes once, the empty one first: what one pass over each of them answers."""
    prefixes = (tokens[:end] for tokens in sequences for end in range(len(tokens) + 1))
    return list(dict.fromkeys(prefixes))
