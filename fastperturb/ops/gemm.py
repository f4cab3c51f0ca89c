"""The heads' matrix products, by the fastest library on the device, accumulated in fp32.

On a CPU torch.mm calls MKL in fp32, which on AMD's processors reaches half of what oneDNN does
(190 against 380 GFLOP/s on two cores of an EPYC with AVX-512, for blocks of 1024 x 256 x 1024).
Torch ships oneDNN as well, and its compiler reaches it by the operator used here. (Products with
a side of 16 or 64, as in perturb_embed, gain nothing.)

On a GPU 16-bit matrices give fp32 results, without a rounding in between, and fp32 matrices are
multiplied in full precision, whatever `torch.set_float32_matmul_precision` allows the model.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_cublas_settings = threading.Lock()

# Operands in fp16 are made this large: fp16 has no number above 65504, and none but 0 below 6e-8,
# where most gradients of logits lie.
_FP16_SIZE = 2.0**14


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left [n, k] @ right [k, m], in fp32 for 16-bit inputs; `out` is memory for it."""
    if left.device.type == "cpu":
        result = _cpu_product(left, right)
        return result if out is None else out.copy_(result)
    with _full_precision(left):
        if left.dtype in (torch.float32, torch.float64):
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=torch.float32, out=out)


def add_product(
    total: Tensor | None, left: Tensor, right: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return total + left @ right in total's memory; the first term, without a total, in `out`."""
    if total is None:
        return product(left, right, out)
    if left.device.type == "cpu":
        return total.add_(_cpu_product(left, right))
    with _full_precision(left):
        if total.dtype == left.dtype:
            return total.addmm_(left, right)
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a product of matrices in this one."""
    return torch.promote_types(dtype, torch.float32)


def lift(dtype: torch.dtype) -> float:
    """Return the factor that operands of up to 1 take in this dtype; 1 but for fp16."""
    return _FP16_SIZE if dtype == torch.float16 else 1.0


def lift_to(dtype: torch.dtype, bounds: Callable[[], Tensor]) -> Tensor | None:
    """Return the power of two, [], that operands of up to bounds() take in this dtype.

    None but for fp16. Bounds that are not finite do not count. Nothing waits for the device.
    """
    if dtype != torch.float16:
        return None
    values = bounds()
    if not values.numel():
        return None
    largest = values.abs().nan_to_num(nan=0.0, posinf=0.0).amax().clamp_min(2.0**-80)
    mantissa, _ = torch.frexp(largest)
    return _FP16_SIZE * (mantissa / largest)


def lowered(value: Tensor, lift: Tensor | None) -> Tensor:
    """Undo the lift of an operand in its product."""
    return value if lift is None else value / lift


def _cpu_product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.float(), right.float()
    if left.dtype == torch.float32 and left.numel() and right.numel() and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
def _full_precision(matrix: Tensor) -> Iterator[None]:
    """Override settings of torch, all process-wide, while a product is handed to cuBLAS.

    tf32 would leave 10 bits of an fp32 matrix. TunableOp rejects 16-bit inputs with fp32 results,
    and so does torch where `allow_fp16_accumulation` is set.
    """
    if matrix.device.type != "cuda" or matrix.dtype == torch.float64:
        yield
        return
    override = _without_tf32 if matrix.dtype == torch.float32 else _with_fp32_results
    # The lock: one thread could restore what another has overridden.
    with _cublas_settings, override():
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Raise fp32_precision; torch rejects a look at allow_tf32 where that has been set apart."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before in ("ieee", "none"):
        yield
        return
    # A setting that is inherited from CUDA's other operators is to go on following them.
    inherited = torch.backends.cudnn.fp32_precision == before
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none" if inherited else before


@contextlib.contextmanager
def _with_fp32_results() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    if before:
        matmul.allow_fp16_accumulation = False
    try:
        with _without_tunable():
            yield
    finally:
        if before:
            matmul.allow_fp16_accumulation = True


@contextlib.contextmanager
def _without_tunable() -> Iterator[None]:
    tunable = torch.cuda.tunable
    if not tunable.is_enabled():
        yield
        return
    tunable.enable(False)
    try:
        if tunable.is_enabled():
            raise RuntimeError(
                "PYTORCH_TUNABLEOP_ENABLED=1 leaves no product of 16-bit matrices with an fp32 "
                "result: unset it and call torch.cuda.tunable.enable(), which is paused for them"
            )
        yield
    finally:
        tunable.enable(True)
