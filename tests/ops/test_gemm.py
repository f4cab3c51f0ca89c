"""The heads' products: their precision whatever torch's settings, and the lift of fp16 operands.

Fake tensors, which have no memory, stand in for a GPU's.
"""

import contextlib
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastperturb.ops import gemm

matmul = torch.backends.cuda.matmul


def matrix_on_a_gpu(dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(3, 3, dtype=dtype, device="cuda")


def settings():
    return (
        matmul.fp32_precision,
        torch.backends.fp32_precision,
        torch.backends.cudnn.fp32_precision,
    )


def set_legacy():
    torch.set_float32_matmul_precision("high")


def set_for_products():
    matmul.fp32_precision = "tf32"


def set_for_everything():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    matmul.fp32_precision = "none"
    matmul.allow_fp16_accumulation = False


@pytest.fixture
def seen(monkeypatch):
    """The precision of fp32 that each call of torch.mm would have met."""
    met = []

    def mm(left, right, **options):
        met.append(matmul.fp32_precision)

    monkeypatch.setattr(torch, "mm", mm)
    return met


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "set_tf32", [set_legacy, set_for_products, set_for_everything], ids=lambda f: f.__name__
)
def test_fp32_products_are_in_full_precision_and_the_setting_is_as_before(set_tf32, seen):
    set_tf32()
    before = settings()
    assert before[0] == "tf32"
    matrix = matrix_on_a_gpu()
    gemm.product(matrix, matrix)
    assert seen == ["ieee"] and settings() == before
    if set_tf32 is set_legacy:  # torch raises where it finds the two ways of setting at odds
        assert matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    if set_tf32 is set_for_everything:
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"  # still follows it


@pytest.mark.usefixtures("restored")
def test_products_of_many_threads_are_in_full_precision_and_leave_the_setting(seen):
    set_legacy()
    matrix = matrix_on_a_gpu()

    def multiply():
        for _ in range(200):
            gemm.product(matrix, matrix)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=multiply) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == ["ieee"] * 800 and matmul.fp32_precision == "tf32"


class Tunable:
    """torch.cuda.tunable, which only builds with CUDA have."""

    def __init__(self, *, by_environment):
        self.enabled, self.by_environment = True, by_environment

    def is_enabled(self):
        return self.enabled or self.by_environment

    def enable(self, value):
        self.enabled = value


def test_tunable_ops_pause_for_16_bit_products(monkeypatch):
    tunable, met = Tunable(by_environment=False), []
    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    monkeypatch.setattr(torch, "mm", lambda *matrices, **options: met.append(tunable.is_enabled()))
    matrix = matrix_on_a_gpu(torch.bfloat16)
    gemm.product(matrix, matrix)
    assert met == [False] and tunable.enabled


def test_tunable_ops_that_cannot_pause_raise_with_the_remedy(monkeypatch):
    tunable = Tunable(by_environment=True)
    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    matrix = matrix_on_a_gpu(torch.bfloat16)
    with pytest.raises(RuntimeError, match="unset it and call torch.cuda.tunable.enable"):
        gemm.product(matrix, matrix)
    assert tunable.enabled


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_sums_in_fp16_which_torch_rejects_for_fp32_results_pause(error, monkeypatch):
    met, matrix = [], matrix_on_a_gpu(torch.float16)

    def mm(left, right, **options):
        met.append(matmul.allow_fp16_accumulation)
        if error is not None:
            raise error

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: False)
    matmul.allow_fp16_accumulation = True
    with pytest.raises(error) if error else contextlib.nullcontext():
        gemm.product(matrix, matrix)
    assert met == [False] and matmul.allow_fp16_accumulation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_are_fp32_and_write_to_the_memory_given(dtype):
    left, right = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    exact, out = left.double() @ right.double(), torch.empty(5, 3)
    assert gemm.product(left, right, out) is out
    torch.testing.assert_close(out, exact.float(), rtol=1e-6, atol=1e-6)
    total = gemm.add_product(gemm.add_product(None, left, right), left, right)
    torch.testing.assert_close(total, 2 * exact.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("largest", [1e-38, 3e-12, 1 / 1024, 1.0, 5.0, 1e30])
def test_an_fp16_operand_is_lifted_by_a_power_of_two_into_its_range(largest):
    bounds = torch.tensor([0.0, -largest, largest / 3, torch.nan, torch.inf])
    lift = gemm.lift_to(torch.float16, lambda: bounds)
    mantissa, _ = torch.frexp(lift)
    assert mantissa == 0.5 and torch.isfinite(lift) and torch.isfinite(1 / lift)
    assert lift * largest < 2**15
    assert lift * largest >= 2**13 or largest < 2.0**-80


def test_nothing_but_fp16_is_lifted():
    assert gemm.lift_to(torch.bfloat16, lambda: torch.ones(3)) is None
    assert gemm.lift_to(torch.float32, lambda: torch.ones(3)) is None
    assert gemm.lift_to(torch.float16, lambda: torch.ones(0)) is None
    assert gemm.lift_to(torch.float16, lambda: torch.zeros(3)).isfinite()
    assert gemm.lift(torch.bfloat16) == gemm.lift(torch.float32) == 1.0
