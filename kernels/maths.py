"""The arithmetic that kernels share: products of known precision, tanh and gelu.

Products accumulate in fp32. Of an fp32 table they run as three tf32 products (error 2^-21 of a
term, below what the noise contract grants z). Of a 16-bit table

* `dot` rounds both operands to tf32: 2^-12 of a term, where bf16 rounds the result by 2^-9 and
  fp16 by 2^-12;
* `dot_exact` keeps an operand that is 16-bit already and splits the other into two 16-bit terms;
* `dot_narrow` rounds both to the table's dtype, as autocast would, where the flops are many.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(b_a, b_b, b_sum, DTYPE: tl.constexpr):
    """b_sum + b_a b_b to the precision of tf32, for an fp32 table of fp32."""
    b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    if DTYPE.is_fp32():
        return tl.dot(b_a, b_b, b_sum, input_precision="tf32x3")
    else:
        return tl.dot(_tf32(b_a), _tf32(b_b), b_sum, input_precision="tf32")


@triton.jit
def dot_exact(b_a, b_b, b_sum, DTYPE: tl.constexpr):
    """b_sum + b_a b_b where one operand is fp32 and the other of the table's dtype."""
    if DTYPE.is_fp32():
        return dot(b_a, b_b, b_sum, DTYPE)
    elif b_a.dtype == tl.float32:
        b_high, b_low = _two_terms(b_a, DTYPE)
        return tl.dot(b_high, b_b, tl.dot(b_low, b_b, b_sum))
    else:
        b_high, b_low = _two_terms(b_b, DTYPE)
        return tl.dot(b_a, b_high, tl.dot(b_a, b_low, b_sum))


@triton.jit
def dot_narrow(b_a, b_b, b_sum, DTYPE: tl.constexpr):
    """b_sum + b_a b_b with both operands rounded to the table's dtype."""
    if DTYPE.is_fp32():
        return dot(b_a, b_b, b_sum, DTYPE)
    else:
        return tl.dot(b_a.to(DTYPE), b_b.to(DTYPE), b_sum)


@triton.jit
def _tf32(x):
    """x rounded to tf32, which the tensor cores would otherwise truncate to."""
    bits = x.to(tl.int32, bitcast=True)
    b_rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, b_rounded, x)  # a GPU's own NaN, 0x7fffffff, would round to -0


@triton.jit
def _two_terms(x, DTYPE: tl.constexpr):
    """x as the sum of two 16-bit terms."""
    b_high = x.to(DTYPE)
    return b_high, (x - b_high.to(tl.float32)).to(DTYPE)


@triton.jit
def tanh(x):
    """tanh to 2 ulp, so that a soft-capped logit is as good as an fp32 one of any size.

    Near 0 the exponential form cancels; x + x^3 P(x^2) was fitted there, to 1.5e-8 relative.
    """
    b_square = x * x
    b_series = -0.0530454926 + b_square * 0.0172414873
    b_series = -0.3333314359 + b_square * (0.1332587898 + b_square * b_series)
    b_decay = tl.exp(-2.0 * tl.abs(x))
    b_far = 1.0 - 2.0 * b_decay / (1.0 + b_decay)
    b_far = tl.where(x < 0, -b_far, b_far)
    return tl.where(tl.abs(x) < 0.5, x + x * b_square * b_series, b_far)


@triton.jit
def tanh_for_a_gate(x):
    """tanh within 2^-22 absolutely, which is all that 1 + tanh can hold; `tanh` would spill there.

    It saturates at 1, since exp overflows to inf, which the quotient turns into 0.
    """
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def gelu_and_slope(x):
    """x Phi(x) and its derivative Phi(x) + x phi(x), sharing one exponential.

    Phi by the rational form 7.1.26 of Abramowitz and Stegun, within 1e-7: a quarter of libm's
    erf in instructions.
    """
    b_density = tl.exp2(x * x * -0.7213475204444817)
    b_t = 1.0 / (1.0 + tl.abs(x) * 0.23164189)
    b_tail = 0.7107068705 + b_t * (-0.7265760135 + b_t * 0.5307027145)
    b_tail = b_t * (0.127414796 + b_t * (-0.142248368 + b_t * b_tail))
    b_tail = b_tail * b_density
    b_cdf = tl.where(x < 0, b_tail, 1.0 - b_tail)
    return x * b_cdf, b_cdf + x * b_density * 0.3989422804014327


@triton.jit
def gelu(x):
    b_value, _ = gelu_and_slope(x)
    return b_value


@triton.jit
def approx(NAME: tl.constexpr, x):
    """An approximation by the special function unit: lg2, ex2, sqrt, sin or cos."""
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
