"""Predicted times: of a kernel launch from its code, of torch's own kernels from their shapes.

    time = max(bytes / bandwidth, flops / rate, instructions / issue rate)

Nothing here has been measured. Bytes are those that must go through DRAM: every tensor of a launch
once, apart from the exceptions below. Instructions are counted in the machine code, loops times
their trips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Cost:
    """The work of one launch, or of many."""

    bytes: float = 0
    flops: float = 0
    instructions: float = 0  # of warps

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.instructions + other.instructions,
        )

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
    transferred = _bytes(name, arguments)
    if name == "head_gemm_kernel":
        # The epilogue of a tile of 128 x 256, about 2300 cycles, comes after its 16 D of products.
        return Cost(transferred, head_gemm_flops(launched) * (1 + 2300 / (16 * arguments["D"])))
    flops = _FLOPS[name](arguments) if name in _FLOPS else 0
    trips = _TRIPS[name](arguments) if name in _TRIPS else ()
    warps = math.prod(launched.grid) * compiled_kernel.metadata.num_warps
    return Cost(transferred, flops, warps * sass.issued(compiled_kernel, trips))


def head_gemm_flops(launched: Launch) -> float:
    """Return the flops of the products in a launch of the fused head, 0 for other kernels."""
    if launched.kernel.fn.__name__ != "head_gemm_kernel":
        return 0.0
    return _tiled_flops(launched.arguments["hidden"].base, launched.arguments["weight"].base.T)


class TorchCosts(TorchDispatchMode):
    """Collects what torch's own kernels cost in a call: products, and all others by their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Cost] = []
        self.others: list[Cost] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_product = func in _PRODUCTS
        # Torch's stand-in for a product that adds to a 16-bit one in fp32 fails without a device.
        result = kwargs["out"] if is_product and "out" in kwargs else func(*args, **kwargs)
        if func.is_view or "empty" in func.__name__:
            return result
        inputs = () if func in _GATHERS else (args, kwargs)  # those read as much as they write
        leaves = (leaf for leaf in tree_leaves((inputs, result)) if isinstance(leaf, Tensor))
        tensors = {id(leaf): leaf for leaf in leaves}.values()
        transferred = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if is_product:
            *_, left, right = (arg for arg in args if isinstance(arg, Tensor))
            self.products.append(Cost(transferred, _tiled_flops(left, right)))
        else:
            self.others.append(Cost(transferred))
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
    """Add up the tensors of a launch. One that is named twice is read and written."""
    total = 0
    for key, value in arguments.items():
        tensor = getattr(value, "base", value)  # a descriptor's tensor
        if isinstance(tensor, Tensor) and key not in _IN_CACHE.get(name, ()):
            total += _count(key, tensor, arguments) * tensor.element_size()
    return total


def _count(key: str, tensor: Tensor, arguments: Arguments) -> int:
    """Return the entries of a tensor that a launch reads or writes."""
    if key == "table_ptr":  # a row for each token; lowrank, gated and mlp sum without it
        needless = "grad_U_ptr" in arguments and arguments["FAMILY"] != "affine"
        return 0 if needless else arguments["N"] * arguments["D"]
    if key == "weight_ptr":  # the targets' rows
        return 0 if arguments["total_ptr"] is None else arguments["total_ptr"].numel()
    return 0 if 0 in tensor.stride() else tensor.numel()  # an expanded view is small


# Tensors of a launch that need not go through DRAM: they are in L2, or touched in a few rows.
_IN_CACHE: dict[str, set[str]] = {
    "draw_kernel": {"z_ptr"},
    "change_kernel": {"change_ptr"},
    "forward_kernel": {"coordinates_ptr"},
    "outer_kernel": {"coordinates_ptr"},
    "through_C_kernel": {"result_ptr"},
    "hidden_backward_kernel": {"change_ptr", "grad_gelu_ptr"},
    "online_softmax_kernel": {"total_ptr"},
    "merge_kernel": {"total_ptr"},
}


def _slab_trips(arguments: Arguments) -> tuple[float, ...]:
    return arguments["slab_tokens"] / arguments["BT"], arguments["M"]


def _part_trips(arguments: Arguments) -> tuple[float, ...]:
    return (arguments["PART"] / arguments["BD"],)


# The trips of a kernel's loops, from the outermost to the innermost.
_TRIPS: dict[str, Callable[[Arguments], tuple[float, ...]]] = {
    "forward_kernel": lambda arguments: (arguments["part_samples"],),
    "diagonal_forward_kernel": lambda arguments: (arguments["M"],),
    "diagonal_backward_kernel": _slab_trips,
    "outer_kernel": _slab_trips,
    "hidden_backward_kernel": _slab_trips,
    "through_C_kernel": _part_trips,
    "project_kernel": _part_trips,
    "project_backward_kernel": lambda arguments: (arguments["slab_tokens"] / arguments["BT"], 1),
    # One tile a row; the loop that is left rescales the few rows whose peak rose.
    "online_softmax_kernel": lambda arguments: (arguments["num_tiles"] - 1,),
    "merge_kernel": lambda arguments: (0,),
    "scan_kernel": lambda arguments: (arguments["T"] / arguments["BT"],),
    "scan_backward_kernel": lambda arguments: (arguments["T"] / arguments["BT"],),
    "finish_logprob_kernel": lambda arguments: (arguments["D"] / arguments["BD"],),
}
# The flops of a kernel's products: in tf32, of half the rate, they count twice.
_FLOPS: dict[str, Callable[[Arguments], float]] = {
    "forward_kernel": lambda a: (
        (2 if a["FAMILY"] == "mlp" else 8 if a["FAMILY"] == "affine" else 4)
        * (a["M"] * a["N"] * a["D"] * a["K"])
    ),
    "outer_kernel": lambda a: (
        (4 * a["M"] * a["N"] * a["D"] * a["K"])
        * (1 + (a["FAMILY"] == "affine" or a["scale_ptr"] is not None))
    ),
    "through_C_kernel": lambda a: 2 * a["M"] * a["N"] * a["D"] * a["H"],
    "project_kernel": lambda a: 4 * a["N"] * a["D"] * a["H"],
    "project_backward_kernel": lambda a: 4 * a["N"] * a["D"] * a["H"],
}
