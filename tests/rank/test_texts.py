"""Pieces of text: cut, shuffled, with their prefixes, and different from each other."""

import numpy as np
import pytest
from rank_cases import small_sequences

from fastperturb.rank.texts import TextPieces, cut, shuffled, with_prefixes


def pieces_of(documents, **changes):
    sizes = {"histories": 20, "history_tokens": 4, "futures": 5, "future_tokens": 3, "targets": 6}
    return TextPieces.cut_from(documents, **sizes | changes, seed=0)


def test_pieces_are_different_and_share_no_token():
    documents = [np.arange(0, 17), np.arange(100, 103), np.arange(200, 230), np.tile([70, 80], 4)]
    pieces = cut(documents, 4, np.random.default_rng(0))
    assert len(pieces) == 4 + 7 + 1
    assert len({token for piece in pieces for token in piece}) == 4 * 11 + 2
    rising = [piece for piece in pieces if piece[0] != 70]
    assert all(piece == tuple(range(piece[0], piece[0] + 4)) for piece in rising)


def test_targets_come_from_documents_that_give_no_history():
    documents = [np.arange(100 * n, 100 * n + 40) for n in range(10)]
    pieces = pieces_of(documents)
    of_targets, of_histories, of_futures = (
        {piece[0] // 100 for piece in group if piece}
        for group in (pieces.targets, pieces.histories, pieces.futures)
    )
    assert len(of_targets) > 1 and not of_targets & (of_histories | of_futures)
    assert pieces.histories != sorted(pieces.histories)


@pytest.mark.parametrize("history_tokens", [2, 8])
def test_histories_targets_and_futures_differ_and_share_no_token(history_tokens):
    pieces = pieces_of([np.arange(400)], history_tokens=history_tokens, future_tokens=5)
    rows = [*pieces.histories, *pieces.targets]
    whole_futures = [future for future in pieces.futures if len(future) == 5]
    tokens = [token for piece in (*rows, *whole_futures) for token in piece]
    assert (len(rows), len(whole_futures)) == (26, 5) and len(set(tokens)) == len(tokens)


def test_pieces_that_begin_alike_are_taken_once():
    repeated = np.array([token for n in range(200) for token in (n % 40, 40 + n % 7, n)])
    pieces = pieces_of([repeated], history_tokens=1, future_tokens=3, histories=20)
    rows = [*pieces.histories, *pieces.targets]
    assert len(set(rows)) == len(rows) == 26
    with pytest.raises(ValueError, match="pieces of 3 tokens, too few for 60 histories"):
        pieces_of([repeated], history_tokens=1, future_tokens=3, histories=60)


def test_shuffled_sequences_keep_their_own_tokens():
    before = small_sequences(50, 6)
    after = shuffled(before, np.random.default_rng(0))
    assert [sorted(tokens) for tokens in after] == [sorted(tokens) for tokens in before]
    assert sum(a != b for a, b in zip(after, before)) > 40


def test_prefixes_come_once_and_the_empty_one_first():
    assert with_prefixes([(1, 2), (1, 3)]) == [(), (1,), (1, 2), (1, 3)]
