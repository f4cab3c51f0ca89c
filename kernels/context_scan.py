"""context_scan on GPUs: the state of a context transform, walked in chunks of tokens.

The equations are in `fastperturb.ops.context_scan`. A program owns BH entries of a row's state and
walks its tokens BT at a time. Within a chunk h = k h_before + s is an associative scan over pairs
(k, s), so that a chunk takes log2 BT steps; from chunk to chunk it carries h. Each direction reads
its inputs once and writes its results once, 8 and 20 bytes an entry: memory bounds both where there
are programs enough, B H / BH of them. No atomics: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperturb.kernels import launch

_TOKENS, _ENTRIES, _WARPS = 64, 16, 4


@triton.jit
def _join(kept, added, kept_after, added_after):
    """Apply h -> kept h + added, then the same of the pair that comes after."""
    return kept * kept_after, added * kept_after + added_after


@triton.jit
def _entries(retain_ptr, initial_ptr, row, H: tl.constexpr, BH: tl.constexpr):
    """Return a program's entries: which, whether they exist, what they retain and start from."""
    b_h = tl.program_id(1) * BH + tl.arange(0, BH)
    b_some = b_h < H
    b_retain = tl.load(retain_ptr + b_h, mask=b_some, other=0.0)
    b_initial = tl.zeros([BH], tl.float32)
    if initial_ptr is not None:
        b_initial = tl.load(initial_ptr + row * H + b_h, mask=b_some, other=0.0)
    return b_h, b_some, b_retain, b_initial


@triton.jit
def _marks(starts_ptr, real_ptr, b_token, b_within):
    """Return where documents start, and where there is a token: [BT] each."""
    b_start = tl.zeros_like(b_within)
    b_real = b_within
    if starts_ptr is not None:
        b_start = tl.load(starts_ptr + b_token, mask=b_within, other=0) != 0
    if real_ptr is not None:
        b_real = b_within & (tl.load(real_ptr + b_token, mask=b_within, other=0) != 0)
    return b_start, b_real


@triton.jit
def _kept(b_retain, b_start, b_real):
    """Return the share of the state before it that each token keeps, [BT, BH]."""
    b_kept = tl.where(b_start[:, None], 0.0, b_retain[None, :])
    return tl.where(b_real[:, None], b_kept, 1.0)


