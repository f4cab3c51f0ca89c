"""The multi-sample heads block by block: a GEMM, a pass over its rows, a GEMM.

Logits exist only as one block of some rows by some vocabulary entries, in at least fp32 (bf16
logits would put about 0.04 of error into a log-prob). With l a row's logits, p their softmax, y its
target:

    log-prob    dl = e_y - p
    quadratic   g_k = r_k ((2/M) e_y - c (S - r_k p_k)),  S = sum_k r_k p_k,  c = 2/(M(M-1))
                dl_k = p_k * (g_k - <p_k, g_k>)

Frozen head. The gradient of a log-prob with respect to hidden is (e_y - p) W times an upstream
weight that is not known yet, so the forward keeps it without that weight, as grad_hidden. One pass
over the vocabulary blocks sums q W for each row, q_v = exp(l_v - peak), v != y, and rescales the
sum where a block raises the row's peak. In the end

    grad_hidden = (1 - p_y) W_y - (sum_{v != y} q_v W_v) / sum q,

in which nothing cancels: 4NDV flops, one exp an element. The quadratic estimator needs all M
softmaxes at once, so the logits of a few tokens are held over the whole vocabulary: 4NDV again, in
three passes over them (log-sum-exp, the products <p_k, S - r_k p_k>, the gradient). Its upstream
gradient is one scalar a token, so its grad_hidden [M, N, D] is kept the same way.

Head that trains. Its gradients need the true upstream weights, so the backward makes the logits
again, one vocabulary block at a time. The block's gradient is complete, in fp32, when its rows are
done.

The passes over a block's rows are a module of four functions: `ops.torch.rows`, which defines them,
`ops.cpp.rows` and `kernels.head_rows`. GEMMs are torch's: in fp32 on a CPU, in hidden's own dtype
with fp32 results on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastperturb.ops import reference
from fastperturb.ops.calls import LogitOptions, RunningSoftmax
from fastperturb.ops.gemm import add_product, product
from fastperturb.ops.head_labels import Labels

# A block of logits takes this many bytes and has at most so many rows. On a CPU it stays in the
# last level of cache, so that both GEMMs and the row pass between them find it there. On a GPU it
# is large enough to fill the machine, small beside what is kept, and at 2048 rows not too wide for
# a row to stay in registers (not measured yet).
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 128 * 2**20}
BLOCK_ROWS = {"cpu": 1024, "cuda": 2048}
# The quadratic estimator holds the logits of all M samples of a few tokens over all entries.
HELD_BYTES = {"cpu": 96 * 2**20, "cuda": 384 * 2**20}


class LogProbs(NamedTuple):
    """The results of one pass over the vocabulary, row by row; 0 (False) where ignored."""

    log_probs: Tensor
    lse: Tensor  # [2, N], log sum exp of the logits, and its rounding error
    hit: Tensor  # no entry has a higher logit than the target
    entropy: Tensor | None  # of the softmax
    grad_hidden: Tensor | None  # [N, D], the gradient of log_probs[i] with respect to hidden[i]


class Quadratic(NamedTuple):
    """The quadratic estimator's values [N], and each sample's part [M, N] for the backward."""

    values: Tensor
    log_probs: Tensor
    lse: Tensor  # [2, M, N]
    dot: Tensor  # <p_k, g_k>
    grad_hidden: Tensor | None  # [M, N, D], the gradient of values[n] with respect to hidden[m, n]


class Wanted(NamedTuple):
    """The gradients that a backward makes."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of one call, and the module whose row passes run it."""

    row_passes: ModuleType
    weight: Tensor  # [V, D], as the GEMMs take it
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    valid_vocab: int
    grad_dtype: torch.dtype  # of the gradient with respect to weight

    def dtype(self, hidden: Tensor) -> torch.dtype:
        """Return the dtype of the GEMMs' inputs; their results are in at least fp32."""
        if hidden.device.type == "cuda":
            return torch.promote_types(hidden.dtype, self.weight.dtype)
        return reference.accumulation_dtype(hidden, self.weight)

    def blocks(self, rows: int) -> list[Block]:
        """Cut the vocabulary into blocks whose logits for so many rows keep to the budget."""
        entries = _budget(BLOCK_BYTES, self.weight) // (4 * max(1, rows))
        return [Block(self, part) for part in _parts(self.valid_vocab, entries, multiple=64)]

    def row_parts(self, rows: int) -> list[slice]:
        return _parts(rows, _budget(BLOCK_ROWS, self.weight), multiple=16)

    def token_parts(self, samples: int, tokens: int) -> list[slice]:
        """Cut the tokens into parts whose rows, all samples of each, make a block."""
        return _parts(tokens, _budget(BLOCK_ROWS, self.weight) // samples, multiple=1)

    def held_parts(self, samples: int, tokens: int) -> list[slice]:
        """Cut the tokens into parts whose logits can be held over the whole vocabulary."""
        held = _budget(HELD_BYTES, self.weight) // (4 * self.valid_vocab * samples)
        return _parts(tokens, held, multiple=1)


@dataclass(frozen=True)
class Block:
    """A vocabulary block of a head."""

    head: Head
    entries: slice

    @property
    def width(self) -> int:
        return self.entries.stop - self.entries.start

    @property
    def options(self) -> LogitOptions:
        head = self.head
        bias = None if head.bias is None else head.bias[self.entries]
        return LogitOptions(self.entries.start, bias, head.logit_scale, head.softcap)

    def weight(self, dtype: torch.dtype) -> Tensor:  # [v, D]
        return self.head.weight[self.entries].to(dtype)


def linear_logprob(
    head: Head,
    hidden: Tensor,  # [N, D]
    labels: Labels,
    *,
    want_grad_hidden: bool,
    want_entropy: bool,
) -> LogProbs:
    inputs, target = labels.select(hidden, dim=0), labels.target
    lse = inputs.new_empty((2, len(inputs)), dtype=_wide(head.dtype(hidden)))
    log_probs, hit = torch.empty_like(lse[0]), torch.empty_like(lse[0], dtype=torch.bool)
    entropy = torch.empty_like(lse[0]) if want_entropy else None
    grad_hidden = inputs.new_empty(inputs.shape) if want_grad_hidden else None
    for part in head.row_parts(len(inputs)):
        rows = _logprob_rows(
            head,
            inputs[part],
            target[part],
            want_grad_hidden=want_grad_hidden,
            want_entropy=want_entropy,
        )
        log_probs[part], lse[:, part], hit[part] = rows.log_probs, rows.lse, rows.hit
        if entropy is not None and rows.entropy is not None:
            entropy[part] = rows.entropy
        if grad_hidden is not None and rows.grad_hidden is not None:
            grad_hidden[part] = rows.grad_hidden
    return LogProbs(
        labels.scatter(log_probs, dim=0),
        labels.scatter(lse, dim=1),
        labels.scatter(hit, dim=0),
        None if entropy is None else labels.scatter(entropy, dim=0),
        None if grad_hidden is None else labels.scatter(grad_hidden, dim=0),
    )


def _logprob_rows(
    head: Head, hidden: Tensor, target: Tensor, *, want_grad_hidden: bool, want_entropy: bool
) -> LogProbs:
    """Run `linear_logprob` on few enough rows for one block of logits."""
    dtype = head.dtype(hidden)
    h = hidden.to(dtype)
    like = h.new_empty(0, dtype=_wide(dtype))
    running = RunningSoftmax.start(len(h), like, entropy=want_entropy)
    total = like.new_zeros(h.shape) if want_grad_hidden else None
    for block in head.blocks(len(h)):
        weight = block.weight(dtype)
        products = product(h, weight.T)
        weights = _for_gemm(products, dtype) if want_grad_hidden else None
        head.row_passes.online_softmax(products, block.options, target, running, weights, total)
        if total is not None and weights is not None:
            add_product(total, weights, weight)
    log_probs, log_sums, sums = running.finish()
    grad_hidden = entropy = None
    if total is not None:
        share = running.other_sum / sums  # 1 - p_y
        if head.softcap is not None:
            share = share * (1 - (running.target_logit / head.softcap).square())
        at_target = head.weight[target.clamp(0, head.valid_vocab - 1)].to(total.dtype)
        total = (at_target * share[:, None]).sub_(total.div_(sums[:, None]))
        grad_hidden = total.mul_(head.logit_scale).to(hidden.dtype)
    if running.entropy_sum is not None:
        entropy = log_sums - running.entropy_sum / sums
    lse, hit = _rounded_sum(running.peak, log_sums), running.target_logit >= running.peak
    return LogProbs(log_probs, lse, hit, entropy, grad_hidden)


def linear_logprob_backward(
    head: Head,
    grad: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    labels: Labels,
    lse: Tensor,  # [2, N]
    wanted: Wanted,
) -> list[Tensor | None]:
    """Return the gradients of [hidden, weight, bias] that are wanted."""
    inputs, upstream = labels.select(hidden, dim=0), labels.select(grad.to(lse), dim=0)
    lse = labels.select(lse, dim=1)
    upstream, lse = labels.mask_gradient(upstream, lse, head.valid_vocab)

    def grad_logits(products: Tensor, options: LogitOptions, part: slice, out: Tensor) -> None:
        statistics = lse[:, part].contiguous(), upstream[part]
        head.row_passes.grad_logits(products, options, labels.target[part], *statistics, out)

    grads = _gradients(head, inputs, head.row_parts(len(inputs)), grad_logits, wanted)
    return [None if grads[0] is None else labels.scatter(grads[0], dim=0), *grads[1:]]


def linear_quadratic(
    head: Head,
    hidden: Tensor,  # [M, N, D]
    labels: Labels,
    row_weights: Tensor | None,  # [M, N]
    *,
    want_grad_hidden: bool,
) -> Quadratic:
    inputs, target = labels.select(hidden, dim=1), labels.target
    lse = inputs.new_empty((2, *inputs.shape[:2]), dtype=_wide(head.dtype(hidden)))
    log_probs, dot = torch.empty_like(lse[0]), torch.empty_like(lse[0])
    values = torch.empty_like(lse[0, 0])
    grad_hidden = inputs.new_empty(inputs.shape) if want_grad_hidden else None
    r = labels.row_weights(row_weights, lse[0])
    # Replaced one by one, so that each takes the memory of the one before: freed all at once, it
    # would go back to the system, to be faulted in again.
    held: list[Tensor] = []
    for part in head.held_parts(len(inputs), len(target)):
        tokens = _quadratic_tokens(
            head,
            inputs[:, part],
            target[part],
            r[:, part].contiguous(),
            held,
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
    held: list[Tensor],
    *,
    want_grad_hidden: bool,
) -> Quadratic:
    """Run `linear_quadratic` on few enough tokens to hold all their logits, in `held`."""
    shape, dtype = hidden.shape[:2], head.dtype(hidden)
    M, h = shape[0], hidden.to(dtype).flatten(0, 1)
    like = h.new_empty(0, dtype=_wide(dtype))
    running = RunningSoftmax.start(len(h), like)
    row_target = target.repeat(M)
    blocks = head.blocks(len(h))
    held += [like] * (len(blocks) - len(held))
    for index, block in enumerate(blocks):
        held[index] = product(h, block.weight(dtype).T)
        head.row_passes.online_softmax(held[index], block.options, row_target, running, None, None)
        held[index] = held[index].view(*shape, block.width)
    log_probs, log_sums, _ = (value.view(shape) for value in running.finish())
    lse = _rounded_sum(running.peak.view(shape), log_sums)
    dot_others = torch.zeros_like(log_sums)  # <p_k, S - r_k p_k>
    for block, products in zip(blocks, held, strict=False):
        head.row_passes.quadratic_dot(products, block.options, lse, r, dot_others)
    at_target = 2 / M * log_probs.exp()
    dot = r * (at_target - 2 / (M * (M - 1)) * dot_others)
    values = (r * (at_target - 1 / (M * (M - 1)) * dot_others)).sum(0)
    if not want_grad_hidden:
        return Quadratic(values, log_probs, lse, dot, None)
    total, statistics = like.new_zeros(h.shape), (lse, r, dot, torch.ones_like(values))
    for block, products in zip(blocks, held, strict=False):
        out = _for_gemm(products, dtype)
        head.row_passes.quadratic_grad_logits(products, block.options, target, *statistics, out)
        add_product(total, out.flatten(0, 1), block.weight(dtype))
    return Quadratic(values, log_probs, lse, dot, total.view(*shape, -1).to(hidden.dtype))


def linear_quadratic_backward(
    head: Head,
    grad: Tensor,  # [N]
    hidden: Tensor,  # [M, N, D]
    labels: Labels,
    row_weights: Tensor | None,  # [M, N]
    lse: Tensor,  # [2, M, N]
    dot: Tensor,  # [M, N]
    wanted: Wanted,
) -> list[Tensor | None]:
    """Return the gradients of [hidden, weight, bias] that are wanted."""
    r = labels.row_weights(row_weights, lse[0])
    inputs, dot = labels.select(hidden, dim=1), labels.select(dot, dim=1)
    upstream, lse = labels.select(grad.to(lse), dim=0), labels.select(lse, dim=2)
    upstream, lse = labels.mask_gradient(upstream, lse, head.valid_vocab)
    M, tokens, _ = inputs.shape

    def grad_logits(products: Tensor, options: LogitOptions, part: slice, out: Tensor) -> None:
        shape = M, part.stop - part.start, products.shape[-1]
        statistics = (value[..., part].contiguous() for value in (lse, r, dot))
        rows = labels.target[part], *statistics, upstream[part]
        head.row_passes.quadratic_grad_logits(products.view(shape), options, *rows, out.view(shape))

    grads = _gradients(head, inputs, head.token_parts(M, tokens), grad_logits, wanted)
    return [None if grads[0] is None else labels.scatter(grads[0], dim=1), *grads[1:]]


def _gradients(
    head: Head,
    inputs: Tensor,  # [N, D] or [M, N, D]
    parts: list[slice],
    grad_logits: Callable[[Tensor, LogitOptions, slice, Tensor], None],
    wanted: Wanted,
) -> list[Tensor | None]:
    """Sum the gradients over each part of the tokens and each vocabulary block."""
    dtype, weight = head.dtype(inputs), head.weight
    like = inputs.new_empty(0, dtype=_wide(dtype))
    want_hidden, want_weight, want_bias = wanted
    grad_weight = torch.zeros_like(weight, dtype=head.grad_dtype) if want_weight else None
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
            grad_logits(products, block.options, part, out)
            if want_hidden:
                add_product(grad_rows[index], out, block_weight)
            if grad_block is not None:
                add_product(grad_block, out.T, h)
            if grad_bias is not None:
                grad_bias[block.entries] += out.sum(0, dtype=like.dtype)
        if grad_weight is not None and grad_block is not None:
            grad_weight[block.entries] = grad_block.to(head.grad_dtype)
    grad_hidden = None
    if want_hidden:
        grad_hidden = inputs.new_empty(inputs.shape)
        for part, total in zip(parts, grad_rows, strict=True):
            grad_hidden[..., part, :] = total.view(inputs[..., part, :].shape)
    return [grad_hidden, grad_weight, grad_bias]


def _for_gemm(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the memory for the next GEMM's input: the products' own, if the dtype allows."""
    return products if products.dtype == dtype else torch.empty_like(products, dtype=dtype)


def _rounded_sum(peak: Tensor, log_sums: Tensor) -> Tensor:
    """Return peak + log_sums and its rounding error, [2, ...]."""
    total = peak + log_sums
    return torch.stack([total, peak - total + log_sums])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _budget(budgets: dict[str, int], like: Tensor) -> int:
    return budgets["cpu" if like.device.type == "cpu" else "cuda"]


def _parts(count: int, most: int, *, multiple: int) -> list[slice]:
    """Cut [0, count) into even parts of at most `most`, or of one `multiple` if that is more."""
    number = max(1, -(-count // max(1, most)))
    step = max(1, -(-count // number))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
