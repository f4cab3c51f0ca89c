"""The noise contract of `fastperturb.noise` as Triton device functions.

    w = Philox-4x32-10(key = seed (low, high), counter = (r // 4, t, m, b) mod 2^32)
    uniform     sqrt(3) (2u - 1),  u = (w + 1/2) 2^-32
    rademacher  +1 if the top bit of w is 0, else -1
    gaussian    sqrt(-2 ln u0) (cos, sin)(2 pi u1) on lanes (0, 1) and (2, 3)

Samples of stratified groups take u = (s + (w + 1/2) 2^-32) / G with the stratum s that the group's
own words deal to them, and gaussians by the inverse of the normal distribution function. In the
machine code of `draw_kernel` for sm_90 (Triton 3.6, all in registers) an independent gaussian costs
51 instructions and one of a group of 8 costs 111: each sample draws its group's words again, which
spares an exchange between programs.

The words are exact. Each 32 x 32 product is written as one 64-bit multiplication, of which
both halves are used: that compiles to one wide multiply where separate high and low halves
(`tl.philox`) take two, and the multiplies are most of the cost.

FAST=True takes logarithm, root, cosine and sine from the special function unit. Its cosine and
sine are good to 2^-20.9 on [-pi, pi], its logarithm to 2^-22 except near u = 1, where five
terms of the series take over, so fast gaussians stay within 4e-6 of the definition too.
FAST=False calls libm, which the interpreter needs and which is slow on a GPU: its argument
reduction lives in local memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastperturb import noise as definition
from fastperturb.kernels import maths

_UNIT = tl.constexpr(2.0**-32)
_TWO_PI = tl.constexpr(6.283185307179586)
_MINUS_TWO_LN2 = tl.constexpr(-1.3862943611198906)
_SQRT3 = tl.constexpr(1.7320508075688772)
_GROUP_BLOCK = tl.constexpr(1 << 31)
_FIELDS = tl.constexpr(definition.FIELDS)
_QUANTILE = tl.constexpr(definition.QUANTILE)
# Below this distance of u from 1 the series is as good as fp32 and the hardware logarithm is not.
_NEAR_ONE = tl.constexpr(2.0**-6)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """The four words of the counters, int32 or uint32 tensors of one shape; seed is int64."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1 = c0.to(tl.uint32, bitcast=True), c1.to(tl.uint32, bitcast=True)
    c2, c3 = c2.to(tl.uint32, bitcast=True), c3.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        product0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        product2 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        c0 = (product2 >> 32).to(tl.uint32) ^ c1 ^ low
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ high
        c1, c3 = product2.to(tl.uint32), product0.to(tl.uint32)
        low = tl.add(low, 0x9E3779B9, sanitize_overflow=False)
        high = tl.add(high, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def draw_quad(seed, quad, t, m, b, LATENT: tl.constexpr, STRATA: tl.constexpr, FAST: tl.constexpr):
    """The latents r = 4 quad + (0, 1, 2, 3) of counters of one shape, four fp32 tensors."""
    if STRATA > 1:
        s0, s1, s2, s3 = strata_quad(seed, quad, t, m, b, STRATA)
        w0, w1, w2, w3 = philox(seed, quad, t, m, b)
        z0 = _stratified(s0, w0, LATENT, STRATA, FAST)
        z1 = _stratified(s1, w1, LATENT, STRATA, FAST)
        z2 = _stratified(s2, w2, LATENT, STRATA, FAST)
        z3 = _stratified(s3, w3, LATENT, STRATA, FAST)
        return z0, z1, z2, z3
    w0, w1, w2, w3 = philox(seed, quad, t, m, b)
    if LATENT == "gaussian":
        z0, z1 = _box_muller(w0, w1, FAST)
        z2, z3 = _box_muller(w2, w3, FAST)
    elif LATENT == "uniform":
        z0, z1 = _uniform(w0, FAST), _uniform(w1, FAST)
        z2, z3 = _uniform(w2, FAST), _uniform(w3, FAST)
    else:
        tl.static_assert(LATENT == "rademacher", "unknown latent")
        z0, z1, z2, z3 = _rademacher(w0), _rademacher(w1), _rademacher(w2), _rademacher(w3)
    return z0, z1, z2, z3


@triton.jit
def tile(
    seed,
    quad,  # [Q] int32
    t,  # [X] int32
    m,  # [X] int32, the pair's number if antithetic
    b,  # [X] int32
    factor,  # [X] fp32: the sign, or 0 for a token that keeps its embedding
    LATENT: tl.constexpr,
    STRATA: tl.constexpr,
    FAST: tl.constexpr,
):
    """factor z [X, 4 Q] of X tokens; the four lanes of a quad are side by side."""
    X: tl.constexpr = t.shape[0]
    Q: tl.constexpr = quad.shape[0]
    c0 = tl.broadcast_to(quad[None, :], [X, Q])
    c1 = tl.broadcast_to(t[:, None], [X, Q])
    c2 = tl.broadcast_to(m[:, None], [X, Q])
    c3 = tl.broadcast_to(b[:, None], [X, Q])
    z0, z1, z2, z3 = draw_quad(seed, c0, c1, c2, c3, LATENT, STRATA, FAST)
    scale = factor[:, None]
    even = tl.join(z0 * scale, z2 * scale)
    odd = tl.join(z1 * scale, z3 * scale)
    return tl.reshape(tl.join(even, odd), [X, 4 * Q])


@triton.jit
def pair_and_sign(m, ANTITHETIC: tl.constexpr):
    """The sample number that keys the latent, and its sign: sample 2j + 1 is minus sample 2j."""
    if ANTITHETIC:
        return m & -2, (1 - 2 * (m & 1)).to(tl.float32)
    return m, tl.full(m.shape, 1.0, tl.float32)


@triton.constexpr_function
def _degree(strata):
    """k of a group of 2^k samples."""
    return strata.bit_length() - 1


@triton.jit
def strata_quad(seed, quad, t, m, b, STRATA: tl.constexpr):
    """The strata of the latents r = 4 quad + (0, 1, 2, 3), four uint32 tensors."""
    DEGREE: tl.constexpr = _degree(STRATA)
    number = m.to(tl.uint32, bitcast=True)
    block = quad.to(tl.uint32, bitcast=True) | _GROUP_BLOCK
    g0, g1, g2, g3 = philox(seed, block, t, number >> DEGREE, b)
    member = number & (STRATA - 1)
    s0, s1 = _stratum(g0, member, STRATA), _stratum(g1, member, STRATA)
    s2, s3 = _stratum(g2, member, STRATA), _stratum(g3, member, STRATA)
    return s0, s1, s2, s3


@triton.jit
def _stratum(group_word, member, STRATA: tl.constexpr):
    """The stratum a j xor c of member j of a group, by the group's own word; all are uint32."""
    DEGREE: tl.constexpr = _degree(STRATA)
    POLYNOMIAL: tl.constexpr = _FIELDS[DEGREE]
    result = group_word & (STRATA - 1)
    factor = (tl.mul(group_word >> 8, STRATA - 1, sanitize_overflow=False) >> 24) + 1
    for bit in tl.static_range(DEGREE):
        result = result ^ tl.where((member >> bit) & 1 != 0, factor, 0)
        factor = factor << 1
        factor = tl.where(factor >> DEGREE != 0, factor ^ POLYNOMIAL, factor)
    return result


@triton.jit
def _stratified(b_stratum, word, LATENT: tl.constexpr, STRATA: tl.constexpr, FAST: tl.constexpr):
    """The latent at u = (stratum + (w + 1/2) 2^-32) / STRATA."""
    SHARE: tl.constexpr = 1.0 / STRATA
    if LATENT == "gaussian":
        # v is measured from the nearer end of (0, 1).
        upper = b_stratum >= STRATA // 2
        b_from_end = tl.where(upper, (STRATA - 1) - b_stratum, b_stratum)
        b_word = tl.where(upper, word ^ 0xFFFFFFFF, word)
        return _quantile((b_from_end.to(tl.float32) + _unit(b_word, FAST)) * SHARE, upper, FAST)
    elif LATENT == "uniform":
        u = (b_stratum.to(tl.float32) + _unit(word, FAST)) * SHARE
        return (2.0 * u - 1.0) * _SQRT3
    else:
        tl.static_assert(LATENT == "rademacher", "unknown latent")
        return tl.where(b_stratum >= STRATA // 2, -1.0, 1.0)


@triton.jit
def _quantile(v, upper, FAST: tl.constexpr):
    """The inverse of the normal distribution function at v <= 1/2, or at 1 - v if upper."""
    x = 1.0 - 2.0 * v
    from_one = x * x
    central = v > 0.25
    squared = _minus_two_log(
        tl.where(central, 1.0 - from_one, 4.0 * v * (1.0 - v)), from_one, central, FAST
    )
    share = squared / (squared + 8.0)
    polynomial = tl.full(share.shape, _QUANTILE[7], tl.float32)
    for i in tl.static_range(7):
        polynomial = polynomial * share + _QUANTILE[6 - i]
    if FAST:
        z = maths.approx("sqrt", squared) * polynomial
    else:
        z = tl.sqrt(squared) * polynomial
    return tl.where(upper, z, -z)


@triton.jit
def _unit(word, FAST: tl.constexpr):
    if FAST:  # one fused operation
        return word.to(tl.float32) * _UNIT + _UNIT * 0.5
    else:
        return (word.to(tl.float32) + 0.5) * _UNIT


@triton.jit
def _uniform(word, FAST: tl.constexpr):
    return (2.0 * _unit(word, FAST) - 1.0) * _SQRT3


@triton.jit
def _rademacher(word):
    return 1.0 - 2.0 * (word >> 31).to(tl.float32)


@triton.jit
def _box_muller(radius_word, angle_word, FAST: tl.constexpr):
    signed = radius_word.to(tl.int32, bitcast=True)
    upper = signed < 0
    # u on the lower half, 1 - u on the upper (its word is ~w): where fp32 is finest.
    distance = _unit(signed ^ (signed >> 31), FAST)
    # A signed angle word keeps |angle| <= pi, where fp32 is twice as fine.
    turn = angle_word.to(tl.int32, bitcast=True).to(tl.float32)
    squared = _minus_two_log(tl.where(upper, 1.0 - distance, distance), distance, upper, FAST)
    if FAST:
        angle = turn * (_TWO_PI * _UNIT) + (_TWO_PI * _UNIT * 0.5)
        radius = maths.approx("sqrt", squared)
        return radius * maths.approx("cos", angle), radius * maths.approx("sin", angle)
    else:
        angle = (turn + 0.5) * (_TWO_PI * _UNIT)
        radius = tl.sqrt(squared)
        return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _minus_two_log(u, from_one, upper, FAST: tl.constexpr):
    """-2 ln u; where `upper` is true u = 1 - from_one, with from_one at most 1/2."""
    if FAST:
        series = from_one * (2.0 + from_one * (1.0 + from_one * (2.0 / 3.0 + from_one * 0.5)))
        near_one = upper & (from_one < _NEAR_ONE)
        return tl.where(near_one, series, maths.approx("lg2", u) * _MINUS_TWO_LN2)
    else:
        log_u = tl.where(upper, _log1m(tl.where(upper, from_one, 0.25)), tl.log(u))
        return tl.maximum(-2.0 * log_u, 0.0)


@triton.jit
def _log1m(x):
    """ln(1 - x) for x in [0, 1/2]; where 1 - x rounds, log(y) x / (1 - y) undoes the rounding."""
    y = 1.0 - x
    return tl.where(y == 1.0, -x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, 1.0 - y)))
