"""The gradients of a head that trains.

They need the true upstream weights, so the backward makes the logits again, one vocabulary block at
a time. On a GPU the gradients of a block's logits are kept for up to 65,536 rows in 16 bits, while
fp32 products exist for a part of the rows only, so that each of the other two products goes over
all those rows at once: the gradient of the block's weights is then one product, accumulated in
fp32 inside it. Elsewhere each part of the rows adds its own.

In fp16 an upstream gradient is lifted by a power of two, or most gradients of logits would be 0.
The products are divided by it, in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastperturb.ops import gemm
from fastperturb.ops.calls import LogitOptions
from fastperturb.ops.head_blocks import Block, Head, Memory, quadratic_bounds
from fastperturb.ops.head_labels import Labels

GradLogits = Callable[[Tensor, LogitOptions, slice, Tensor], None]
FusedGradLogits = Callable[[Tensor, Tensor, LogitOptions, list[slice], Tensor], None]


class Wanted(NamedTuple):
    """The gradients that a backward makes."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """The gradients with respect to each input, where wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def linear_logprob_backward(
    head: Head,
    grad: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    labels: Labels,
    lse: Tensor,  # [2, N]
    wanted: Wanted,
) -> Gradients:
    inputs, upstream = labels.select(hidden, dim=0), labels.select(grad.to(lse), dim=0)
    lse = labels.select(lse, dim=1)
    upstream, lse = labels.mask_gradient(upstream, lse, head.valid_vocab)
    lift = gemm.lift_to(head.dtype(hidden), lambda: upstream * head.logit_scale)
    lifted = upstream if lift is None else upstream * lift
    rows_of = _cut_once(labels.target, lse, lifted)

    def grad_logits(products: Tensor, options: LogitOptions, part: slice, out: Tensor) -> None:
        head.row_passes.grad_logits(products, options, *rows_of(part.start, part.stop), out)

    grads = _gradients(head, inputs, grad_logits, lift, wanted, _fused(head, inputs, rows_of))
    return _scattered(grads, labels, dim=0)


def linear_quadratic_backward(
    head: Head,
    grad: Tensor,  # [N]
    hidden: Tensor,  # [M, N, D]
    labels: Labels,
    row_weights: Tensor | None,  # [M, N]
    strata: int,
    lse: Tensor,  # [2, M, N]
    dot: Tensor,  # [M, N]
    wanted: Wanted,
) -> Gradients:
    r = labels.row_weights(row_weights, lse[0])
    inputs, dot = labels.select(hidden, dim=1), labels.select(dot, dim=1)
    upstream, lse = labels.select(grad.to(lse), dim=0), labels.select(lse, dim=2)
    upstream, lse = labels.mask_gradient(upstream, lse, head.valid_vocab)
    lift = gemm.lift_to(
        head.dtype(hidden), lambda: upstream * quadratic_bounds(r, strata) * head.logit_scale
    )
    lifted = upstream if lift is None else upstream * lift
    rows_of = _cut_once(labels.target, lse, r, dot, lifted)

    def grad_logits(products: Tensor, options: LogitOptions, part: slice, out: Tensor) -> None:
        shape = len(inputs), part.stop - part.start, products.shape[-1]
        rows = rows_of(part.start, part.stop)
        head.row_passes.quadratic_grad_logits(
            products.view(shape), options, *rows, out.view(shape), strata
        )

    grads = _gradients(head, inputs, grad_logits, lift, wanted)
    return _scattered(grads, labels, dim=1)


def _cut_once(*values: Tensor) -> Callable[[int, int], list[Tensor]]:
    """Return a function that gives the values [.., N] of tokens from start to stop, contiguous."""

    @functools.cache
    def rows_of(start: int, stop: int) -> list[Tensor]:
        return [value[..., start:stop].contiguous() for value in values]

    return rows_of


