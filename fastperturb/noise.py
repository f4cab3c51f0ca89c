"""The noise contract: z[m, b, t, r] is a pure function of (seed, m, b, t, r).

Philox-4x32-10 (Salmon et al., 2011) with the 64-bit seed as the key (low word, high word)
and the counter (r // 4, t, m, b); latent r takes lane r % 4 of the four output words w.

    uniform     sqrt(3) (2u - 1),  u = (w + 1/2) 2^-32
    rademacher  +1 if the top bit of w is 0, else -1
    gaussian    Box-Muller on lanes (0, 1) and (2, 3), cosine first

Stratified samples come in groups of G = 2^k, k = 1..8: sample m is number j = m mod G of group
m // G. Within a group the G strata of (0, 1) are dealt out by a permutation of its own for every
(b, t, r), pairwise independent: s = a j xor c over GF(2^k), modulo `FIELDS[k]`. With v the lane
r % 4 of the block with the counter (r // 4 + 2^31, t, m // G, b),

    c = v mod G,  a = 1 + floor(floor(v / 2^8) (G - 1) / 2^24)

and the sample's own w places it inside its stratum:

    u           (s + (w + 1/2) 2^-32) / G
    uniform     sqrt(3) (2u - 1)
    rademacher  +1 if u < 1/2, else -1
    gaussian    the inverse of the normal distribution function at u

A single sample has the same law either way. A group has one sample in each stratum.

m, b and t are numbers given by the caller, never loop indices, so the noise does not depend
on tiling, micro-batches, ranks or on which pass draws it. The words are the same bits on
every backend; this file is the definition that the C++ and Triton versions are tested against.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastperturb.config import GROUP_SIZES, LATENTS, SCOPES

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Sample numbers never reach this one, so random numbers that are not latents (which samples to run
# backward, which level to telescope to) take it as their m and share no counter with a latent.
_AUXILIARY_SAMPLE = _WORD
# The block numbers r // 4 of latents stay below this bit, which marks a group's own block.
_GROUP_BLOCK = 1 << 31
# The irreducible polynomials of the fields GF(2^k), k = 0..8, a bit a coefficient.
FIELDS = (0b1, 0b11, 0b111, 0b1011, 0b10011, 0b100101, 0b1000011, 0b10000011, 0b100011011)
# The inverse normal distribution function at u = v or 1 - v, v <= 1/2: -+q P(q^2 / (q^2 + 8)) with
# q^2 = -2 ln(4 v (1 - v)). The coefficients of P, lowest first, are a minimax fit for
# v >= 2^-41 that is good to 1.5e-6.
QUANTILE = (
    0.8862251270853458,
    0.04212094886404203,
    0.030528105440190374,
    0.08575752667691486,
    -0.2316465484484066,
    0.5729471920348647,
    -0.6643732588295643,
    0.2759865173191161,
)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox-4x32-10: counter [..., 4] and key [..., 2], int64 holding uint32, to [..., 4]."""
    for name, value, lanes in (("counter", counter, 4), ("key", key, 2)):
        if value.dtype != torch.int64 or value.ndim == 0 or value.shape[-1] != lanes:
            raise ValueError(
                f"{name} must be int64 of shape [..., {lanes}], "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
    words = [word & _WORD for word in counter.unbind(-1)]
    return torch.stack(torch.broadcast_tensors(*_philox_words(words, key.unbind(-1))), dim=-1)


def _philox_words(words: list[Tensor], key: tuple[Tensor, ...]) -> list[Tensor]:
    low, high = (word & _WORD for word in key)
    c0, c1, c2, c3 = words
    for _ in range(_ROUNDS):
        # The 64-bit products wrap into the sign; shift-and-mask still yields both halves.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product2 >> 32) & _WORD ^ c1 ^ low, (product0 >> 32) & _WORD ^ c3 ^ high
        c1, c3 = product2 & _WORD, product0 & _WORD
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def latent(
    seed: int | Tensor,
    shape: tuple[int, int, int, int],
    *,
    latent: str = "gaussian",
    scope: str = "token",
    samples: int | Tensor | None = None,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    antithetic: bool = False,
    strata: int = 1,
) -> Tensor:
    """Draw the latents z [M, B, T, R] in fp32, on the device of the numbers (else the seed's).

    samples: the sample numbers m, an int M (0..M-1), [M] or [M, B]; default 0..M-1.
    rows: the numbers b, [B] or [B, T]; default 0..B-1.
    positions: the numbers t, [B, T]; default 0..T-1. `scope="sequence"` uses t = 0.
    antithetic: sample number 2j + 1 is the negative of sample number 2j.
    strata: the number G of samples in a stratified group; 1 draws them independently.
    """
    if latent not in LATENTS:
        raise ValueError(f"latent must be one of {LATENTS}, got {latent!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if len(shape) != 4 or any(size < 0 for size in shape) or shape[3] < 1:
        raise ValueError(f"shape must be (M, B, T, R) with R >= 1, got {tuple(shape)}")
    tensors = [x for x in (samples, rows, positions, seed) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    num_samples, batch, length, latent_dim = shape
    m, b, t = counters(
        num_samples if samples is None else samples,
        rows,
        positions,
        (batch, length),
        antithetic=antithetic,
        strata=strata,
        device=device,
    )
    if m.shape[0] != num_samples:
        raise ValueError(f"samples must number {num_samples} (shape[0]), got {m.shape[0]}")
    return draw_latent(
        seed_tensor(seed, device),
        m,
        b,
        t,
        latent_dim=latent_dim,
        latent=latent,
        scope=scope,
        antithetic=antithetic,
        strata=strata,
    )


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The 64-bit seed as an int64 of shape [] on `device`; an int may be signed or unsigned."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed must be an int or one int64, got {seed.dtype} of shape {list(seed.shape)}"
            )
        return seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an int of 64 bits or an int64 tensor, got {seed!r}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    # A fill: to copy a number to a GPU would wait for all that it has to do.
    return torch.full((), signed, dtype=torch.int64, device=device)


def drawn_seed(generator: torch.Generator | None = None) -> Tensor:
    """Draw a seed from torch's default generator, or from the one given: int64 [] on the CPU."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator)


def fold_in(seed: int | Tensor, number: int) -> Tensor:
    """The seed of part `number` (a training step, say) of what `seed` keys: int64, on its device.

    Parts share no stream with each other; their order and count are free.
    """
    key = seed_tensor(seed, seed.device if isinstance(seed, Tensor) else torch.device("cpu"))
    words = torch.tensor([number & _WORD, number >> 32 & _WORD], device=key.device)
    auxiliary = torch.full_like(key, _AUXILIARY_SAMPLE)
    low, high, *_ = _philox_words([*words, auxiliary, auxiliary], (key, key >> 32))
    return low | high << 32


def counters(
    samples: int | Tensor,
    rows: Tensor | None,
    positions: Tensor | None,
    shape: tuple[int, int],
    *,
    antithetic: bool = False,
    strata: int = 1,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers m [M, B], b [B, T] and t [B, T] of a call, validated and broadcast (views)."""
    check_strata(strata)
    if antithetic and strata > 1:
        raise ValueError(f"use either antithetic=True or strata={strata}, not both")
    batch, length = shape
    if isinstance(samples, Tensor):
        M = samples.shape[0] if samples.ndim else "M"
        allowed = [[M], [M, batch]]
        _require_numbers("samples", samples, allowed, device, "[M] or [M, B]")
    elif isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(f"samples must be a number M or an int64 tensor, got {samples!r}")
    elif antithetic and samples % 2:
        raise ValueError(f"samples must be even with antithetic=True, got {samples}")
    elif samples % strata:
        raise ValueError(f"samples must be a multiple of strata={strata}, got {samples}")
    else:
        samples = torch.arange(samples, device=device)
    if samples.ndim == 1:
        samples = samples[:, None].expand(-1, batch)
    if rows is None:
        rows = torch.arange(batch, device=device)
    else:
        _require_numbers("rows", rows, [[batch], [batch, length]], device, "[B] or [B, T]")
    if rows.ndim == 1:
        rows = rows[:, None].expand(-1, length)
    if positions is None:
        positions = torch.arange(length, device=device).expand(batch, -1)
    else:
        _require_numbers("positions", positions, [[batch, length]], device, "[B, T]")
    return samples, rows, positions


def _require_numbers(
    name: str, value: Tensor, shapes: list[list[Any]], device: torch.device, wanted: str
) -> None:
    if value.dtype != torch.int64 or list(value.shape) not in shapes or value.device != device:
        sizes = " or ".join(str(shape) for shape in shapes)
        raise ValueError(
            f"{name} must be int64 {wanted} = {sizes} on {device}, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )


def draw_latent(
    seed: Tensor,
    samples: Tensor,  # [M, B]
    rows: Tensor,  # [B, T]
    positions: Tensor,  # [B, T]
    *,
    latent_dim: int,
    latent: str,
    scope: str,
    antithetic: bool,
    strata: int,
) -> Tensor:
    """Do the work of `latent` after validation: z [M, B, T, R] in fp32 for counters laid out."""
    num_samples, (batch, length) = samples.shape[0], positions.shape
    if scope == "sequence":
        positions = torch.zeros_like(positions)
    pair = samples - samples % 2 if antithetic else samples
    blocks = torch.arange((latent_dim + 3) // 4, device=seed.device)
    counter = [
        blocks,
        positions[None, :, :, None],
        pair[:, :, None, None],
        rows[None, :, :, None],
    ]
    key = seed, seed >> 32
    words = _philox_words([word & _WORD for word in counter], key)
    if strata == 1:
        lanes = _DISTRIBUTIONS[latent](words)
    else:
        number = samples[:, :, None, None] & _WORD
        counter[0], counter[2] = blocks | _GROUP_BLOCK, number // strata
        group_words = _philox_words([word & _WORD for word in counter], key)
        lanes = [
            _STRATIFIED[latent](_stratum(group_word, number % strata, strata), word, strata)
            for group_word, word in zip(group_words, words, strict=True)
        ]
    z = torch.stack(lanes, dim=-1)  # (M, B, T, ceil(R / 4), 4)
    z = z.reshape(num_samples, batch, length, 4 * len(blocks))[..., :latent_dim]
    if antithetic:
        z = z * (1 - 2 * (samples % 2))[:, :, None, None]
    return z


def auxiliary_uniforms(seed: Tensor, draws: int, rows: Tensor) -> Tensor:
    """Uniforms on (0, 1) [draws, B], one stream a row, that no latent shares."""
    counter = [
        torch.zeros((), dtype=torch.int64, device=seed.device),
        torch.arange(draws, device=seed.device)[:, None],
        torch.full((), _AUXILIARY_SAMPLE, device=seed.device),
        rows & _WORD,
    ]
    return _unit(_philox_words(counter, (seed, seed >> 32))[0]).clamp_max(1 - 2**-24)


def _unit(word: Tensor) -> Tensor:
    return (word.to(torch.float32) + 0.5) * 2.0**-32


def _uniform(words: list[Tensor]) -> list[Tensor]:
    return [math.sqrt(3.0) * (2.0 * _unit(word) - 1.0) for word in words]


def _rademacher(words: list[Tensor]) -> list[Tensor]:
    return [1.0 - 2.0 * (word >> 31).to(torch.float32) for word in words]


def _gaussian(words: list[Tensor]) -> list[Tensor]:
    return [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # Near u = 1 the rounding of u to fp32 would eat ln u: measure from 1 instead.
    from_one = _unit(_WORD - radius_word)
    log_u = torch.where(radius_word >> 31 == 1, torch.log1p(-from_one), _unit(radius_word).log())
    radius = (-2.0 * log_u).clamp_min(0.0).sqrt()
    # A signed angle word keeps |angle| <= pi, where fp32 is twice as fine.
    signed = angle_word - ((angle_word >> 31) << 32)
    angle = (signed.to(torch.float32) + 0.5) * (2.0 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


_DISTRIBUTIONS = {"gaussian": _gaussian, "uniform": _uniform, "rademacher": _rademacher}


def check_strata(strata: int) -> None:
    """Raise unless a group can have this many samples: 1 for independent ones, or 2^k, k = 1..8."""
    if strata not in GROUP_SIZES and strata != 1:
        raise ValueError(
            f"strata must be 1 (independent samples) or one of {GROUP_SIZES}, got {strata!r}"
        )


def _stratum(group_word: Tensor, member: Tensor, strata: int) -> Tensor:
    """The stratum s = a j xor c of member j of a group, by the group's own word."""
    shifted = group_word & (strata - 1)
    factor = 1 + ((group_word >> 8) * (strata - 1) >> 24)
    degree = strata.bit_length() - 1
    for bit in range(degree):
        shifted = shifted ^ factor * (member >> bit & 1)
        factor = factor << 1
        factor = factor ^ FIELDS[degree] * (factor >> degree)
    return shifted


def _stratified_uniform(stratum: Tensor, word: Tensor, strata: int) -> Tensor:
    u = (stratum.to(torch.float32) + _unit(word)) / strata
    return math.sqrt(3.0) * (2.0 * u - 1.0)


def _stratified_rademacher(stratum: Tensor, word: Tensor, strata: int) -> Tensor:
    return 1.0 - 2.0 * (stratum >= strata // 2).to(torch.float32)


def _stratified_gaussian(stratum: Tensor, word: Tensor, strata: int) -> Tensor:
    # Measure v from the nearer end of (0, 1), where fp32 is finest.
    upper = stratum >= strata // 2
    stratum = torch.where(upper, strata - 1 - stratum, stratum)
    word = torch.where(upper, _WORD - word, word)
    v = (stratum.to(torch.float32) + _unit(word)) / strata
    # Near 1/2 the rounding of 4 v (1 - v) would eat its logarithm: measure from 1 there.
    from_one = (1.0 - 2.0 * v).square()
    log = torch.where(v > 0.25, torch.log1p(-from_one), (4.0 * v * (1.0 - v)).log())
    square = (-2.0 * log).clamp_min(0.0)
    share = square / (square + 8.0)
    polynomial = torch.full_like(share, QUANTILE[-1])
    for coefficient in QUANTILE[-2::-1]:
        polynomial = polynomial * share + coefficient
    z = square.sqrt() * polynomial
    return torch.where(upper, z, -z)


_STRATIFIED = {
    "gaussian": _stratified_gaussian,
    "uniform": _stratified_uniform,
    "rademacher": _stratified_rademacher,
}
