"""The multi-sample heads block by block: a matrix product, a pass over its rows, a product.

Logits exist only as one block of some rows by some vocabulary entries, in at least fp32 (bf16
logits would put about 0.04 of error into a log-prob). With l a row's logits, p their softmax, y its
target:

    log-prob    dl = e_y - p
    quadratic   g_k = r_k ((2/M) e_y - c (S - S_k)),  S = sum_k r_k p_k,  c = 2/(M(M-G)),
                S_k the part of S from sample k's stratified group of G samples (G = 1: r_k p_k)
                dl_k = p_k * (g_k - <p_k, g_k>)

Frozen head. The gradient of a log-prob with respect to hidden is (e_y - p) W times an upstream
weight that is not known yet, so the forward keeps it without that weight, as grad_hidden. One pass
over the vocabulary blocks sums q W for each row, q_v = exp(l_v - peak), v != y, and rescales the
sum where a block raises the row's peak. In the end

    grad_hidden = (1 - p_y) W_y - (sum_{v != y} q_v W_v) / sum q,

in which nothing cancels: 4NDV flops, one exp an element. The quadratic estimator needs all M
softmaxes at once, so the logits of a few tokens are held over the whole vocabulary: 4NDV again, in
three passes over them (log-sum-exp, the products <p_k, S - S_k>, the gradient). Its upstream
gradient is one scalar a token, so its grad_hidden [M, N, D] is kept the same way.

A head that trains has its gradients made by `head_gradients`, in the backward.

The passes over a block's rows are a module of functions: `ops.torch.rows`, which defines them,
`ops.cpp.rows` and `kernels.head_rows`. Products (`gemm`) are of fp32 on a CPU, of hidden's own
dtype with fp32 results on a GPU. Block sizes are `head_geometry`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb.ops import gemm, reference
from fastperturb.ops.calls import LogitOptions, LogProbs, RunningSoftmax, empty_grad_hidden
from fastperturb.ops.head_geometry import Geometry, even_parts
from fastperturb.ops.head_labels import Labels

# The first block gives the fused GEMM a peak to start from, at little cost.
_FIRST_ENTRIES = 512


class Quadratic(NamedTuple):
    """The quadratic estimator's values [N], and each sample's part [M, N] for the backward."""

    values: Tensor
    log_probs: Tensor
    lse: Tensor  # [2, M, N]
    dot: Tensor  # <p_k, g_k>
    grad_hidden: Tensor | None  # [M, N, D], the gradient of values[n] with respect to hidden[m, n]


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of one call, and the module whose row passes run it."""

    row_passes: ModuleType
    weight: Tensor  # [V, D], as the products take it
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    valid_vocab: int
    grad_dtype: torch.dtype  # of the gradient with respect to weight
    geometry: Geometry
    fused: ModuleType | None = None  # kernels.head_gemm, where it is faster

    def dtype(self, hidden: Tensor) -> torch.dtype:
        """Return the dtype of the products' inputs; their results are in at least fp32."""
        if self.geometry.narrow:
            return torch.promote_types(hidden.dtype, self.weight.dtype)
        return reference.accumulation_dtype(hidden, self.weight)

    @property
    def options(self) -> LogitOptions:
        """The options of the whole vocabulary."""
        padding = self.weight.shape[0] - self.valid_vocab
        return LogitOptions(0, self.bias, self.logit_scale, self.softcap, padding)

    def blocks(self, entries: int) -> list[Block]:
        """Cut the vocabulary into even blocks of about so many entries at most."""
        return [Block(self, part) for part in even_parts(self.valid_vocab, entries, multiple=64)]

    def blocks_after_a_narrow_one(self, entries: int) -> list[Block]:
        """Cut it into a first block that is narrow, and even ones of so many entries at most."""
        first = min(_FIRST_ENTRIES, self.valid_vocab)
        others = even_parts(self.valid_vocab - first, entries, multiple=64)
        parts = [slice(first + part.start, first + part.stop) for part in others]
        return [Block(self, part) for part in [slice(0, first), *parts]]

    def fuses(self, inputs: Tensor, *, want_weights: bool) -> bool:
        """Tell if blocks of these rows go through the fused GEMM, whose flag the host reads."""
        module = self.fused
        if module is None or not module.can_run(inputs, self.weight, want_weights=want_weights):
            return False
        return not (inputs.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class Block:
    """A vocabulary block of a head. Padding at its end has weights of 0."""

    head: Head
    entries: slice

    @property
    def width(self) -> int:
        return self.head.geometry.padded(self.entries.stop - self.entries.start)

    @property
    def padding(self) -> int:
        return self.width - (self.entries.stop - self.entries.start)

    @property
    def options(self) -> LogitOptions:
        head, start = self.head, self.entries.start
        bias = None if head.bias is None else head.bias[self.entries]
        return LogitOptions(start, bias, head.logit_scale, head.softcap, self.padding)

    def unpadded(self, values: Tensor) -> Tensor:
        """Return the values [width, ...] of the entries."""
        return values[: self.width - self.padding]

    def weight(self, dtype: torch.dtype) -> Tensor:  # [width, D]
        weight = self.head.weight[self.entries].to(dtype)
        return F.pad(weight, (0, 0, 0, self.padding)) if self.padding else weight


class Memory:
    """The memory of a call's products, and of the next product's input.

    A GPU reuses it from block to block. A CPU takes fresh memory for a block before it frees the
    last one's: freed first, it would go back to the system, to be faulted in again.
    """

    def __init__(self, head: Head) -> None:
        self._reused = head.geometry.narrow
        self._memory: dict[int | str, Tensor] = {}

    def product(self, hidden: Tensor, weight: Tensor, slot: int = 0) -> Tensor:
        """Return hidden weight^T [n, v], which lasts until the next of that slot."""
        if not self._reused:
            self._memory[slot] = gemm.product(hidden, weight.T)
            return self._memory[slot]
        dtype = gemm.result_dtype(hidden.dtype)
        out = self._take(slot, (len(hidden), len(weight)), hidden, dtype)
        return gemm.product(hidden, weight.T, out)

    def for_gemm(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for the next product's input: the products' own, if the dtype allows."""
        if products.dtype == dtype:
            return products
        return self.narrow(products.shape, products, dtype)

    def narrow(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
        return self._take("narrow", shape, like, dtype)

    def _take(
        self, name: int | str, shape: Sequence[int], like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        memory, size = self._memory.get(name), math.prod(shape)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = like.new_empty(size, dtype=dtype)
        return memory[:size].view(shape)


def linear_logprob(
    head: Head,
    hidden: Tensor,  # [N, D]
    labels: Labels,
    *,
    want_grad_hidden: bool,
    want_entropy: bool,
) -> LogProbs:
    inputs, target = labels.select(hidden, dim=0), labels.target
    dtype = gemm.result_dtype(head.dtype(hidden))
    results = LogProbs.empty(inputs, dtype, entropy=want_entropy, grad_hidden=want_grad_hidden)
    running = RunningSoftmax.start(len(inputs), results.lse, entropy=want_entropy)
    memory, parts = Memory(head), head.geometry.row_parts(len(inputs))
    overflow = None
    if not want_entropy and head.fuses(inputs, want_weights=want_grad_hidden):
        overflow = torch.zeros(len(parts), dtype=torch.int32, device=inputs.device)
    for index, part in enumerate(parts):
        rows = inputs[part], target[part], running.rows(part), results.rows(part)
        _logprob_rows(
            head, *rows, memory, None if overflow is None else overflow[index : index + 1]
        )
    if overflow is not None:  # the only wait for the device, once a call
        for part in (parts[index] for index in overflow.nonzero()[:, 0].tolist()):
            fresh = RunningSoftmax.start(part.stop - part.start, results.lse)
            _logprob_rows(head, inputs[part], target[part], fresh, results.rows(part), memory, None)
    return LogProbs(
        labels.scatter(results.log_probs, dim=0),
        labels.scatter(results.lse, dim=1),
        labels.scatter(results.hit, dim=0),
        None if results.entropy is None else labels.scatter(results.entropy, dim=0),
        None if results.grad_hidden is None else labels.scatter(results.grad_hidden, dim=0),
    )


def _logprob_rows(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    running: RunningSoftmax,
    results: LogProbs,
    memory: Memory,
    overflow: Tensor | None,  # [1]
) -> None:
    """Run `linear_logprob` on few enough rows for one block of logits.

    With a flag for overflow, all blocks but a narrow first one go through the fused GEMM.
    """
    dtype = head.dtype(hidden)
    h, total = hidden.to(dtype), None
    cut = head.blocks if overflow is None else head.blocks_after_a_narrow_one
    for index, block in enumerate(cut(head.geometry.entries(len(h)))):
        weight = block.weight(dtype)
        if overflow is not None and index > 0:
            total = _fused_block(block, h, weight, target, running, total, memory, overflow)
            continue
        products = memory.product(h, weight)
        weights = None if results.grad_hidden is None else memory.for_gemm(products, dtype)
        head.row_passes.online_softmax(products, block.options, target, running, weights, total)
        if weights is not None:
            total = gemm.add_product(total, weights, weight)
    rows = target, running, head.weight, total, gemm.lift(dtype)
    head.row_passes.finish_logprob(head.options, *rows, results)


def _fused_block(
    block: Block,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    running: RunningSoftmax,
    total: Tensor | None,
    memory: Memory,
    overflow: Tensor,
) -> Tensor | None:
    """Add a block to running, and return total with the block added."""
    module = block.head.fused
    assert module is not None
    weights = None if total is None else memory.narrow((len(h), block.width), h, h.dtype)
    entries = block.unpadded(weight), block.options
    statistics = module.online_softmax(h, *entries, target, running, weights)
    if weights is not None:
        total = gemm.add_product(total, weights, weight)
    module.merge(statistics, running, total, overflow)
    return total


def linear_quadratic(
    head: Head,
    hidden: Tensor,  # [M, N, D]
    labels: Labels,
    row_weights: Tensor | None,  # [M, N]
    *,
    strata: int = 1,
    want_grad_hidden: bool,
) -> Quadratic:
    inputs, target = labels.select(hidden, dim=1), labels.target
    lse = inputs.new_empty((2, *inputs.shape[:2]), dtype=gemm.result_dtype(head.dtype(hidden)))
    log_probs, dot = torch.empty_like(lse[0]), torch.empty_like(lse[0])
    values = torch.empty_like(lse[0, 0])
    grad_hidden = empty_grad_hidden(inputs) if want_grad_hidden else None
    r = labels.row_weights(row_weights, lse[0])
    memory = Memory(head)
    for part in head.geometry.held_parts(len(inputs), len(target), head.valid_vocab):
        tokens = _quadratic_tokens(
            head,
            inputs[:, part],
            target[part],
            r[:, part].contiguous(),
            memory,
            strata=strata,
            want_grad_hidden=want_grad_hidden,
        )
        values[part], log_probs[:, part], dot[:, part] = tokens.values, tokens.log_probs, tokens.dot
        lse[:, :, part] = tokens.lse
        if grad_hidden is not None and tokens.grad_hidden is not None:
            grad_hidden[:, part] = tokens.grad_hidden
    return Quadratic(
        labels.scatter(values, dim=0),
        labels.scatter(log_probs, dim=1),
        labels.scatter(lse, dim=2),
        labels.scatter(dot, dim=1),
        None if grad_hidden is None else labels.scatter(grad_hidden, dim=1),
    )


def _quadratic_tokens(
    head: Head,
    hidden: Tensor,  # [M, n, D]
    target: Tensor,  # [n]
    r: Tensor,  # [M, n]
    memory: Memory,
    *,
    strata: int,
    want_grad_hidden: bool,
) -> Quadratic:
    """Run `linear_quadratic` on few enough tokens to hold all their logits."""
    shape, dtype = hidden.shape[:2], head.dtype(hidden)
    M, h = shape[0], hidden.to(dtype).flatten(0, 1)
    running = RunningSoftmax.start(len(h), h.new_empty(0, dtype=gemm.result_dtype(dtype)))
    row_target = target.repeat(M)
    blocks, held = head.blocks(head.geometry.held_entries(len(h))), []
    for slot, block in enumerate(blocks):
        products = memory.product(h, block.weight(dtype), slot)
        head.row_passes.online_softmax(products, block.options, row_target, running, None, None)
        held.append(products.view(*shape, block.width))
    log_probs, log_sums, _ = (value.view(shape) for value in running.finish())
    lse = RunningSoftmax.lse(running.peak.view(shape), log_sums)
    dot_others = torch.zeros_like(log_sums)  # <p_k, S - S_k>
    for block, products in zip(blocks, held, strict=True):
        head.row_passes.quadratic_dot(products, block.options, lse, r, dot_others, strata)
    at_target = 2 / M * log_probs.exp()
    dot = r * (at_target - 2 / (M * (M - strata)) * dot_others)
    values = (r * (at_target - 1 / (M * (M - strata)) * dot_others)).sum(0)
    if not want_grad_hidden:
        return Quadratic(values, log_probs, lse, dot, None)
    lift = gemm.lift_to(dtype, lambda: quadratic_bounds(r, strata) * head.logit_scale)
    upstream = torch.ones_like(values) if lift is None else lift.expand(len(target)).contiguous()
    total, statistics = None, (lse, r, dot, upstream)
    for block, products in zip(blocks, held, strict=True):
        out = memory.for_gemm(products, dtype)
        rows = target, *statistics
        head.row_passes.quadratic_grad_logits(products, block.options, *rows, out, strata)
        total = gemm.add_product(total, out.flatten(0, 1), block.weight(dtype))
    assert total is not None  # there is a block
    grad_hidden = gemm.lowered(total, lift).view(*shape, -1)
    return Quadratic(values, log_probs, lse, dot, grad_hidden)


def quadratic_bounds(row_weights: Tensor, strata: int) -> Tensor:
    """Return bounds [n] of |p_k (g_k - <p_k, g_k>)|, from row weights [M, n]."""
    M, largest = len(row_weights), row_weights.abs().amax(0)
    return 4 / M * largest * (1 + row_weights.abs().sum(0) / (M - strata))
