"""The multi-sample heads block by block: a GEMM, a pass over its rows, a GEMM.

Logits exist only as one block of some rows by some words, in at least fp32 (bf16 logits would
put about 0.04 of error into a log-prob). With l a row's logits, p their softmax, y its target:

    log-prob    dl = e_y - p
    quadratic   g_k = r_k ((2/M) e_y - c (S - r_k p_k)),  S = sum_k r_k p_k,  c = 2/(M(M-1))
                dl_k = p_k * (g_k - <p_k, g_k>)

Frozen head. The log-prob's pull on hidden is (e_y - p) W, scaled by an upstream weight that is
not known yet, so it is kept: row i's sum of q W, q_v = exp(l_v - peak), v != y, is gathered over
the blocks of words in one pass, rescaled where a block raises the row's peak, and in the end

    pull = (1 - p_y) W_y - (sum_{v != y} q_v W_v) / sum q,

in which nothing cancels: 4NDV flops, one exp an element. The quadratic equation needs all M
softmaxes at once, so a few tokens' logits are held over the whole vocabulary: 4NDV again, in
three passes over them (log-sum-exp, the dots <p_k, S - r_k p_k>, the pull). Its upstream gradient
is one scalar a token, so its pull [M, N, D] is kept the same way.

Head that trains. Its gradients need the true upstream weights, so the backward makes the logits
again, a block of words at a time, whose gradient is complete, in fp32, when its rows are done.

The passes over a block's rows are a module of four functions, in torch (`torch_rows`, which says
what each computes), C++ (`cpp_rows`) and Triton (`kernels.head_rows`). GEMMs are torch's: in fp32
on a CPU, in hidden's own dtype with fp32 results on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastperturb.ops import reference
from fastperturb.ops.gemm import add_product, product

# A block of logits takes this many bytes and has at most so many rows. On a CPU it stays in the
# last level of cache, so that both GEMMs and the row pass between them find it there. On a GPU it
# is large enough to fill the machine, small beside what is kept, and at 2048 rows not too wide for
# a row to stay in registers (not measured yet).
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 128 * 2**20}
BLOCK_ROWS = {"cpu": 1024, "cuda": 2048}
# What the quadratic equation holds: the logits of all M copies of a few tokens over all words.
HELD_BYTES = {"cpu": 96 * 2**20, "cuda": 384 * 2**20}


class Logits(NamedTuple):
    """How a block's products hidden W^T become logits."""

    start: int  # the number of the block's first word
    bias: Tensor | None  # [v]
    scale: float
    softcap: float | None


class Running(NamedTuple):
    """What is known of rows [n] after some blocks of words, with q = exp(l - peak)."""

    peak: Tensor  # the largest logit
    others: Tensor  # the sum of q over all words but the target
    at_target: Tensor  # the target's logit; NaN until it is met, so for good if out of range
    spread: Tensor | None  # the sum of q (l - peak), for the entropy

    @classmethod
    def start(cls, rows: int, like: Tensor, *, entropy: bool = False) -> Running:
        zeros = like.new_zeros(rows)
        peak = torch.full_like(zeros, torch.finfo(like.dtype).min)
        nan = torch.full_like(zeros, torch.nan)
        return cls(peak, zeros, nan, torch.zeros_like(zeros) if entropy else None)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The log-probs, the log of sum q, and sum q."""
        offset = self.at_target - self.peak
        sums = self.others + offset.exp()
        log_sums = sums.log()
        return (offset - log_sums).clamp_max(0.0), log_sums, sums


class LogProbs(NamedTuple):
    """What one pass over the vocabulary finds, row by row; 0 (False) where ignored."""

    log_probs: Tensor
    lse: Tensor  # [2, N], log sum exp of the logits, and what rounding took off it
    hit: Tensor  # whether no word has a higher logit than the target
    entropy: Tensor | None  # of the softmax
    pull: Tensor | None  # [N, D], the gradient of log_probs[i] with respect to hidden[i]


class Quadratic(NamedTuple):
    """The equation's values [N], and what its backward needs of each sample [M, N]."""

    values: Tensor
    log_probs: Tensor
    lse: Tensor  # [2, M, N]
    dots: Tensor  # <p_k, g_k>
    pull: Tensor | None  # [M, N, D], the gradient of values[n] with respect to hidden[m, n]


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of one call, and the module whose row passes run it."""

    rows: ModuleType
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    valid_vocab: int
    ignore_index: int

    def dtype(self, hidden: Tensor) -> torch.dtype:
        """Of the GEMMs' inputs; their results and the logits are in at least fp32."""
        if hidden.device.type == "cuda":
            return torch.promote_types(hidden.dtype, self.weight.dtype)
        return reference.accumulate(hidden, self.weight)

    def blocks(self, rows: int) -> list[Block]:
        """The words in blocks whose logits for so many rows keep to the budget."""
        words = _budget(BLOCK_BYTES, self.weight) // (4 * max(1, rows))
        return [Block(self, part) for part in _parts(self.valid_vocab, words, multiple=64)]

    def row_parts(self, rows: int) -> list[slice]:
        return _parts(rows, _budget(BLOCK_ROWS, self.weight), multiple=16)

    def held_parts(self, samples: int, tokens: int) -> list[slice]:
        held = _budget(HELD_BYTES, self.weight) // (4 * self.valid_vocab * samples)
        return _parts(tokens, held, multiple=1)


