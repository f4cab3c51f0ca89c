"""The Triton context_scan against torch's in fp64, judged by torch's error in fp32."""

import pytest
import torch
from kernel_oracle import DEVICE, MARKS, assert_as_good, nan_in_new_memory

from fastperturb.kernels import context_scan as kernels
from fastperturb.ops.torch import context_scan as torch_scan

pytestmark = MARKS

SHAPES = [(1, 1, 1), (2, 64, 16), (3, 65, 17), (2, 200, 5), (1, 130, 64)]


def case(B, T, H, *, marked):
    torch.manual_seed(0)
    starts, real = torch.rand(B, T) < 0.1, torch.rand(B, T) < 0.8
    initial = torch.randn(B, H)
    marks = (starts, real, initial) if marked else (None, None, None)
    return torch.randn(B, T, H), torch.rand(H), *marks


def run(module, grad, arguments, device):
    """Return states and gradients."""
    arguments = [None if value is None else value.to(device) for value in arguments]
    states = module.context_scan(*arguments)
    grads = module.context_scan_backward(grad.to(device), states, *arguments)
    return [value.cpu() for value in (states, *grads)]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_and_gradients_are_as_good_as_naive_torch(shape, marked):
    arguments, grad = case(*shape, marked=marked), torch.randn(shape)
    with nan_in_new_memory():
        ours = run(kernels, grad, arguments, DEVICE)
    naive = run(torch_scan, grad, arguments, "cpu")
    wide = [
        value.double() if value is not None and value.is_floating_point() else value
        for value in arguments
    ]
    exact = run(torch_scan, grad.double(), wide, "cpu")
    for name, value, truth, other in zip(("states", "inputs", "retain"), ours, exact, naive):
        assert_as_good(value, truth, other, eps=2**-20, name=name)


def test_two_runs_give_the_same_bits():
    arguments, grad = case(3, 150, 33, marked=True), torch.randn(3, 150, 33)
    one, other = (run(kernels, grad, arguments, DEVICE) for _ in range(2))
    assert all(map(torch.equal, one, other))
