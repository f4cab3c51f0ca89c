"""combine on GPUs: M log-probs of a token, or of a sequence, to one value and their weights.

The equations are in `fastperturb.ops.combine`. A program holds the log-probs of BN tokens as a
tile [BM, BN], BM the power of two from M on, with tokens on the fast axis, so that reads and writes
are dense; or it sums one sequence's [M, T] first and holds [BM, 1]. For each labelled token it
reads M floats once and writes M + 3, in one launch, with about 10 M operations (30 M for the
jackknife): memory bounds it.

Sequences are summed, and differences between their sums taken, in fp64: in fp32 a sum of thousands
is rounded by more than the samples differ by.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch

# The log-prob of an impossible label, so that weights stay finite.
_LOWEST = tl.constexpr(-1e30)
# A thread holds up to 16 log-probs, or 8 where the jackknife holds many more tiles of that size.
_WARPS, _TILE, _JACKKNIFE_TILE = 8, 4096, 2048


@triton.jit
def _bounded(b_l, b_m, M):
    """Log-probs [BM, BN] with a floor; samples from M on are left out of every sum and maximum."""
    b_l = tl.where(b_l < _LOWEST, _LOWEST, b_l)
    return tl.where(b_m < M, b_l, float("-inf"))


@triton.jit
def _weights(b_l, b_m, M, ESTIMATOR: tl.constexpr):
    """From log-probs [BM, BN]: value, iwae's value and effective samples [BN], weights [BM, BN].

    b_m [BM, 1] numbers the samples. Both values are differences to the largest log-prob.
    """
    count = M.to(tl.float32)
    b_peak = tl.max(b_l, 0)[None, :]
    b_w = tl.exp(b_l - b_peak)
    b_total = tl.sum(b_w, 0)
    b_w = b_w / b_total[None, :]
    b_marginal = tl.log(b_total) - tl.log(count)
    b_effective = 1.0 / tl.sum(b_w * b_w, 0)
    b_value = b_marginal
    if ESTIMATOR == "jensen":
        b_real = b_m < M
        b_value = tl.sum(tl.where(b_real, b_l - b_peak, 0.0), 0) / count
        b_w = tl.where(b_real, 1.0 / count, 0.0) + tl.zeros_like(b_l)
    elif ESTIMATOR != "iwae":
        tl.static_assert(ESTIMATOR == "jvi" or ESTIMATOR == "jvi_clip", "unknown estimator")
        share = (count - 1.0) / count
        b_is_peak = b_m == tl.argmax(b_l, 0)[None, :]
        # 1 - w of the peak is a sum over the others, scaled by the largest of them.
        b_others = tl.where(b_is_peak, float("-inf"), b_l)
        b_second = tl.max(b_others, 0)[None, :]
        b_rest = tl.exp(b_others - b_second)
        b_rest_total = tl.sum(b_rest, 0)
        b_log_rest = tl.sum(b_second - b_peak, 0) + tl.log(b_rest_total) - tl.log(b_total)
        b_minor = tl.where(b_is_peak, 0.0, b_w)
        b_odds = b_minor / (1.0 - b_minor)
        b_other_odds = tl.sum(b_odds, 0)[None, :] - b_odds
        b_logs = tl.sum(tl.log(1.0 - b_minor), 0) + b_log_rest
        b_value = b_marginal + (count - 1.0) * tl.log(share) - share * b_logs
        b_lead = tl.where(b_is_peak, 2.0 - 1.0 / count, 3.0 - 2.0 / count)
        b_w = b_w * (b_lead - share * b_other_odds) - share * b_rest / b_rest_total[None, :]
        if ESTIMATOR == "jvi_clip":
            b_w = tl.where(b_w < 0.0, 0.0, b_w)
            b_w = b_w / tl.sum(b_w, 0)[None, :]
    return b_value, b_marginal, b_effective, b_w


@triton.jit
def _store(
    value_ptr,
    log_marginal_ptr,
    effective_ptr,
    weights_ptr,
    b_value,
    b_marginal,
    b_effective,
    b_w,
    b_labelled,
    b_m,
    b_n,
    M,
    N,
):
    """Store the results of labelled tokens, 0 for the others."""
    b_live = b_n < N
    tl.store(value_ptr + b_n, tl.where(b_labelled, b_value, 0.0), mask=b_live)
    tl.store(log_marginal_ptr + b_n, tl.where(b_labelled, b_marginal, 0.0), mask=b_live)
    tl.store(effective_ptr + b_n, tl.where(b_labelled, b_effective, 0.0), mask=b_live)
    b_offset = b_m.to(tl.int64) * N + b_n[None, :]
    b_w = tl.where(b_labelled[None, :], b_w, 0.0)
    tl.store(weights_ptr + b_offset, b_w, mask=(b_m < M) & b_live[None, :])


@triton.jit(do_not_specialize=launch.VARYING)
def token_kernel(
    value_ptr,  # [N], N = B T; so are the next two
    log_marginal_ptr,
    effective_ptr,
    weights_ptr,  # [M, N]
    log_probs_ptr,  # [M, B, T]
    mask_ptr,  # [N]
    M,
    N,
    T,
    stride_m,
    stride_b,
    stride_t,
    ESTIMATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    b_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_m = tl.arange(0, BM)[:, None]
    b_labelled = tl.load(mask_ptr + b_n, mask=b_n < N, other=0) != 0
    b_offset = (b_n // T).to(tl.int64) * stride_b + (b_n % T).to(tl.int64) * stride_t
    b_offset = b_m.to(tl.int64) * stride_m + b_offset[None, :]
    b_known = (b_m < M) & b_labelled[None, :]
    b_l = _bounded(tl.load(log_probs_ptr + b_offset, mask=b_known, other=0.0), b_m, M)
    b_peak = tl.max(b_l, 0)
    b_value, b_marginal, b_effective, b_w = _weights(b_l, b_m, M, ESTIMATOR)
    _store(
        value_ptr,
        log_marginal_ptr,
        effective_ptr,
        weights_ptr,
        b_value + b_peak,
        b_marginal + b_peak,
        b_effective,
        b_w,
        b_labelled,
        b_m,
        b_n,
        M,
        N,
    )


@triton.jit(do_not_specialize=launch.VARYING)
def sequence_kernel(
    value_ptr,  # [B]; so are the next two
    log_marginal_ptr,
    effective_ptr,
    weights_ptr,  # [M, B]
    log_probs_ptr,  # [M, B, T]
    mask_ptr,  # [B, T]
    M,
    B,
    T,
    stride_m,
    stride_b,
    stride_t,
    ESTIMATOR: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    b_m = tl.arange(0, BM)[:, None]
    b_sums = tl.zeros([BM, BT], tl.float64)
    b_any = tl.zeros([BT], tl.int1)
    for start in range(0, T, BT):
        b_t = start + tl.arange(0, BT)
        b_labelled = tl.load(mask_ptr + b * T + b_t, mask=b_t < T, other=0) != 0
        b_offset = b_m.to(tl.int64) * stride_m + b_t.to(tl.int64)[None, :] * stride_t
        b_known = (b_m < M) & b_labelled[None, :]
        b_l = tl.load(log_probs_ptr + b * stride_b + b_offset, mask=b_known, other=0.0)
        b_sums += b_l.to(tl.float64)
        b_any = b_any | b_labelled
    b_sum = _bounded(tl.sum(b_sums, 1)[:, None], b_m, M)
    b_peak = tl.max(b_sum, 0)
    b_l = (b_sum - b_peak[None, :]).to(tl.float32)
    b_value, b_marginal, b_effective, b_w = _weights(b_l, b_m, M, ESTIMATOR)
    _store(
        value_ptr,
        log_marginal_ptr,
        effective_ptr,
        weights_ptr,
        (b_value + b_peak).to(tl.float32),
        (b_marginal + b_peak).to(tl.float32),
        b_effective,
        b_w,
        tl.max(b_any.to(tl.int32), 0) != 0,
        b_m,
        b + tl.arange(0, 1),
        M,
        B,
    )


def combine(
    log_probs: Tensor,  # [M, B, T] fp32
    mask: Tensor,  # [B, T]
    estimator: str,
    marginal: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, log marginal and effective samples [B, T] or [B], and weights [M, ...]."""
    M, B, T = log_probs.shape
    shape = (M, B, T) if marginal == "token" else (M, B)
    value, log_marginal, effective = (log_probs.new_empty(shape[1:]) for _ in range(3))
    weights = log_probs.new_empty(shape)
    BM = triton.next_power_of_2(M)
    tile = _JACKKNIFE_TILE if estimator in ("jvi", "jvi_clip") else _TILE
    arguments: dict[str, Any] = {
        "value_ptr": value,
        "log_marginal_ptr": log_marginal,
        "effective_ptr": effective,
        "weights_ptr": weights,
        "log_probs_ptr": log_probs,
        "mask_ptr": launch.as_bytes(mask),
        "M": M,
        "T": T,
        "stride_m": log_probs.stride(0),
        "stride_b": log_probs.stride(1),
        "stride_t": log_probs.stride(2),
        "ESTIMATOR": estimator,
        "BM": BM,
    }
    if marginal == "token":
        BN = max(1, min(128, tile // BM))
        programs = triton.cdiv(B * T, BN)
        arguments |= {"N": B * T, "BN": BN}
        launch.start(token_kernel, (programs,), arguments, num_warps=_WARPS)
    else:
        arguments |= {"B": B, "BT": max(1, _TILE // BM)}
        launch.start(sequence_kernel, (B,), arguments, num_warps=_WARPS)
    return value, log_marginal, effective, weights