@dataclass(frozen=True)
class Block:
    """Some of a head's words, and the steps that involve them."""

    head: Head
    words: slice

    @property
    def width(self) -> int:
        return self.words.stop - self.words.start

    @property
    def logits(self) -> Logits:
        head = self.head
        bias = None if head.bias is None else head.bias[self.words]
        return Logits(self.words.start, bias, head.logit_scale, head.softcap)

    def weight(self, dtype: torch.dtype) -> Tensor:  # [v, D]
        return self.head.weight[self.words].to(dtype)


def linear_logprob(
    head: Head,
    hidden: Tensor,  # [N, D]
    target: Tensor,  # [N]
    *,
    want_pull: bool,
    want_entropy: bool,
) -> LogProbs:
    labels = _Labels.of(target, head.ignore_index)
    inputs, target = labels.select(hidden, dim=0), labels.target
    dtype = head.dtype(hidden)
    lse = inputs.new_empty((2, len(inputs)), dtype=_wide(dtype))
    log_probs, hit = torch.empty_like(lse[0]), torch.empty_like(lse[0], dtype=torch.bool)
    entropy = torch.empty_like(lse[0]) if want_entropy else None
    pull = inputs.new_empty(inputs.shape) if want_pull else None
    for part in head.row_parts(len(inputs)):
        h, y = inputs[part].to(dtype), target[part]
        running = Running.start(len(h), lse, entropy=want_entropy)
        total = lse.new_zeros(h.shape) if want_pull else None
        for block in head.blocks(len(h)):
            weight = block.weight(dtype)
            products = product(h, weight.T)
            weights = _for_gemm(products, dtype) if want_pull else None
            head.rows.gather(products, block.logits, y, running, weights, total)
            if total is not None and weights is not None:
                add_product(total, weights, weight)
        log_probs[part], log_sums, sums = running.finish()
        lse[:, part] = _rounded_sum(running.peak, log_sums)
        hit[part] = running.at_target >= running.peak
        if entropy is not None and running.spread is not None:
            entropy[part] = log_sums - running.spread / sums
        if pull is not None and total is not None:
            share = running.others / sums  # 1 - p_y
            if head.softcap is not None:
                share = share * (1 - (running.at_target / head.softcap).square())
            at_target = head.weight[_in_range(y, head.valid_vocab)].to(total.dtype)
            total = (at_target * share[:, None]).sub_(total.div_(sums[:, None]))
            pull[part] = total.mul_(head.logit_scale).to(pull.dtype)
    return LogProbs(
        labels.spread(log_probs, dim=0),
        labels.spread(lse, dim=1),
        labels.spread(hit, dim=0),
        None if entropy is None else labels.spread(entropy, dim=0),
        None if pull is None else labels.spread(pull, dim=0),
    )