@triton.jit(do_not_specialize=["T"])
def scan_kernel(
    states_ptr,  # [B, T, H]
    inputs_ptr,  # [B, T, H]
    retain_ptr,  # [H]
    starts_ptr,  # [B, T] or None
    real_ptr,  # [B, T] or None
    initial_ptr,  # [B, H] or None
    T,
    H: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b_h, b_some, b_retain, b_state = _entries(retain_ptr, initial_ptr, row, H, BH)
    for start in range(0, T, BT):
        b_t = start + tl.arange(0, BT)
        b_within = b_t < T
        b_start, b_real = _marks(starts_ptr, real_ptr, row * T + b_t, b_within)
        b_offset = (row * T + b_t)[:, None] * H + b_h[None, :]
        b_mask = b_within[:, None] & b_some[None, :]
        b_input = tl.load(inputs_ptr + b_offset, mask=b_mask, other=0.0)
        b_added = tl.where(b_real[:, None], (1.0 - b_retain)[None, :] * b_input, 0.0)
        b_kept, b_added = tl.associative_scan((_kept(b_retain, b_start, b_real), b_added), 0, _join)
        b_states = b_kept * b_state[None, :] + b_added
        tl.store(states_ptr + b_offset, b_states, mask=b_mask)
        # Tokens past the end keep the state, so the last of a chunk has it.
        b_is_last = tl.arange(0, BT) == BT - 1
        b_state = tl.sum(tl.where(b_is_last[:, None], b_states, 0.0), 0)


@triton.jit(do_not_specialize=["T"])
def scan_backward_kernel(
    grad_inputs_ptr,  # [B, T, H]
    grad_retain_ptr,  # [B, H]
    grad_ptr,  # [B, T, H]
    states_ptr,  # [B, T, H]
    inputs_ptr,  # [B, T, H]
    retain_ptr,  # [H]
    starts_ptr,  # [B, T] or None
    real_ptr,  # [B, T] or None
    initial_ptr,  # [B, H] or None
    T,
    H: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b_h, b_some, b_retain, b_initial = _entries(retain_ptr, initial_ptr, row, H, BH)
    b_through = tl.zeros([BH], tl.float32)  # the gradient of the state after a chunk
    b_of_retain = tl.zeros([BH], tl.float32)
    chunks = tl.cdiv(T, BT)
    for chunk in range(chunks):
        b_t = (chunks - 1 - chunk) * BT + tl.arange(0, BT)
        b_within = b_t < T
        b_start, b_real = _marks(starts_ptr, real_ptr, row * T + b_t, b_within)
        b_start_after, b_real_after = _marks(starts_ptr, real_ptr, row * T + b_t + 1, b_t + 1 < T)
        b_offset = (row * T + b_t)[:, None] * H + b_h[None, :]
        b_mask = b_within[:, None] & b_some[None, :]
        b_grad = tl.load(grad_ptr + b_offset, mask=b_mask, other=0.0)
        b_kept, b_added = tl.associative_scan(
            (_kept(b_retain, b_start_after, b_real_after), b_grad), 0, _join, reverse=True
        )
        b_throughs = b_kept * b_through[None, :] + b_added
        b_is_first = tl.arange(0, BT) == 0
        b_through = tl.sum(tl.where(b_is_first[:, None], b_throughs, 0.0), 0)

        b_throughs = tl.where(b_real[:, None] & b_some[None, :], b_throughs, 0.0)
        b_of_inputs = (1.0 - b_retain)[None, :] * b_throughs
        tl.store(grad_inputs_ptr + b_offset, b_of_inputs, mask=b_mask)
        b_has_before = b_mask & (b_t > 0)[:, None]
        b_before = tl.load(states_ptr + b_offset - H, mask=b_has_before, other=0.0)
        b_before = tl.where((b_t == 0)[:, None], b_initial[None, :], b_before)
        b_before = tl.where(b_start[:, None], 0.0, b_before)
        b_input = tl.load(inputs_ptr + b_offset, mask=b_mask, other=0.0)
        b_of_retain += tl.sum(b_throughs * (b_before - b_input), 0)
    tl.store(grad_retain_ptr + row * H + b_h, b_of_retain, mask=b_some)


def context_scan(
    inputs: Tensor,  # [B, T, H] fp32, contiguous; so are all others
    retain: Tensor,  # [H]
    starts: Tensor | None,  # [B, T]
    real: Tensor | None,  # [B, T]
    initial: Tensor | None,  # [B, H]
) -> Tensor:
    states = torch.empty_like(inputs)
    _start(scan_kernel, (inputs, retain, starts, real, initial), {"states_ptr": states})
    return states


def context_scan_backward(
    grad: Tensor,  # [B, T, H]
    states: Tensor,  # [B, T, H]
    inputs: Tensor,
    retain: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of inputs and of retain."""
    grad_inputs = torch.empty_like(inputs)
    grad_retain = inputs.new_empty((inputs.shape[0], inputs.shape[2]))
    results = {"grad_inputs_ptr": grad_inputs, "grad_retain_ptr": grad_retain}
    more = {**results, "grad_ptr": grad, "states_ptr": states}
    _start(scan_backward_kernel, (inputs, retain, starts, real, initial), more)
    return grad_inputs, grad_retain.sum(0)


def _start(
    kernel: triton.JITFunction, call: tuple[Tensor | None, ...], more: dict[str, Tensor]
) -> None:
    inputs, retain, starts, real, initial = call
    assert inputs is not None
    B, T, H = inputs.shape
    launch.start(
        kernel,
        (B, triton.cdiv(H, _ENTRIES)),
        {
            **more,
            "inputs_ptr": inputs,
            "retain_ptr": retain,
            "starts_ptr": None if starts is None else launch.as_bytes(starts),
            "real_ptr": None if real is None else launch.as_bytes(real),
            "initial_ptr": initial,
            "T": T,
            "H": H,
            "BT": _TOKENS,
            "BH": _ENTRIES,
        },
        num_warps=_WARPS,
    )
