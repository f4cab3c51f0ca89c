"""KL by rank: against explicit projections, in sample and held out."""

import math

import numpy as np
import pytest
import torch

from fastperturb.rank.measure import kl_by_rank, singular_values, spectrum, truncation


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make blocks small: several of futures, of rows, and parts of them."""
    monkeypatch.setattr(singular_values, "BLOCK", 400)
    monkeypatch.setattr(truncation, "_COLUMNS", 30)
    monkeypatch.setattr(truncation, "_CACHED", 0)


def logits(shape, seed=0, rank=None, centred=True):
    random = np.random.default_rng(seed)
    rank = min(shape[0], 8) if rank is None else rank
    rows = random.standard_normal((shape[0], rank))
    values = np.einsum("hr,rfk->hfk", rows, random.standard_normal((rank, *shape[1:])))
    return values - values.mean(-1, keepdims=True) * centred


def mean_kl(values, truncated):
    """The mean KL(softmax(values) || softmax(truncated)) by its definition."""
    p, q = (torch.as_tensor(logits).log_softmax(-1) for logits in (values, truncated))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("shape", [(90, 7, 11), (200, 5, 12), (90, 2, 31)])
def test_kl_is_that_of_the_distributions_of_the_truncated_svd(shape):
    values = logits(shape) + 0.3 * np.random.default_rng(1).standard_normal(shape)
    left, size, right = np.linalg.svd(values.reshape(shape[0], -1), full_matrices=False)
    ranks = [0, 1, 3, 8, 20, 60]
    curve = kl_by_rank(values, spectrum(values), ranks=ranks)
    truncated = [((left[:, :r] * size[:r]) @ right[:r]).reshape(shape) for r in ranks]
    expected = [mean_kl(values, cut) for cut in truncated]
    np.testing.assert_allclose(curve.kl[:-1], expected[:-1], rtol=1e-9)
    np.testing.assert_allclose(curve.kl[-1], expected[-1], atol=1e-12)
    assert curve.ranks == ranks and not curve.held_out


def test_rank_0_is_the_uniform_distribution_and_full_rank_loses_nothing():
    values = logits((40, 5, 10)).astype(np.float32)
    curve = kl_by_rank(values, spectrum(values))
    log_p = torch.as_tensor(values, dtype=torch.float64).log_softmax(-1)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    assert curve.ranks[:4] == [0, 1, 2, 4]
    assert curve.kl[0] == pytest.approx(math.log(10) - entropy)
    assert curve.kl[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_matrix_of_exact_rank_needs_that_rank_for_its_own_and_other_histories(rank):
    values = logits((60, 6, 12), rank=rank)
    seen, unseen = values[:25], values[25:]
    for curve in (
        kl_by_rank(values, spectrum(values), ranks=[rank - 1, rank]),
        kl_by_rank(unseen, spectrum(seen), ranks=[rank - 1, rank], learned_from=seen),
    ):
        assert curve.kl[0] > 0.01
        assert curve.kl[1] == pytest.approx(0, abs=1e-12)


def test_held_out_rows_are_projected_by_least_squares_on_the_directions_of_the_others():
    shape, ranks = (90, 5, 12), [0, 2, 8, 30]
    values = logits(shape) + 0.3 * np.random.default_rng(1).standard_normal(shape)
    seen, unseen = values[:50], values[50:]
    curve = kl_by_rank(unseen, spectrum(seen), ranks=ranks, learned_from=seen)
    right = np.linalg.svd(seen.reshape(50, -1), full_matrices=False)[2]
    expected = []
    for rank in ranks:
        weights = np.linalg.lstsq(right[:rank].T, unseen.reshape(40, -1).T)[0]
        expected.append(mean_kl(unseen, (weights.T @ right[:rank]).reshape(unseen.shape)))
    np.testing.assert_allclose(curve.kl, expected, rtol=1e-9)
    assert curve.held_out


def test_directions_that_histories_do_not_share_help_in_sample_only():
    values = 2 * np.random.default_rng(0).standard_normal((60, 20, 12))
    seen, unseen = values[:30], values[30:]
    own = kl_by_rank(seen, spectrum(seen), ranks=[0, 30])
    other = kl_by_rank(unseen, spectrum(seen), ranks=[0, 30], learned_from=seen)
    assert own.kl[1] == pytest.approx(0, abs=1e-12)
    assert other.kl[1] > 0.7 * other.kl[0]


def test_a_constant_added_to_the_logits_of_a_pair_changes_nothing_at_full_rank():
    values = logits((30, 4, 9))
    shifted = values + 50 * np.random.default_rng(2).standard_normal((30, 4, 1))
    curve = kl_by_rank(shifted, spectrum(shifted), ranks=[0, 12])  # 8 + one a future
    assert curve.kl[0] == pytest.approx(kl_by_rank(values, spectrum(values), ranks=[0]).kl[0])
    assert curve.kl[1] == pytest.approx(0, abs=1e-12)


def test_errors_name_the_ranks_and_the_shapes():
    values = logits((30, 4, 9))
    own = spectrum(values)
    for ranks in ([], [-1], [3, 2], [1, 1], [9]):
        with pytest.raises(ValueError, match="ranks must rise from 0 or more to at most 8"):
            kl_by_rank(values, own, ranks=ranks)
    with pytest.raises(ValueError, match=r"spectrum is of \[30, 4, 9\], values are \[20, 4, 9\]"):
        kl_by_rank(values[:20], own)
    with pytest.raises(ValueError, match="the same futures and tokens"):
        kl_by_rank(values[:, :3], own, learned_from=values)
