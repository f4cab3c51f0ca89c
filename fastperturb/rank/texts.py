"""Histories and futures out of texts: pieces of documents, the same in disorder, their prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastperturb.rank.ask.oracle import Tokens


def pieces(
    documents: Sequence[NDArray[np.integer]], length: int, generator: np.random.Generator
) -> list[Tokens]:
    """All pieces of `length` tokens, no two of which share a token of the text or are the same.

    Documents come in random order, and their pieces in that of the text.
    """
    return list(
        dict.fromkeys(
            tuple(documents[number][start : start + length].tolist())
            for number in generator.permutation(len(documents))
            for start in range(0, len(documents[number]) - length + 1, length)
        )
    )


def shuffled(sequences: Sequence[Tokens], generator: np.random.Generator) -> list[Tokens]:
    """Each with its own tokens in another order."""
    return [tuple(map(int, generator.permutation(tokens))) for tokens in sequences]


def with_prefixes(sequences: Sequence[Tokens]) -> list[Tokens]:
    """All of their prefixes once, the empty one first: what one pass over each of them answers."""
    prefixes = (tokens[:end] for tokens in sequences for end in range(len(tokens) + 1))
    return list(dict.fromkeys(prefixes))
