"""Packed documents, for flash kernels, which would take a row for one document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperturb.engine.host_copy import HostCopy, true_first
from fastperturb.engine.positions import document_starts
from fastperturb.engine.tracing import untraced


def needs_lengths(trunk: Any, attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Return whether the trunk runs a flash kernel on documents that only positions keep apart."""
    attention = str(getattr(trunk.config, "_attn_implementation", None))
    return position_ids is not None and attention_mask is None and attention.startswith("flash")


class PackedDocuments:
    """Where the documents of rows [B, L] begin, found once for any number of samples.

    The device starts at once, and the trunk's first run waits.
    """

    def __init__(self, position_ids: Tensor) -> None:
        begins = document_starts(position_ids)
        self._rows, self._tokens = len(begins), begins.numel()
        begins = begins.flatten()
        count = begins.sum()
        edges = true_first(begins)
        is_edge = torch.arange(len(edges), device=edges.device) < count
        edges = edges.where(is_edge, self._tokens)
        self._edges = torch.cat([edges, edges.new_full((1,), self._tokens)]).int()
        self._facts = HostCopy(torch.stack([count, self._edges.diff().max()]))
        self._known: list[int] | None = None

    @untraced
    def lengths(self, samples: int) -> dict[str, Any]:
        """Return the trunk's arguments for the rows of all samples, [m B, L]."""
        if self._known is None:
            self._known = self._facts.read()
        count, longest = self._known
        if count == self._rows:
            return {}  # a document a row
        starts, total = self._edges[:count], samples * self._tokens
        first = torch.arange(0, total, self._tokens, device=starts.device, dtype=starts.dtype)
        starts = (first[:, None] + starts).flatten()
        edges = torch.cat([starts, starts.new_full((1,), total)])
        return {
            "cu_seq_lens_q": edges,
            "cu_seq_lens_k": edges,
            "max_length_q": longest,
            "max_length_k": longest,
        }