def linear_logprob_backward(
    head: Head,
    grad: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    target: Tensor,  # [N]
    lse: Tensor,  # [2, N]
    wanted: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """The gradients of [hidden, weight, bias] that are wanted."""
    labels = _Labels.of(target, head.ignore_index)
    inputs, upstream = (labels.select(each, dim=0) for each in (hidden, grad.to(lse)))
    lse = labels.select(lse, dim=1)
    upstream, lse = labels.pulling(upstream, lse, head.valid_vocab)

    def pull(products: Tensor, logits: Logits, part: slice, out: Tensor) -> None:
        sums = lse[:, part].contiguous()
        head.rows.pull(products, logits, labels.target[part], sums, upstream[part], out)

    grads = _gradients(head, inputs, head.row_parts(len(inputs)), pull, wanted)
    return [None if grads[0] is None else labels.spread(grads[0], dim=0), *grads[1:]]


def linear_quadratic(
    head: Head,
    hidden: Tensor,  # [M, N, D]
    target: Tensor,  # [N]
    row_weights: Tensor | None,  # [M, N]
    *,
    want_pull: bool,
) -> Quadratic:
    labels = _Labels.of(target, head.ignore_index)
    inputs, target = labels.select(hidden, dim=1), labels.target
    M, dtype = len(inputs), head.dtype(hidden)
    lse = inputs.new_empty((2, *inputs.shape[:2]), dtype=_wide(dtype))
    log_probs, dots = torch.empty_like(lse[0]), torch.empty_like(lse[0])
    values = torch.empty_like(lse[0, 0])
    pull = inputs.new_empty(inputs.shape) if want_pull else None
    r = _row_weights(row_weights, labels, lse)
    # Replaced one by one, so that each takes the memory of the one before: freed all at once, it
    # would go back to the system, to be faulted in again.
    held: list[Tensor] = []
    for part in head.held_parts(M, len(target)):
        h = inputs[:, part].to(dtype).flatten(0, 1)
        shape = M, part.stop - part.start
        y, each_y, weights = target[part], target[part].repeat(M), r[:, part].contiguous()
        running = Running.start(len(h), lse)
        blocks = head.blocks(len(h))
        held += [lse.new_empty(0)] * (len(blocks) - len(held))
        for index, block in enumerate(blocks):
            held[index] = product(h, block.weight(dtype).T)
            head.rows.gather(held[index], block.logits, each_y, running, None, None)
            held[index] = held[index].view(*shape, block.width)
        part_log_probs, log_sums, _ = (value.view(shape) for value in running.finish())
        part_lse = _rounded_sum(running.peak.view(shape), log_sums)
        crossed = torch.zeros_like(log_sums)  # <p_k, S - r_k p_k>
        for block, products in zip(blocks, held, strict=False):
            head.rows.couple(products, block.logits, part_lse, weights, crossed)
        at_target = 2 / M * part_log_probs.exp()
        part_dots = weights * (at_target - 2 / (M * (M - 1)) * crossed)
        values[part] = (weights * (at_target - 1 / (M * (M - 1)) * crossed)).sum(0)
        log_probs[:, part], lse[:, :, part], dots[:, part] = part_log_probs, part_lse, part_dots
        if pull is None:
            continue
        total, upstream = lse.new_zeros(h.shape), torch.ones_like(values[part])
        for block, products in zip(blocks, held, strict=False):
            out = _for_gemm(products, dtype)
            given = y, part_lse, weights, part_dots, upstream
            head.rows.quadratic_pull(products, block.logits, *given, out)
            add_product(total, out.flatten(0, 1), block.weight(dtype))
        pull[:, part] = total.view(*shape, -1).to(pull.dtype)
    return Quadratic(
        labels.spread(values, dim=0),
        labels.spread(log_probs, dim=1),
        labels.spread(lse, dim=2),
        labels.spread(dots, dim=1),
        None if pull is None else labels.spread(pull, dim=1),
    )


def linear_quadratic_backward(
    head: Head,
    grad: Tensor,  # [N]
    hidden: Tensor,  # [M, N, D]
    target: Tensor,  # [N]
    row_weights: Tensor | None,  # [M, N]
    lse: Tensor,  # [2, M, N]
    dots: Tensor,  # [M, N]
    wanted: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """The gradients of [hidden, weight, bias] that are wanted."""
    labels = _Labels.of(target, head.ignore_index)
    r = _row_weights(row_weights, labels, lse)
    inputs, dots = (labels.select(each, dim=1) for each in (hidden, dots))
    lse = labels.select(lse, dim=2)
    upstream = labels.select(grad.to(lse), dim=0)
    upstream, lse = labels.pulling(upstream, lse, head.valid_vocab)
    M = len(inputs)

    def pull(products: Tensor, logits: Logits, part: slice, out: Tensor) -> None:
        shape = M, part.stop - part.start, products.shape[-1]
        each = (value[..., part].contiguous() for value in (lse, r, dots))
        given = labels.target[part], *each, upstream[part]
        head.rows.quadratic_pull(products.view(shape), logits, *given, out.view(shape))

    parts = _parts(inputs.shape[1], _budget(BLOCK_ROWS, head.weight) // M, multiple=1)
    grads = _gradients(head, inputs, parts, pull, wanted)
    return [None if grads[0] is None else labels.spread(grads[0], dim=1), *grads[1:]]


def _gradients(
    head: Head,
    inputs: Tensor,  # [N, D] or [M, N, D]
    parts: list[slice],
    pull: Callable[[Tensor, Logits, slice, Tensor], None],
    wanted: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """Sum what `pull` makes of the logits of each part of the tokens and each block of words."""
    dtype, weight = head.dtype(inputs), head.weight
    like = inputs.new_empty(0, dtype=_wide(dtype))
    want_hidden, want_weight, want_bias = wanted
    grad_weight = weight.new_zeros(weight.shape) if want_weight else None
    grad_bias = like.new_zeros(len(weight)) if want_bias else None
    rows = [inputs[..., part, :].to(dtype).flatten(0, -2) for part in parts]
    grad_rows = [like.new_zeros(h.shape) for h in rows] if want_hidden else []
    most_rows = max((len(h) for h in rows), default=0)
    for block in head.blocks(most_rows):
        block_weight = block.weight(dtype)
        grad_block = like.new_zeros(block_weight.shape) if want_weight else None
        for index, (part, h) in enumerate(zip(parts, rows, strict=True)):
            products = product(h, block_weight.T)
            out = _for_gemm(products, dtype)
            pull(products, block.logits, part, out)
            if want_hidden:
                add_product(grad_rows[index], out, block_weight)
            if grad_block is not None:
                add_product(grad_block, out.T, h)
            if grad_bias is not None:
                grad_bias[block.words] += out.sum(0, dtype=like.dtype)
        if grad_weight is not None and grad_block is not None:
            grad_weight[block.words] = grad_block.to(weight.dtype)
    grad_hidden = None
    if want_hidden:
        grad_hidden = inputs.new_empty(inputs.shape)
        for part, total in zip(parts, grad_rows, strict=True):
            grad_hidden[..., part, :] = total.view(inputs[..., part, :].shape)
    return [grad_hidden, grad_weight, grad_bias]


@dataclass(frozen=True)
class _Labels:
    """Which tokens are worked on: on a CPU those with labels, on a GPU all, to avoid a sync."""

    target: Tensor  # of the tokens worked on
    chosen: Tensor | None  # their numbers, if not all
    ignored: Tensor | None  # [N], where results are to become 0

    @classmethod
    def of(cls, target: Tensor, ignore_index: int) -> _Labels:
        target = target.contiguous()
        if target.device.type != "cpu":
            return cls(target, None, target == ignore_index)
        chosen = (target != ignore_index).nonzero()[:, 0]
        if len(chosen) == len(target):
            return cls(target, None, None)
        return cls(target[chosen], chosen, target == ignore_index)

    def select(self, values: Tensor, *, dim: int) -> Tensor:
        """values at the tokens worked on, which lie in dimension `dim`."""
        return values if self.chosen is None else values.index_select(dim, self.chosen)

    def spread(self, values: Tensor, *, dim: int) -> Tensor:
        """The reverse, with 0 for ignored tokens."""
        if self.ignored is None:
            return values
        if self.chosen is None:
            ignored = self.ignored.view(-1, *[1] * (values.ndim - dim - 1))
            return values.masked_fill_(ignored, 0)
        shape = *values.shape[:dim], len(self.ignored), *values.shape[dim + 1 :]
        return values.new_zeros(shape).index_copy_(dim, self.chosen, values)

    def pulling(self, upstream: Tensor, lse: Tensor, valid_vocab: int) -> tuple[Tensor, Tensor]:
        """The upstream gradients [n] and lse [2, .., n] with which rows that must not pull do not.

        A target out of range pulls with NaN, so that its row is not missed.
        """
        in_range = (self.target >= 0) & (self.target < valid_vocab)
        upstream = upstream.where(in_range, torch.nan).contiguous()
        if self.ignored is None or self.chosen is not None:
            return upstream, lse
        # Against an infinite lse every probability is 0, whatever the logits are.
        return upstream.masked_fill_(self.ignored, 0.0), lse.masked_fill(self.ignored, torch.inf)


def _for_gemm(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a row pass writes what the next GEMM takes: over the products, if the dtype allows."""
    return products if products.dtype == dtype else torch.empty_like(products, dtype=dtype)


def _row_weights(row_weights: Tensor | None, labels: _Labels, lse: Tensor) -> Tensor:
    like = lse[0]
    if row_weights is None:
        return like.new_ones(like.shape[0], len(labels.target))
    return labels.select(row_weights.to(like), dim=1)


def _rounded_sum(peak: Tensor, log_sums: Tensor) -> Tensor:
    """peak + log_sums, and what its rounding took off it, [2, ...]."""
    total = peak + log_sums
    return torch.stack([total, peak - total + log_sums])


def _in_range(target: Tensor, valid_vocab: int) -> Tensor:
    return target.clamp(0, valid_vocab - 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _budget(budgets: dict[str, int], like: Tensor) -> int:
    return budgets["cpu" if like.device.type == "cpu" else "cuda"]


def _parts(count: int, most: int, *, multiple: int) -> list[slice]:
    """[0, count) in even parts of at most `most`, or of one `multiple` if that is more."""
    number = max(1, -(-count // max(1, most)))
    step = max(1, -(-count // number))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
