import itertools
import math

import pytest
import torch
from philox_vectors import KNOWN_ANSWERS

from fastperturb import noise
from fastperturb.config import GROUP_SIZES

LATENTS = ("gaussian", "uniform", "rademacher")


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    assert noise.philox(torch.tensor(counter), torch.tensor(key)).tolist() == list(words)


def test_counters_and_keys_count_modulo_two_to_the_32():
    beyond = noise.philox(torch.tensor([1, -1, 2**32 + 5, 7]), torch.tensor([-2, 2**40 + 3]))
    within = noise.philox(torch.tensor([1, 2**32 - 1, 5, 7]), torch.tensor([2**32 - 2, 3]))
    assert torch.equal(beyond, within)


def scalar_latent(seed, m, b, t, r, latent):
    """Compute one number of the contract in double precision."""
    words = noise.philox(
        torch.tensor([r // 4, t, m, b]), torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
    ).tolist()
    if latent == "uniform":
        return math.sqrt(3) * (2 * (words[r % 4] + 0.5) / 2**32 - 1)
    if latent == "rademacher":
        return -1.0 if words[r % 4] >= 2**31 else 1.0
    pair = r % 4 // 2 * 2
    radius = math.sqrt(-2 * math.log((words[pair] + 0.5) / 2**32))
    angle = 2 * math.pi * (words[pair + 1] + 0.5) / 2**32
    return radius * (math.sin(angle) if r % 2 else math.cos(angle))


@pytest.mark.parametrize("latent", LATENTS)
def test_latents_follow_the_contract_number_by_number(latent):
    seed, (M, B, T, R) = 0x1234_5678_9ABC_DEF0, (2, 3, 2, 7)
    z = noise.latent(seed, (M, B, T, R), latent=latent)
    for m, b, t, r in itertools.product(range(M), range(B), range(T), range(R)):
        expected = scalar_latent(seed, m, b, t, r, latent)
        assert z[m, b, t, r].item() == pytest.approx(expected, abs=4e-6)


def test_gaussians_are_finite_and_accurate_at_the_extreme_words():
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    radius, angle = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    cosine, sine = noise._box_muller(radius, angle)
    u = (radius.double() + 0.5) / 2**32
    true_radius = torch.where(
        radius < 2**31, (-2 * u.log()), -2 * torch.log1p(-((2**32 - 1 - radius) + 0.5) / 2**32)
    ).sqrt()
    turn = 2 * math.pi * (angle.double() + 0.5) / 2**32
    assert (cosine - true_radius * turn.cos()).abs().max() < 4e-6
    assert (sine - true_radius * turn.sin()).abs().max() < 4e-6
    assert torch.stack([cosine, sine]).abs().max() < 6.8


@pytest.mark.parametrize(
    ("latent", "kurtosis"), [("gaussian", 3), ("uniform", 1.8), ("rademacher", 1)]
)
def test_latents_have_the_moments_of_their_distribution(latent, kurtosis):
    z = noise.latent(7, (64, 8, 64, 16), latent=latent).double()
    count = z.numel()
    assert z.mean().abs() < 5 / math.sqrt(count)
    assert (z.square().mean() - 1).abs() < 5 * math.sqrt(2 / count)
    assert (z**4).mean() == pytest.approx(kurtosis, rel=0.02)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("axis", range(4))
def test_neighbours_along_every_axis_are_uncorrelated(latent, axis):
    z = noise.latent(11, (32, 16, 32, 16), latent=latent)
    left = z.narrow(axis, 0, z.shape[axis] - 1)
    right = z.narrow(axis, 1, z.shape[axis] - 1)
    assert (left * right).mean().abs() < 5 / math.sqrt(left.numel())


def test_different_seeds_give_unrelated_noise():
    one, other = (noise.latent(seed, (32, 8, 32, 16)) for seed in (1, 1 + 2**32))
    assert (one * other).mean().abs() < 5 / math.sqrt(one.numel())


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_any_part_of_the_noise_can_be_drawn_alone(latent, scope):
    whole = noise.latent(3, (6, 5, 4, 9), latent=latent, scope=scope)
    samples, rows = torch.tensor([4, 1]), torch.tensor([3, 0, 2])
    positions = torch.tensor([[2, 3]]).expand(3, -1)
    part = noise.latent(
        3, (2, 3, 2, 9), latent=latent, scope=scope, samples=samples, rows=rows, positions=positions
    )
    assert torch.equal(part, whole[samples][:, rows][:, :, 2:4])


def test_each_row_may_use_its_own_samples_and_documents():
    whole = noise.latent(3, (6, 5, 4, 3))
    samples = torch.tensor([[0, 5], [2, 2], [4, 1]])  # (M, B)
    rows = torch.tensor([[1, 1, 4], [3, 0, 0]])  # (B, T): packed documents
    positions = torch.tensor([[0, 1, 0], [3, 0, 1]])
    z = noise.latent(3, (3, 2, 3, 3), samples=samples, rows=rows, positions=positions)
    for m, b, t in itertools.product(range(3), range(2), range(3)):
        expected = whole[samples[m, b], rows[b, t], positions[b, t]]
        assert torch.equal(z[m, b, t], expected)


def test_a_longer_latent_starts_with_the_shorter_one():
    assert torch.equal(noise.latent(5, (2, 2, 2, 13))[..., :6], noise.latent(5, (2, 2, 2, 6)))


def test_sequence_scope_repeats_the_first_position():
    z = noise.latent(5, (3, 2, 4, 5), scope="sequence")
    first = noise.latent(5, (3, 2, 1, 5))
    assert torch.equal(z, first.expand_as(z))


def test_antithetic_samples_come_in_opposite_pairs():
    z = noise.latent(5, (6, 2, 3, 5), antithetic=True)
    plain = noise.latent(5, (6, 2, 3, 5))
    assert torch.equal(z[0::2], plain[0::2])
    assert torch.equal(z[1::2], -z[0::2])


def test_an_antithetic_sample_keeps_its_sign_when_drawn_alone():
    whole = noise.latent(5, (6, 2, 3, 5), antithetic=True)
    alone = noise.latent(5, (1, 2, 3, 5), samples=torch.tensor([3]), antithetic=True)
    assert torch.equal(alone[0], whole[3])


def test_a_seed_may_be_a_tensor_or_an_unsigned_int():
    as_tensor = noise.latent(torch.tensor(-3), (1, 1, 2, 4))
    assert torch.equal(as_tensor, noise.latent(2**64 - 3, (1, 1, 2, 4)))


def test_auxiliary_uniforms_lie_inside_the_unit_interval_and_follow_the_row():
    seed = torch.tensor(9)
    u = noise.auxiliary_uniforms(seed, 64, torch.arange(256))
    assert u.min() > 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(noise.auxiliary_uniforms(seed, 64, torch.tensor([17]))[:, 0], u[:, 17])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": "normal"}, "latent must be one of"),
        ({"scope": "word"}, "scope must be one of"),
        ({"antithetic": True}, "samples must be even with antithetic=True, got 3"),
        ({"samples": torch.zeros(3)}, r"samples must be int64 \[M\] or \[M, B\]"),
        ({"samples": torch.arange(2)}, r"samples must number 3"),
        ({"rows": torch.arange(3)}, r"rows must be int64 \[B\] or \[B, T\] = \[2\] or \[2, 4\]"),
        ({"positions": torch.arange(4)}, r"positions must be int64 \[B, T\] = \[2, 4\]"),
        ({"seed": 2**64}, "seed must be an int of 64 bits"),
        ({"seed": torch.tensor(1.0)}, "seed must be an int or one int64"),
        ({"shape": (3, 2, 4, 0)}, r"shape must be \(M, B, T, R\) with R >= 1"),
    ],
)
def test_bad_arguments_raise_by_name(changes, message):
    arguments = {"seed": 0, "shape": (3, 2, 4, 5), **changes}
    with pytest.raises(ValueError, match=message):
        noise.latent(**arguments)