def _gradients(
    head: Head,
    inputs: Tensor,  # [N, D] or [M, N, D]
    grad_logits: GradLogits,
    lift: Tensor | None,
    wanted: Wanted,
    fused: FusedGradLogits | None = None,
) -> Gradients:
    """Sum the gradients over each group of the tokens and each vocabulary block."""
    groups, blocks = _cut(head, inputs)
    dtype, memory = head.dtype(inputs), Memory(head)
    rows = [_rows_of(inputs, group).to(dtype) for group in groups]
    totals: list[Tensor | None] = [None] * len(groups)
    grad_weight = grad_bias = None
    if wanted.weight:
        grad_weight = torch.empty_like(head.weight, dtype=head.grad_dtype)
        grad_weight[head.valid_vocab if groups else 0 :] = 0
    if wanted.bias:
        grad_bias = inputs.new_zeros(len(head.weight), dtype=gemm.result_dtype(dtype))
    for block in blocks:
        weight, grad_block = block.weight(dtype), None
        place = None if grad_weight is None else _place_of(block, grad_weight, dtype, lift)
        for index, (group, h) in enumerate(zip(groups, rows, strict=True)):
            if fused is None:
                out = _grad_logits_of(h, group, block, weight, grad_logits, memory)
            else:
                out = memory.narrow((len(h), block.width), h, h.dtype)
                fused(h, block.unpadded(weight), block.options, group, out)
            if wanted.hidden:
                totals[index] = gemm.add_product(totals[index], out, weight)
            if wanted.weight:
                grad_block = gemm.add_product(grad_block, out.T, h, place)
            if grad_bias is not None:
                grad_bias[block.entries] += block.unpadded(out.sum(0, dtype=grad_bias.dtype))
        if grad_weight is not None and grad_block is not None and place is None:
            grad_weight[block.entries] = gemm.lowered(block.unpadded(grad_block), lift)
    if grad_bias is not None:
        grad_bias = gemm.lowered(grad_bias, lift)
    grad_hidden = inputs.new_zeros(inputs.shape) if wanted.hidden else None
    for group, total in zip(groups, totals, strict=True):
        if grad_hidden is not None and total is not None:
            _write_rows(grad_hidden, group, gemm.lowered(total, lift))
    return Gradients(grad_hidden, grad_weight, grad_bias)


def _fused(
    head: Head, inputs: Tensor, rows_of: Callable[[int, int], list[Tensor]]
) -> FusedGradLogits | None:
    """Return grad_logits of hidden states and weights, where the fused GEMM takes these."""
    module = head.fused
    if module is None or not module.can_run(inputs, head.weight):
        return None

    def grad_logits(
        h: Tensor, weight: Tensor, options: LogitOptions, group: list[slice], out: Tensor
    ) -> None:
        rows = rows_of(group[0].start, group[-1].stop)
        module.grad_logits(h, weight, options, *rows, out)

    return grad_logits


def _cut(head: Head, inputs: Tensor) -> tuple[list[list[slice]], list[Block]]:
    """Return groups of parts of the tokens, and the vocabulary blocks."""
    geometry, tokens = head.geometry, inputs.shape[-2]
    samples = len(inputs) if inputs.ndim == 3 else 1
    if head.dtype(inputs).itemsize == 2:
        groups = geometry.groups(samples, tokens)
        rows = samples * max(map(_tokens, groups), default=0)
        return groups, head.blocks(geometry.gathered_entries(rows))
    parts = geometry.row_parts(tokens)
    if inputs.ndim == 3:
        parts = geometry.token_parts(samples, tokens)
    groups = [[part] for part in parts]
    rows = samples * max(map(_tokens, groups), default=0)
    return groups, head.blocks(geometry.entries(rows))


def _tokens(group: list[slice]) -> int:
    return group[-1].stop - group[0].start


def _rows_of(inputs: Tensor, group: list[slice]) -> Tensor:  # [rows, D]
    """Return a group's rows, part by part; of a part, all tokens of one sample after the other."""
    if inputs.ndim == 2:
        return inputs[group[0].start : group[-1].stop]
    parts = [inputs[:, part].flatten(0, 1) for part in group]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _write_rows(values: Tensor, group: list[slice], rows: Tensor) -> None:
    """Undo `_rows_of`: write a group's rows into values [N, D] or [M, N, D]."""
    sizes = [values[..., part, 0].numel() for part in group]
    for part, part_rows in zip(group, rows.split(sizes), strict=True):
        values[..., part, :] = part_rows.view(values[..., part, :].shape)


def _grad_logits_of(
    h: Tensor,
    group: list[slice],
    block: Block,
    weight: Tensor,
    grad_logits: GradLogits,
    memory: Memory,
) -> Tensor:
    """Return the gradients of the logits of a group's rows in one block, [rows, width]."""
    if h.dtype.itemsize > 2:  # written over the products
        products = memory.product(h, weight)
        grad_logits(products, block.options, group[0], products)
        return products
    out = memory.narrow((len(h), block.width), h, h.dtype)
    samples = len(h) // max(1, _tokens(group))
    sizes = [samples * (part.stop - part.start) for part in group]
    for part, part_h, part_out in zip(group, h.split(sizes), out.split(sizes), strict=True):
        grad_logits(memory.product(part_h, weight), block.options, part, part_out)
    return out


def _place_of(
    block: Block, grad_weight: Tensor, dtype: torch.dtype, lift: Tensor | None
) -> Tensor | None:
    """Return the part of grad_weight that can take the block's sum of products as it is."""
    if lift is not None or block.padding or grad_weight.dtype != gemm.result_dtype(dtype):
        return None
    return grad_weight[block.entries]


def _scattered(grads: Gradients, labels: Labels, *, dim: int) -> Gradients:
    hidden = None if grads.hidden is None else labels.scatter(grads.hidden, dim=dim)
    return grads._replace(hidden=hidden)
