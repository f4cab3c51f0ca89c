"""The device of the kernel tests, and the comparison of a kernel's error with that of naive torch.

They run on a GPU, or with TRITON_INTERPRET=1 on the CPU (by kernels/test_interpreter.py). There the
16-bit dtype is fp16: the interpreter truncates bf16.
"""

import contextlib
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
MARKS = [] if INTERPRETED else [pytest.mark.gpu]

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="a GPU test does it in full")


@contextlib.contextmanager
def nan_in_new_memory():
    """Fill the memory of torch.empty with NaN, and reject sums without a fixed order."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def skip_without_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB")


def assert_as_good(ours, exact, naive, *, eps, name="result"):
    """The error is at most twice that of naive torch, plus eps of the largest exact value."""
    assert ours.shape == exact.shape, name
    assert torch.equal(ours.isnan(), exact.isnan()), name
    error, limit = ((x.double() - exact).abs().nan_to_num().max() for x in (ours, naive))
    margin = eps * exact.abs().nan_to_num().max()
    assert error <= 2 * limit + margin, (
        f"{name}: error {error:.2e}, naive {limit:.2e}, margin {margin:.2e}"
    )
