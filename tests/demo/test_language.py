"""The synthetic language: its truth against simulation, and its embeddings."""

import math

import numpy as np
import pytest
import torch
from demo_cases import all_prefixes, seeded

from fastperturb.demo import language


@pytest.fixture(scope="module")
def world() -> language.Language:
    return language.make_language(seeded())


def test_the_truth_sums_to_one() -> None:
    sums = language.truth(all_prefixes()).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


# One prefix of each kind: far in support, at its edge (where g has its kink), in each band.
@pytest.mark.parametrize("columns", [(0, 3), (6, 6), (6, 7), (9, 10)])
def test_the_exact_distribution_is_the_mean_over_sampled_noise(columns: tuple[int, int]) -> None:
    count, rng = 200_000, np.random.default_rng(0)
    grid = np.linspace(-1, 1, 12)
    u, v = (np.array([grid[column], grid[row]]) for column, row in zip(columns, (2, 9)))
    s = (u[0] + rng.normal(0, 0.3, count) + v[0] + rng.normal(0, 0.3, count)) / 2
    centre = 0.9 * np.clip(np.where(s < 0, 0.3 * s, 1.2 * s), -1, 1)
    weight = np.exp(-((grid - centre[:, None]) ** 2) / (2 * 0.09**2))
    p_a = weight / weight.sum(1, keepdims=True)  # (count, 12)
    weight = np.exp(-((grid - (u[1] + v[1]) / 2) ** 2) / (2 * 0.09**2))
    p_b = weight / weight.sum()
    standard_error = np.outer(p_a.std(0), p_b) / math.sqrt(count)

    prefix = torch.tensor([[columns[0] * 12 + 2, columns[1] * 12 + 9]])
    counts = language.truth(prefix)[0].reshape(12, 12).numpy()
    assert (abs(counts - np.outer(p_a.mean(0), p_b)) < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("first", [5, 6])
def test_a_contextual_truth_is_noisy_after_a_token_of_one_half(first: int) -> None:
    prefix = torch.tensor([[0 * 12 + first, 6 * 12 + 3, 7 * 12 + 8]])
    ours = language.truth(prefix, contextual=True)
    sd = 0.3 if first >= 6 else 0.0  # the positions along the precise axis are -0.09 and 0.09
    assert torch.equal(ours, language.truth(prefix[:, 1:], sd))
    assert not torch.allclose(ours, language.truth(prefix[:, 1:], 0.3 - sd))
    counts = language.sample(prefix.expand(20_000, 3), seeded(), contextual=True).bincount(
        minlength=language.VOCAB
    )
    assert (counts - 20_000 * ours[0]).abs().max() < 5 * math.sqrt(20_000) / 2


def test_samples_follow_the_truth() -> None:
    prefix, count = torch.tensor([[80, 91]]), 100_000
    counts = language.sample(prefix.expand(count, 2), seeded()).bincount(minlength=language.VOCAB)
    expected = language.truth(prefix)[0] * count
    common = expected > 5
    chi_square = ((counts - expected).square() / expected)[common].sum().item()
    assert chi_square < common.sum() + 5 * math.sqrt(2 * common.sum())
    assert counts[~common].sum() < expected[~common].sum() + 30


def test_embeddings_are_grid_positions_on_two_orthonormal_axes_plus_small_ids(
    world: language.Language,
) -> None:
    torch.testing.assert_close(world.axes @ world.axes.T, torch.eye(2), atol=1e-5, rtol=0)
    positions = torch.cartesian_prod(language.grid(), language.grid()).float()
    ids = world.embeddings - positions @ world.axes
    assert ids.std().item() == pytest.approx(0.03, rel=0.05)
    assert (world.embeddings @ world.axes.T - positions).abs().max() < 0.15


def test_another_seed_makes_another_language(world: language.Language) -> None:
    other = language.make_language(seeded(1))
    assert (world.axes @ other.axes.T).abs().max() < 0.95
    assert not torch.equal(world.embeddings, other.embeddings)


def test_bands_share_no_token_with_the_support_and_lie_beyond_it() -> None:
    support, *bands = (
        set(language.tokens_between(*ends).tolist()) for ends in language.REGIONS.values()
    )
    assert max(support) < min(bands[0]) <= max(bands[0]) < min(bands[1])
    assert [len(tokens) // language.SIDE for tokens in (support, *bands)] == [7, 1, 2]
