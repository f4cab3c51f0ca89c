"""The row passes of the heads by `csrc/head.cpp`; `ops/torch/rows.py` defines each.

For CPUs, where the GEMMs take and give fp32, so that each pass writes over the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.ops.calls import LogitOptions, RunningSoftmax
from fastperturb.ops.torch.rows import finish_logprob as finish_logprob

_cpp = torch.ops.fastperturb_cpp


def online_softmax(
    products: Tensor,
    options: LogitOptions,
    target: Tensor,
    running: RunningSoftmax,
    weights: Tensor | None,
    total: Tensor | None,
) -> None:
    want_weights = weights is not None
    _cpp.head_online_softmax(products, *_plain(options), target, *running, want_weights, total)


def grad_logits(
    products: Tensor,
    options: LogitOptions,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    out: Tensor,
) -> None:
    _cpp.head_grad_logits(products, *_plain(options), target, lse, upstream)


def quadratic_dot(
    products: Tensor,
    options: LogitOptions,
    lse: Tensor,
    row_weights: Tensor,
    dot_others: Tensor,
    strata: int = 1,
) -> None:
    _cpp.head_quadratic_dot(products, *_plain(options), lse, row_weights, strata, dot_others)


def quadratic_grad_logits(
    products: Tensor,
    options: LogitOptions,
    target: Tensor,
    lse: Tensor,
    row_weights: Tensor,
    dot: Tensor,
    upstream: Tensor,
    out: Tensor,
    strata: int = 1,
) -> None:
    rows = target, lse, row_weights, dot, upstream, strata
    _cpp.head_quadratic_grad_logits(products, *_plain(options), *rows)


def _plain(options: LogitOptions) -> tuple[int, Tensor | None, float, float]:
    start, bias, scale, softcap, _ = options  # no padding on a CPU
    return start, bias, scale, softcap or 0.0
