"""Random inputs of the heads, and their values and gradients, for the tests of the ops."""

import contextlib
import dataclasses

import torch

from fastperturb.ops import head_geometry

HEADS = {"logprob": "linear_logprob", "quadratic": "linear_quadratic"}
M, N, D, V = 3, 37, 8, 150


def small_geometry(rows, entries, **changes):
    """The CPU's geometry with blocks of about so many rows by so many vocabulary entries."""
    sizes = {"most_rows": rows, "block_bytes": 4 * rows * entries, "held_bytes": 4 * rows * V}
    return dataclasses.replace(head_geometry.CPU, **{**sizes, **changes})


@contextlib.contextmanager
def budget(rows, entries):
    """Make blocks of about so many rows by so many vocabulary entries."""
    before = head_geometry.CPU
    head_geometry.CPU = small_geometry(rows, entries)
    try:
        yield
    finally:
        head_geometry.CPU = before


def head_inputs(kind, *, dtype=torch.float64, tokens=N, bias=True, frozen=False, ignored=0.25):
    """Draw hidden, weight, bias and target; a share of the targets is ignored."""
    torch.manual_seed(0)
    shape = (tokens, D) if kind == "logprob" else (M, tokens, D)
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(not frozen)
    offset = torch.randn(V).to(dtype).requires_grad_(not frozen) if bias else None
    target = torch.randint(0, 143, (tokens,))
    target[torch.rand(tokens) < ignored] = -100
    return hidden, weight, offset, target


def value_and_gradients(op, hidden, weight, bias, target, **options):
    if "ignore_index" in options:
        target = target.where(target != -100, options["ignore_index"])
    value = op(hidden, weight, target, bias=bias, **options)
    torch.manual_seed(1)
    upstream = torch.randn(value.shape, dtype=torch.float64).to(value)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    return [value, *torch.autograd.grad(value, leaves, upstream)]
