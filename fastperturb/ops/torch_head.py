"""The multi-sample heads in torch, for any device, a chunk of logits at a time.

Forward and backward each make the logits of a chunk of rows anew (6NDV flops in all, where two
GEMMs would be 4NDV), in at least fp32. With p the softmax of a row and e_y its target:

    log-prob    dlogits = e_y - p
    quadratic   g_k = (2/M) e_y - (2/(M(M-1))) (S - p_k),  S = sum_k p_k
                dlogits_k = p_k * (g_k - <p_k, g_k>)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastperturb.ops import reference

# Logits exist only a chunk at a time: this many bytes of them.
CHUNK_BYTES = 64 * 2**20


class _Head:
    """The vocabulary projection of one call in its accumulation dtype."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        valid_vocab: int,
    ) -> None:
        self.dtype = reference.accumulate(hidden, weight)
        self.hidden = hidden
        self.weight = weight[:valid_vocab].to(self.dtype)
        self.bias = None if bias is None else bias[:valid_vocab].to(self.dtype)
        self.logit_scale, self.softcap = logit_scale, softcap

    def chunks(self) -> Iterator[slice]:
        """Ranges of tokens (the last but one dimension of hidden) whose logits fit the budget."""
        tokens, copies = self.hidden.shape[-2], self.hidden.shape[:-2].numel()
        bytes_per_token = copies * self.weight.shape[0] * self.dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, bytes_per_token))
        return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))

    def logits(self, tokens: slice) -> Tensor:
        return reference.logits(
            self.hidden[..., tokens, :].to(self.dtype),
            self.weight,
            bias=self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def before_scaling(self, grad_logits: Tensor, logits: Tensor) -> Tensor:
        """The gradient of hidden weight^T + bias, given that of the logits."""
        grad = grad_logits * self.logit_scale
        return grad if self.softcap is None else grad * (1 - (logits / self.softcap).square())


class _HeadGradients:
    """Sums the gradients of hidden, weight and bias over the chunks; unwanted ones stay empty."""

    def __init__(
        self, head: _Head, weight: Tensor, bias: Tensor | None, want_weight: bool, want_bias: bool
    ) -> None:
        self.head = head
        self.dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)
        self.hidden = torch.empty_like(head.hidden)
        vocab, dim = weight.shape
        self.weight = weight.new_zeros((vocab, dim) if want_weight else 0, dtype=head.dtype)
        self.bias = weight.new_zeros(vocab if want_bias else 0, dtype=head.dtype)

    def add(self, tokens: slice, grad_logits: Tensor, logits: Tensor) -> None:
        grad = self.head.before_scaling(grad_logits, logits)
        valid_vocab = grad.shape[-1]
        self.hidden[..., tokens, :] = (grad @ self.head.weight).to(self.hidden.dtype)
        rows = grad.flatten(0, -2)
        if self.weight.numel():
            inputs = self.head.hidden[..., tokens, :].to(self.head.dtype).flatten(0, -2)
            self.weight[:valid_vocab].addmm_(rows.T, inputs)
        if self.bias.numel():
            self.bias[:valid_vocab] += rows.sum(0)

    def results(self) -> list[Tensor]:
        return [self.hidden, self.weight.to(self.dtypes[0]), self.bias.to(self.dtypes[1])]


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
) -> Tensor:  # [N]
    head = _Head(hidden, weight, bias, logit_scale, softcap, valid_vocab)
    _check_targets(target, valid_vocab, ignore_index)
    values = hidden.new_empty(target.shape, dtype=head.dtype)
    for tokens in head.chunks():
        log_probs = torch.log_softmax(head.logits(tokens), dim=-1)
        values[tokens] = _at_target(log_probs, target[tokens], ignore_index).clamp_max(0.0)
    return values


