"""Pieces of text that models are asked about: histories, futures and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastperturb.rank.types import Tokens


@dataclass(frozen=True)
class TextPieces:
    """The pieces of text that every model is asked about, the same for all.

    futures, shuffled_futures: with all their prefixes, the empty one among them.
    """

    histories: list[Tokens]
    targets: list[Tokens]
    futures: list[Tokens]
    shuffled_histories: list[Tokens]
    shuffled_futures: list[Tokens]

    @classmethod
    def cut_from(
        cls,
        documents: Sequence[NDArray[np.integer]],
        *,
        histories: int,
        history_tokens: int,
        futures: int,
        future_tokens: int,
        targets: int,
        seed: int,
    ) -> TextPieces:
        """Cut documents into pieces, and shuffle the tokens within copies of them.

        Targets come from a fifth of the text that gives nothing else: other documents, but for
        one at most.
        """
        generator = np.random.default_rng(seed)
        piece_tokens = max(history_tokens, future_tokens)
        pieces = cut(documents, piece_tokens, generator)
        spare = len(pieces) - histories - futures
        for_targets = min(max(targets, len(pieces) // 5), spare) if targets else 0
        others = pieces[: len(pieces) - for_targets]
        target_cuts = _distinct(pieces[len(others) :], history_tokens, targets, generator)
        history_cuts = _distinct(others, history_tokens, histories, generator, without=target_cuts)
        future_cuts = _distinct(others, future_tokens, futures, generator, without=history_cuts)
        missing = (
            spare < 0
            or len(history_cuts) < histories
            or len(future_cuts) < futures
            or len(target_cuts) < targets
        )
        if missing:
            raise ValueError(
                f"the text has {len(pieces)} different pieces of {piece_tokens} tokens, too few "
                f"for {histories} histories, {futures} futures and {targets} targets that differ: "
                "give more text, or ask for fewer, or for longer histories"
            )
        rows, runs = list(history_cuts.values()), list(future_cuts.values())
        shuffled_futures = with_prefixes(shuffled(runs, generator))
        return cls(
            rows,
            list(target_cuts.values()),
            with_prefixes(runs),
            shuffled(rows, generator),
            shuffled_futures,
        )


def cut(
    documents: Sequence[NDArray[np.integer]], length: int, generator: np.random.Generator
) -> list[Tokens]:
    """Cut documents into distinct pieces of `length` tokens that share no token of the text.

    Documents come in random order, and the pieces of each in the order of its text.
    """
    return list(
        dict.fromkeys(
            tuple(documents[number][start : start + length].tolist())
            for number in generator.permutation(len(documents))
            for start in range(0, len(documents[number]) - length + 1, length)
        )
    )


def shuffled(sequences: Sequence[Tokens], generator: np.random.Generator) -> list[Tokens]:
    """Permute the tokens within each sequence."""
    return [tuple(map(int, generator.permutation(tokens))) for tokens in sequences]


def with_prefixes(sequences: Sequence[Tokens]) -> list[Tokens]:
    """List all prefixes of the sequences once, the empty one first; one pass answers them all."""
    prefixes = (tokens[:end] for tokens in sequences for end in range(len(tokens) + 1))
    return list(dict.fromkeys(prefixes))


def _distinct(
    pieces: Sequence[Tokens],
    length: int,
    count: int,
    generator: np.random.Generator,
    *,
    without: Mapping[Tokens, Tokens] | None = None,
) -> dict[Tokens, Tokens]:
    """Choose up to `count` pieces at random whose first `length` tokens differ: {piece: those}.

    without: pieces that are taken already, and their cuts; neither comes again.
    """
    taken = dict(without or {})
    seen = set(taken.values())
    chosen: dict[Tokens, Tokens] = {}
    for number in generator.permutation(len(pieces)):
        piece, beginning = pieces[number], pieces[number][:length]
        if len(chosen) < count and piece not in taken and beginning not in seen:
            chosen[piece] = beginning
            seen.add(beginning)
    return chosen
