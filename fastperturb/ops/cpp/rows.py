"""The row passes of the heads (`torch_rows` says what each computes) by `csrc/head.cpp`.

On CPUs, where the GEMMs take and give fp32, so that each pass writes over the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperturb.ops.head_blocks import Logits, Running

_cpp = torch.ops.fastperturb_cpp


def gather(
    products: Tensor,
    options: Logits,
    target: Tensor,
    running: Running,
    weights: Tensor | None,
    total: Tensor | None,
) -> None:
    weigh = weights is not None
    _cpp.head_gather(products, *_plain(options), target, *running, weigh, total)


def pull(
    products: Tensor,
    options: Logits,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    out: Tensor,
) -> None:
    _cpp.head_pull(products, *_plain(options), target, lse, upstream)


def couple(
    products: Tensor, options: Logits, lse: Tensor, row_weights: Tensor, crossed: Tensor
) -> None:
    _cpp.head_couple(products, *_plain(options), lse, row_weights, crossed)


def quadratic_pull(
    products: Tensor,
    options: Logits,
    target: Tensor,
    lse: Tensor,
    row_weights: Tensor,
    dots: Tensor,
    upstream: Tensor,
    out: Tensor,
) -> None:
    given = target, lse, row_weights, dots, upstream
    _cpp.head_quadratic_pull(products, *_plain(options), *given)


def _plain(options: Logits) -> tuple[int, Tensor | None, float, float]:
    start, bias, scale, softcap = options
    return start, bias, scale, softcap or 0.0
