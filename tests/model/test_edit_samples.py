"""The rate, the kinds and the places of random edits of tokens."""

import pytest
import torch
from edit_cases import BOS, EOS, SPECIAL, V, edited_lm, edits_of
from torch.nn import functional as F

from fastperturb.engine.edit_layout import nearest


def test_tokens_are_edited_at_the_rate_with_equal_shares_of_each_kind():
    ids = torch.tensor([[BOS, *[7, EOS] * 500]])  # an editable token never has one beside it
    counts = {}
    for kind in ("replace", "insert", "delete"):
        edits = edits_of(edited_lm(kinds=(kind,), rate=0.2, positions=4096), ids, 40)
        sevens = (edits.ids == 7).sum() / 40
        others = (~torch.isin(edits.ids, torch.tensor([*SPECIAL, 7]))).sum() / 40
        counts[kind] = (float(sevens), float(others))
        assert ((edits.ids == EOS).sum((1, 2)) == 500).all()
        assert ((edits.ids == BOS).sum((1, 2)) == 1).all()
    close = lambda mean: pytest.approx(mean, abs=6)  # noqa: E731, 3 standard errors
    assert counts["replace"] == (close(400), close(100))
    assert counts["insert"] == (close(500 + 100 / 26), close(100 * 25 / 26))
    assert counts["delete"] == (close(400), 0)
    edits = edits_of(edited_lm(rate=0.8, kinds=("replace", "delete"), positions=4096), ids, 40)
    assert float((edits.ids == 7).sum()) / 40 == close(100)


def test_replacements_are_uniform_over_neighbors_and_insertions_over_plain_tokens():
    ids = torch.full((1, 400), 7)
    lm = edited_lm(kinds=("replace",), rate=1.0, neighbors=5)
    table = lm.base.get_input_embeddings().weight
    cosines = F.cosine_similarity(table[7], table, dim=-1)
    cosines[[7, *SPECIAL]] = -2
    shares = edits_of(lm, ids, 20).ids.flatten().bincount(minlength=V) / 8000
    assert set(shares.nonzero()[:, 0].tolist()) == set(cosines.topk(5).indices.tolist())
    assert shares.topk(5).values == pytest.approx([0.2] * 5, abs=0.015)

    edits = edits_of(edited_lm(kinds=("insert",), rate=1.0, positions=1000), ids, 20)
    assert (edits.ids[..., 1::2] == 7).all() and edits.ids.shape[-1] == 800
    shares = edits.ids[..., ::2].flatten().bincount(minlength=V) / 8000
    assert (shares[list(SPECIAL)] == 0).all()
    assert shares[3:] == pytest.approx([1 / 26] * 26, abs=0.008)


def test_swapped_pairs_never_overlap():
    ids = torch.arange(3, 13)[None]
    edits = edits_of(edited_lm(kinds=("swap",), rate=1.0), ids, 1)
    assert edits.ids[0, 0].tolist() == [3, 5, 4, 7, 6, 9, 8, 11, 10, 12]
    assert edits.source[0, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


def test_every_place_knows_the_token_at_which_it_was_laid_down():
    ids = torch.arange(3, 13)[None]
    swapped = edits_of(edited_lm(kinds=("swap",), rate=1.0), ids, 1)
    assert torch.equal(swapped.origin[0, 0], torch.arange(10))
    inserted = edits_of(edited_lm(kinds=("insert",), rate=1.0), ids, 1)
    assert torch.equal(inserted.origin[0, 0], torch.arange(10).repeat_interleave(2))
    # A copy without deleted tokens ends before the places do.
    deleted = edits_of(edited_lm(kinds=("delete",), rate=0.5), ids, 1)
    kept = deleted.origin >= 0
    assert 1 < kept.sum() < 10 and kept[0, 0, : kept.sum()].all()
    assert torch.equal(deleted.ids[kept], deleted.of_places(ids)[kept])
    assert (deleted.ids[~kept] == 0).all()


def test_neighbors_depend_on_the_embedding_table_only():
    table = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    table[100:200] = table[:100] * 1.5  # ties
    special = torch.zeros(300, dtype=torch.bool)
    whole = nearest(table, torch.arange(300), 7, special)
    for tokens in torch.arange(300).split([1, 63, 64, 65, 107]):
        assert torch.equal(nearest(table, tokens, 7, special), whole[tokens])
    with torch.autocast("cpu"):
        assert torch.equal(nearest(table, torch.arange(300), 7, special), whole)
