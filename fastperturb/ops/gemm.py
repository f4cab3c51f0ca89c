"""The heads' matrix products, by the fastest library on the device.

On a CPU torch.mm calls MKL in fp32, which on AMD's processors reaches half of what oneDNN does
(190 against 380 GFLOP/s on two cores of an EPYC with AVX-512, for blocks of 1024 x 256 x 1024).
Torch ships oneDNN as well, and its compiler reaches it by the operator used here. (Products with
a side of 16 or 64, as in perturb_embed, gain nothing.) On a GPU 16-bit matrices give fp32
results, without a rounding in between.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [n, k] @ right [k, m] in their dtype; on a GPU, 16-bit inputs give fp32."""
    if left.device.type != "cpu":
        if left.dtype in (torch.float32, torch.float64):
            return torch.mm(left, right)
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float32 and left.numel() and right.numel() and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, in place."""
    if left.device.type == "cpu":
        total.add_(product(left, right))
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
