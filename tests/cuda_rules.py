"""The aten calls that CUDA sums by atomics, or rejects when told to be deterministic.

The lists follow the documentation of torch.use_deterministic_algorithms and torch's sources, 2.10
and 2.11. Under `collected()` calls are checked as if they ran on a GPU, with torch's implementation
of our ops, also inside them: they run below a dispatch mode.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastperturb.ops import dispatch


def _is_inexact(value):
    return value.is_floating_point() or value.is_complex()


# Name of the aten call: whether it raises, told from its arguments.
REJECTED = {
    "bincount": lambda self, weights=None, *_: weights is not None,
    "cumsum": lambda self, *_: _is_inexact(self),
    "cumsum_": lambda self, *_: _is_inexact(self),
    "histc": lambda *_: True,
    "index_reduce": lambda *_: True,
    "index_reduce_": lambda *_: True,
    "kthvalue": lambda *_: True,
    "median": lambda self, *where: bool(where),  # with indices
    "nanmedian": lambda self, *where: bool(where),
    "nll_loss2d_forward": lambda *_: True,
    "put": lambda *_: True,
    "put_": lambda *_: True,
    "scatter_reduce": lambda self, dim, index, src, reduce, *_: reduce == "prod",
    "scatter_reduce_": lambda self, dim, index, src, reduce, *_: reduce == "prod",
    "_ctc_loss_backward": lambda *_: True,
    **dict.fromkeys(
        [
            *("adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward"),
            *("_adaptive_avg_pool3d_backward", "avg_pool3d_backward", "max_pool3d_with_indices"),
            *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d"),
            *("max_unpool3d", "grid_sampler_2d_backward", "grid_sampler_3d_backward"),
            *("reflection_pad1d_backward", "reflection_pad2d_backward"),
            *("reflection_pad3d_backward", "upsample_linear1d_backward"),
            *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
            *("upsample_trilinear3d_backward",),
        ],
        lambda *_: True,
    ),
}
# Sums in an order that varies from run to run, unless no two addends meet.
_SCATTERS = ("scatter_add", "scatter_add_")
_INDEX_ADDS = ("index_add", "index_add_")


class _Rules(TorchDispatchMode):
    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            name = func._schema.name.removeprefix("aten::")
            values = [*args, *(kwargs or {}).values()]
            if name in REJECTED and REJECTED[name](*values):
                self.broken.append(f"{name} raises")
            if name in _SCATTERS and _is_inexact(args[0]) and _meet(args[0], args[1], args[2]):
                self.broken.append(f"{name} adds by atomics")
            if name in _INDEX_ADDS and _is_inexact(args[0]) and _repeats(args[2]):
                self.broken.append(f"{name} adds by atomics")
        return func(*args, **(kwargs or {}))


def _repeats(index):
    return len(index.unique()) < index.numel()


def _meet(total, dim, index):
    """Tell whether two of a scatter's addends fall on one element."""
    count = torch.zeros(total.shape, dtype=torch.int64)
    return bool((count.scatter_add(dim, index, torch.ones_like(index)) > 1).any())


@contextlib.contextmanager
def collected():
    """Collect the broken rules of the calls inside, by torch's implementation of every op."""
    broken = []
    full_precision, implementation = dispatch.full_precision, dispatch.implementation

    @contextlib.contextmanager
    def checked_precision(device):
        with full_precision(device), _Rules(broken):
            yield

    def checked_implementation(*arguments):
        module = implementation(*arguments)
        functions = {name: f for name, f in vars(module).items() if callable(f)}
        return SimpleNamespace(**{name: _checked(f, broken) for name, f in functions.items()})

    dispatch.full_precision, dispatch.implementation = checked_precision, checked_implementation
    torch.use_deterministic_algorithms(True)
    try:
        with dispatch.only("torch"), _Rules(broken):
            yield broken
    finally:
        torch.use_deterministic_algorithms(False)
        dispatch.full_precision, dispatch.implementation = full_precision, implementation


def _checked(function, broken):
    def run(*arguments, **options):
        with _Rules(broken):
            return function(*arguments, **options)

    return run