def product(a, j, polynomial):
    """Return a j over GF(2^k) by long division of the product of polynomials."""
    degree = polynomial.bit_length() - 1
    value = 0
    for bit in range(degree):
        value ^= (a << bit) * (j >> bit & 1)
    while value.bit_length() > degree:
        value ^= polynomial << value.bit_length() - 1 - degree
    return value


def scalar_stratified_latent(seed, m, b, t, r, latent, strata):
    """Compute one number of the stratified contract, gaussians by fp64's own quantile."""
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
    (word,), (group_word,) = (
        noise.philox(torch.tensor(counter), key)[r % 4 : r % 4 + 1].tolist()
        for counter in ([r // 4, t, m, b], [r // 4 + 2**31, t, m // strata, b])
    )
    shift, factor = group_word % strata, 1 + ((group_word >> 8) * (strata - 1) >> 24)
    stratum = product(factor, m % strata, noise.FIELDS[strata.bit_length() - 1]) ^ shift
    u = (stratum + (word + 0.5) / 2**32) / strata
    if latent == "uniform":
        return math.sqrt(3) * (2 * u - 1)
    if latent == "rademacher":
        return 1.0 if u < 0.5 else -1.0
    return quantile(u)


def quantile(u):
    return torch.special.ndtri(torch.tensor(u, dtype=torch.float64)).item()


@pytest.mark.parametrize("strata", [2, 16, 256])
@pytest.mark.parametrize("latent", LATENTS)
def test_stratified_latents_follow_the_contract_number_by_number(latent, strata):
    seed, (M, B, T, R) = 0x1234_5678_9ABC_DEF0, (2 * strata, 2, 2, 5)
    z = noise.latent(seed, (M, B, T, R), latent=latent, strata=strata)
    for m, b, t, r in itertools.product((0, 1, strata - 1, M - 2), range(B), range(T), range(R)):
        expected = scalar_stratified_latent(seed, m, b, t, r, latent, strata)
        assert z[m, b, t, r].item() == pytest.approx(expected, abs=4e-6)


@pytest.mark.parametrize("strata", GROUP_SIZES)
def test_stratified_gaussians_are_accurate_in_every_stratum_and_at_the_extreme_words(strata):
    words = torch.tensor([0, 1, 2, 255, 2**20, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    stratum, word = torch.cartesian_prod(torch.arange(strata), words).T
    z = noise._stratified_gaussian(stratum, word, strata).double()
    upper = stratum >= strata // 2  # where fp64 would round 1 - u
    v = torch.where(upper, strata - 1 - stratum, stratum) + 0.0
    v = (v + (torch.where(upper, 2**32 - 1 - word, word) + 0.5) / 2**32) / strata
    exact = torch.special.ndtri(v) * torch.where(upper, -1, 1)
    assert (z - exact).abs().max() < 4e-6
    assert z.abs().max() < 7.2


@pytest.mark.parametrize("degree", range(1, 9))
def test_the_permutations_of_strata_are_pairwise_independent(degree):
    """Over all factors and shifts each pair of samples has each pair of distinct strata once."""
    size, polynomial = 2**degree, noise.FIELDS[degree]
    table = torch.tensor(
        [[product(a, j, polynomial) for j in range(size)] for a in range(1, size)]
    )  # a j
    for factors in table:
        assert factors.unique().numel() == size
    for other in (1, size - 1):  # samples 0 and `other`
        pairs = set()
        for row in table.tolist():
            pairs |= {(row[0] ^ c, row[other] ^ c) for c in range(size)}
        assert len(pairs) == size * (size - 1)


@pytest.mark.parametrize("strata", GROUP_SIZES)
def test_a_group_has_one_sample_in_each_stratum(strata):
    z = noise.latent(5, (2 * strata, 3, 2, 5), latent="uniform", strata=strata)
    u = (z.double() / math.sqrt(3) + 1) / 2
    stratum = (u * strata).floor().clamp_max(strata - 1).unflatten(0, (2, strata))
    expected = torch.arange(strata, dtype=torch.float64).view(1, strata, 1, 1, 1)
    assert torch.equal(stratum.sort(1).values, expected.expand_as(stratum))


@pytest.mark.parametrize("strata", [2, 8, 256])
@pytest.mark.parametrize(
    ("latent", "kurtosis"), [("gaussian", 3), ("uniform", 1.8), ("rademacher", 1)]
)
def test_a_single_stratified_sample_has_the_law_of_its_distribution(latent, kurtosis, strata):
    sample = torch.tensor([strata + 1])
    z = noise.latent(7, (1, 32, 64, 64), latent=latent, samples=sample, strata=strata).double()
    count = z.numel()
    assert z.mean().abs() < 5 / math.sqrt(count)
    assert (z.square().mean() - 1).abs() < 5 * math.sqrt(2 / count)
    spread = float((z**4).std()) / math.sqrt(count)
    assert (z**4).mean() == pytest.approx(kurtosis, abs=5 * spread + 1e-6)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_stratified_latents_of_different_rows_positions_and_coordinates_are_uncorrelated(
    latent, axis
):
    z = noise.latent(11, (32, 16, 32, 16), latent=latent, strata=8)
    left = z.narrow(axis, 0, z.shape[axis] - 1)
    right = z.narrow(axis, 1, z.shape[axis] - 1)
    assert (left * right).mean().abs() < 5 / math.sqrt(left.numel())
    groups = z.unflatten(0, (4, 8))
    apart = (groups[0] * groups[1]).mean()
    assert apart.abs() < 5 / math.sqrt(groups[0].numel())
    # Within a group samples repel each other: E[z_i z_j] = -(1 - E[mean z^2 | strata]) / (G - 1).
    assert (groups[:, 0] * groups[:, 1]).mean() < -0.1


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_any_part_of_the_stratified_noise_can_be_drawn_alone(latent, scope):
    whole = noise.latent(3, (8, 5, 4, 9), latent=latent, scope=scope, strata=4)
    samples = torch.tensor([[6, 1, 3], [1, 1, 7]])  # (M, B)
    rows = torch.tensor([[3, 3], [0, 1], [2, 2]])  # (B, T): packed documents
    positions = torch.tensor([[2, 3], [1, 0], [0, 3]])
    part = noise.latent(
        3, (2, 3, 2, 6), latent=latent, scope=scope, strata=4,
        samples=samples, rows=rows, positions=positions,
    )  # fmt: skip
    for m, b, t in itertools.product(range(2), range(3), range(2)):
        position = positions[b, t] if scope == "token" else 0
        assert torch.equal(part[m, b, t], whole[samples[m, b], rows[b, t], position, :6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strata": 3}, "strata must be 1 .* or one of"),
        ({"strata": 512}, "strata must be 1 .* or one of"),
        ({"strata": 4}, "samples must be a multiple of strata=4, got 6"),
        ({"strata": 2, "antithetic": True}, "either antithetic=True or strata=2"),
    ],
)
def test_strata_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        noise.latent(0, (6, 2, 3, 4), **changes)
