"""Predicted times: of a kernel launch from its code, of torch's own kernels from their shapes.

    time = max(bytes / bandwidth, flops / rate, instructions / issue rate)

Nothing here has been measured. Bytes are those that must go through DRAM: every tensor of a launch
once, apart from the exceptions below. Instructions are counted in the machine code, loops times
their trips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.ahead_of_time import Launch
from bench.kernels import sass

BANDWIDTHS = (3.0e12, 4.3e12)  # bytes a second that a copy reaches on an H100 and on an H200
FLOPS = 700e12  # a second, of large products of 16-bit numbers
MULTIPROCESSORS = 132
ISSUE = MULTIPROCESSORS * 4 * 1.75e9  # instructions a second that warps issue: 4 a clock

Arguments = dict[str, Any]


class Cost(NamedTuple):
    """The work of one launch, or of many."""

    bytes: float = 0
    flops: float = 0
    instructions: float = 0  # of warps

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(mine + more for mine, more in zip(self, other, strict=True)))

    def milliseconds(self, bandwidth: float) -> float:
        return 1e3 * max(self.seconds(bandwidth).values())

    def seconds(self, bandwidth: float) -> dict[str, float]:
        """Return the time that each limit allows."""
        return {
            "memory": self.bytes / bandwidth,
            "products": self.flops / FLOPS,
            "instructions": self.instructions / ISSUE,
        }

    @property
    def limit(self) -> str:
        seconds = self.seconds(BANDWIDTHS[0])
        return max(seconds, key=seconds.__getitem__)


def of_launch(launched: Launch, compiled_kernel: Any) -> Cost:
    """Return the cost of a launch of one of our kernels."""
    name, arguments = launched.kernel.fn.__name__, launched.arguments
    trips = _TRIPS[name](arguments) if name in _TRIPS else ()
    warps = math.prod(launched.grid) * compiled_kernel.metadata.num_warps
    return Cost(
        bytes=_bytes(name, arguments),
        flops=_FLOPS[name](arguments) if name in _FLOPS else 0,
        instructions=warps * sass.issued(compiled_kernel, trips),
    )


class TorchCosts(TorchDispatchMode):
    """Collects what torch's own kernels cost in a call: products, and all others by their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Cost] = []
        self.others: list[Cost] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or "empty" in func.__name__:
            return result
        inputs = () if func in _GATHERS else (args, kwargs)  # those read as much as they write
        leaves = (leaf for leaf in tree_leaves((inputs, result)) if isinstance(leaf, Tensor))
        tensors = {id(leaf): leaf for leaf in leaves}.values()
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if func in _PRODUCTS:
            *_, left, right = (arg for arg in args if isinstance(arg, Tensor))
            self.products.append(Cost(moved, _tiled_flops(left, right)))
        else:
            self.others.append(Cost(moved))
        return result


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.mm.dtype,
    torch.ops.aten.mm.dtype_out,
    torch.ops.aten.addmm_.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm.out,
    torch.ops.aten.addmm.dtype,
    torch.ops.aten.addmm.dtype_out,
}
_GATHERS = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.embedding.default,
}


def _tiled_flops(left: Tensor, right: Tensor) -> float:
    """Return 2 n k m, scaled by the idle share of the last wave of 128 x 256 tiles."""
    n, k = left.shape
    m = right.shape[1]
    tiles = math.ceil(n / 128) * math.ceil(m / 256)
    waves = math.ceil(tiles / MULTIPROCESSORS)
    idle = waves * MULTIPROCESSORS / tiles if waves > 1 else 1.0  # few tiles are split along k
    return 2 * n * k * m * idle


def _bytes(name: str, arguments: Arguments) -> int:
    tensors = {id(value): (key, value) for key, value in arguments.items() if _is_tensor(value)}
    moved = 0
    for key, tensor in tensors.values():
        if key in _IN_CACHE.get(name, ()):
            continue
        count = tensor.numel() if 0 not in tensor.stride() else 0  # an expanded view is small
        if key == "table_ptr" and arguments.get("ids_ptr") is not None:
            count = arguments["N"] * arguments["D"]
        passes = sum(value is tensor for value in arguments.values())  # read and written in place
        moved += passes * count * tensor.element_size()
    return moved


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


# Tensors of a launch that need not go through DRAM: they are in L2, or touched in a few rows.
_IN_CACHE: dict[str, set[str]] = {
    "online_softmax_kernel": {"total_ptr"},
}
# The trips of a kernel's loops, from the outermost to the innermost.
_TRIPS: dict[str, Callable[[Arguments], tuple[float, ...]]] = {}
# The flops of a kernel's matrix products, those in tf32 counted twice.
_FLOPS: dict[str, Callable[[Arguments], float]] = {}
