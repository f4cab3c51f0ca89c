"""Sizes, checks and the start of a kernel: the parts that all launchers share."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

# Arguments that vary from batch to batch, for `do_not_specialize`: without it Triton would compile
# a kernel again for values that are 1 or multiples of 16. A kernel need not have all of them.
VARYING = [
    *("M", "N", "B", "T", "vocab", "stride_m", "stride_b", "stride_t"),
    *("samples_stride_m", "samples_stride_b", "row_ids_stride_b", "row_ids_stride_t"),
    *("positions_stride_b", "positions_stride_t", "segment_tokens", "slab_tokens"),
    *("mean_stride_b", "mean_stride_t"),
    *("sample_tokens", "coordinate_tokens", "part_samples"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {DTYPES}, got {value.dtype}")


def start(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: int) -> None:
    """Launch a kernel, unless its grid is empty.

    Every launch goes through here, so that a test can compile what would be launched.
    """
    if all(grid):
        like = next(value for value in arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(like):  # Triton launches on the current device
            kernel[grid](**arguments, **options)


def block(size: int, limit: int) -> int:
    """Return the block for a dimension of a product: a power of two from 16 to `limit`."""
    return max(16, min(limit, triton.next_power_of_2(size)))


def warps(elements: int, *, per_thread: int, limit: int = 32) -> int:
    """Return the number of warps of a program that keeps so many elements in registers."""
    return max(1, min(limit, elements // (32 * per_thread)))


def as_bytes(mask: Tensor) -> Tensor:
    """Return a bool tensor as kernels read it."""
    return mask.contiguous().view(torch.uint8)


def has_fast_maths() -> bool:
    """Return True on a GPU; the interpreter has no special function unit."""
    return not triton.knobs.runtime.interpret


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; elsewhere those of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device, num_warps: int) -> int:
    """Return the programs that fill a GPU twice, where each multiprocessor holds 16 warps of them.

    Enough to even out their times, and few enough that partial sums cost little.
    """
    return multiprocessors(device) * max(1, 16 // num_warps) * 2


def capability(device: torch.device) -> int:
    """Return the major compute capability; the interpreter takes Hopper's tile sizes."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
