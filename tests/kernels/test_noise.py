"""The Triton noise against its definition in fastperturb.noise."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_oracle import DEVICE, INTERPRETED, MARKS

from fastperturb import noise as definition
from fastperturb.config import GROUP_SIZES, LATENTS
from fastperturb.kernels import noise

pytestmark = MARKS

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), -81985529216486896)
# Latents of a program. Compile time grows faster: 256 x 256 take a GPU's compiler 12 s, 512 x 256
# take it 153 s. The interpreter likes few programs.
LATENTS_OF_A_PROGRAM = 2**16 if INTERPRETED else 2**12


@triton.jit
def philox_kernel(out_ptr, counter_ptr, seed_ptr, X: tl.constexpr):
    i = 4 * tl.arange(0, X)
    w0, w1, w2, w3 = noise.philox(
        tl.load(seed_ptr),
        tl.load(counter_ptr + i).to(tl.int32),
        tl.load(counter_ptr + i + 1).to(tl.int32),
        tl.load(counter_ptr + i + 2).to(tl.int32),
        tl.load(counter_ptr + i + 3).to(tl.int32),
    )
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + i + 1, w1.to(tl.int64))
    tl.store(out_ptr + i + 2, w2.to(tl.int64))
    tl.store(out_ptr + i + 3, w3.to(tl.int64))


@triton.jit
def latent_kernel(
    out_ptr,
    seed_ptr,
    sample_ptr,
    row_ptr,
    position_ptr,
    X: tl.constexpr,
    Q: tl.constexpr,
    LATENT: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    STRATA: tl.constexpr,
    FAST: tl.constexpr,
):
    i = tl.program_id(0) * X + tl.arange(0, X)
    pair, sign = noise.pair_and_sign(tl.load(sample_ptr + i).to(tl.int32), ANTITHETIC)
    z = noise.tile(
        tl.load(seed_ptr),
        tl.arange(0, Q),
        tl.load(position_ptr + i).to(tl.int32),
        pair,
        tl.load(row_ptr + i).to(tl.int32),
        sign,
        LATENT,
        STRATA,
        FAST,
    )
    tl.store(out_ptr + i[:, None] * (4 * Q) + tl.arange(0, 4 * Q)[None, :], z)


@triton.jit
def box_muller_kernel(out_ptr, word_ptr, X: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, X)
    radius, angle = tl.load(word_ptr + i), tl.load(word_ptr + X + i)
    z0, z1 = noise._box_muller(
        radius.to(tl.uint32, bitcast=True), angle.to(tl.uint32, bitcast=True), FAST
    )
    tl.store(out_ptr + i, z0)
    tl.store(out_ptr + X + i, z1)


def draw(
    numbers, width, *, latent, antithetic=False, strata=1, fast=not INTERPRETED, seed=SEEDS[-1]
):
    """z [tokens, width] of sample, row and position numbers [3, tokens]."""
    tokens = numbers.shape[1]
    X = min(tokens, LATENTS_OF_A_PROGRAM // width)
    assert tokens % X == 0
    out = torch.full((tokens, width), float("nan"), device=DEVICE)
    samples, rows, positions = numbers.to(DEVICE)
    seed = torch.tensor(seed, device=DEVICE)
    latent_kernel[(tokens // X,)](
        out, seed, samples, rows, positions, X, width // 4, latent, antithetic, strata, fast
    )
    return out.cpu()


def defined(numbers, width, *, latent, antithetic=False, strata=1, seed=SEEDS[-1]):
    samples, rows, positions = numbers  # X rows of one token
    return definition.draw_latent(
        torch.tensor(seed),
        samples[None],
        rows[:, None],
        positions[:, None],
        latent_dim=width,
        latent=latent,
        scope="token",
        antithetic=antithetic,
        strata=strata,
    )[0, :, 0]


def some_numbers(X=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2**32, (3, X), generator=generator)


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_gives_the_bits_of_the_definition_for_any_counter_mod_2_to_the_32(seed):
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, -1])
    counters = torch.cartesian_prod(edges, edges[::2], edges[1::2], edges[:4])  # 8 4 4 4
    out = torch.empty_like(counters, device=DEVICE)
    philox_kernel[(1,)](out, counters.to(DEVICE), torch.tensor(seed, device=DEVICE), len(counters))
    key = torch.tensor([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    assert torch.equal(out.cpu(), definition.philox(counters, key))


def test_philox_gives_the_bits_of_the_published_test_vector():
    counter = torch.tensor([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    seed = 0x299F31D0A4093822
    out = torch.empty_like(counter, device=DEVICE)
    philox_kernel[(1,)](out, counter.to(DEVICE), torch.tensor(seed, device=DEVICE), 1)
    assert out[0].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("latent", LATENTS)
def test_latents_are_within_4e_6_of_the_definition(latent):
    numbers = some_numbers()
    ours, expected = draw(numbers, 64, latent=latent), defined(numbers, 64, latent=latent)
    assert (ours - expected).abs().max() <= 4e-6
    assert expected.std() > 0.9


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("strata", GROUP_SIZES)
def test_stratified_latents_are_within_4e_6_of_the_definition(strata, latent):
    numbers = some_numbers()
    ours = draw(numbers, 16, latent=latent, strata=strata)
    expected = defined(numbers, 16, latent=latent, strata=strata)
    assert (ours - expected).abs().max() <= 4e-6
    assert torch.equal(ours > 0, expected > 0)


def test_an_odd_sample_is_the_negative_of_the_even_one_before_it():
    numbers = some_numbers()
    numbers[0] = torch.arange(256) + 2**32 - 128
    numbers[1:] = numbers[1:, :1]
    ours = draw(numbers, 16, latent="gaussian", antithetic=True)
    assert torch.equal(ours[1::2], -ours[0::2])
    expected = defined(numbers, 16, latent="gaussian", antithetic=True)
    assert (ours - expected).abs().max() <= 4e-6


def test_a_million_gaussians_have_a_standard_distribution_and_their_defined_values():
    numbers = torch.stack([torch.arange(4096) for _ in range(3)])
    ours = draw(numbers, 256, latent="gaussian")  # a million draws
    assert ours.isfinite().all() and 4.5 < ours.abs().max() < 6.8
    assert abs(ours.mean()) < 4e-3 and abs(ours.std() - 1) < 3e-3
    assert (ours - defined(numbers, 256, latent="gaussian")).abs().max() <= 4e-6


def test_the_extreme_philox_words_give_the_defined_finite_gaussians():
    edges = [0, 1, 2, 255, 2**26, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**26, 2**32 - 2**25]
    edges = torch.tensor([*edges, 2**32 - 2**12, 2**32 - 256, 2**32 - 9, 2**32 - 2, 2**32 - 1, 99])
    words = torch.cartesian_prod(edges, edges).T  # 2 256
    wrapped = (words - ((words >> 31) << 32)).to(torch.int32).contiguous()
    out = torch.full((2, 256), float("nan"), device=DEVICE)
    box_muller_kernel[(1,)](out, wrapped.to(DEVICE), 256, not INTERPRETED)
    expected = torch.stack(definition._box_muller(*words))
    assert out.isfinite().all()
    assert (out.cpu() - expected).abs().max() <= 4.5e-6