def linear_logprob_backward(
    grad: Tensor,  # [N]
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    """The gradients of [hidden, weight, bias]; those not wanted are empty."""
    head = _Head(hidden, weight, bias, logit_scale, softcap, valid_vocab)
    gradients = _HeadGradients(head, weight, bias, want_weight, want_bias)
    upstream, index = _labelled(grad.to(head.dtype), target, valid_vocab, ignore_index)
    for tokens in head.chunks():
        logits = head.logits(tokens)
        scale = upstream[tokens, None]
        grad_logits = torch.softmax(logits, dim=-1).mul_(-scale)
        grad_logits.scatter_add_(1, index[tokens, None], scale)
        gradients.add(tokens, grad_logits, logits)
    return gradients.results()


def linear_quadratic(
    hidden: Tensor,  # [M, N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [N] and the log-probs [M, N]
    num_samples = hidden.shape[0]
    head = _Head(hidden, weight, bias, logit_scale, softcap, valid_vocab)
    _check_targets(target, valid_vocab, ignore_index)
    values = hidden.new_empty(target.shape, dtype=head.dtype)
    log_probs = hidden.new_empty((num_samples, *target.shape), dtype=head.dtype)
    for tokens in head.chunks():
        log_p = torch.log_softmax(head.logits(tokens), dim=-1)
        hit = _at_target(log_p, target[tokens], ignore_index).clamp_max(0.0)
        log_probs[:, tokens] = hit
        p = log_p.exp_()
        cross = (p.sum(0).square() - p.square().sum(0)).sum(-1)
        value = 2 * hit.exp().mean(0) - cross / (num_samples * (num_samples - 1))
        values[tokens] = value.where(target[tokens] != ignore_index, 0.0)
    return values, log_probs


def linear_quadratic_backward(
    grad: Tensor,  # [N]
    grad_log_probs: Tensor,  # [M, N]
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    """The gradients of [hidden, weight, bias]; those not wanted are empty."""
    num_samples = hidden.shape[0]
    head = _Head(hidden, weight, bias, logit_scale, softcap, valid_vocab)
    gradients = _HeadGradients(head, weight, bias, want_weight, want_bias)
    options = target, valid_vocab, ignore_index
    upstream, index = _labelled(grad.to(head.dtype), *options)
    upstream_log, _ = _labelled(grad_log_probs.to(head.dtype), *options)
    for tokens in head.chunks():
        logits = head.logits(tokens)
        p = torch.softmax(logits, dim=-1)  # (M, n, V)
        at_target = index[tokens].expand(num_samples, -1)[..., None]
        pull = (p - p.sum(0)) * (2 / (num_samples * (num_samples - 1)))
        pull.scatter_add_(2, at_target, torch.full_like(pull[..., :1], 2 / num_samples))
        pull -= (p * pull).sum(-1, keepdim=True)
        scale = upstream_log[:, tokens, None]
        grad_logits = p * (pull * upstream[tokens, None] - scale)
        grad_logits.scatter_add_(2, at_target, scale)
        gradients.add(tokens, grad_logits, logits)
    return gradients.results()


def _check_targets(target: Tensor, valid_vocab: int, ignore_index: int) -> None:
    """Targets out of range raise where looking at them costs no sync."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= valid_vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target must be {ignore_index} (ignored) or lie in [0, {valid_vocab}), "
            f"got {int(target[row])} at row {row}"
        )


def _at_target(values: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """values[..., n, target[n]]; 0 where ignored, NaN where out of range."""
    in_range = (target >= 0) & (target < values.shape[-1])
    index = target.where(in_range, 0).expand(values.shape[:-1])[..., None]
    found = values.gather(-1, index)[..., 0].where(in_range, torch.nan)
    return found.where(target != ignore_index, 0.0)


def _labelled(
    grad: Tensor, target: Tensor, valid_vocab: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The upstream gradient, 0 where ignored and NaN where out of range, and a safe index."""
    in_range = (target >= 0) & (target < valid_vocab)
    upstream = grad.where(in_range, torch.nan).where(target != ignore_index, 0.0)
    return upstream, target.where(in_range, 0)
