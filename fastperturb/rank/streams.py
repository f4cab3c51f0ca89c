"""Histories that go on together with the same tokens, read as weighted sums of their logits.

    law[w, c] = softmax( sum_n weights[w, n] * centred logits of history n after continuation c )

Each history is encoded once for all continuations, and every step is one pass over all of them,
as many at a time as a pass holds. Under a linear head the weights commute with it,

    sum_n w[n] (h[n] W^T + b) = (sum_n w[n] h[n]) W^T + (sum_n w[n]) b,

so last hidden states are summed and the head runs on one row a sum: N times less work, and no
logits of single histories. A soft cap, or the mean over draws of a perturbed model, does not
commute; there the logits of a pass are summed before the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastperturb.architectures import CausalLM
from fastperturb.ops.dispatch import full_precision
from fastperturb.rank.models import ModelOracle
from fastperturb.rank.oracle import LogitOracle, Metered, Tokens, centred
from fastperturb.rank.passes import Padded, selected
from fastperturb.rank.texts import with_prefixes

# Log-probs of the histories' own that exist at a time: 256 MiB.
_AT_ONCE = 2**26


class Streams(Protocol):
    """W sums over N histories, each after C continuations.

    law: log-probs of the next token now [W, C, V].
    """

    law: Tensor

    def advance(self, tokens: Tensor) -> Tensor:
        """Go on with tokens [C, L]; the law after each of them [W, C, L, V]."""
        ...


def open_streams(
    oracle: LogitOracle, histories: Sequence[Tokens], weights: NDArray[Any], *, copies: int = 1
) -> Streams:
    """Streams of histories with weights [W, N], and as many `copies` C as continuations.

    What a model cannot go on with from a cache, and any other oracle, is asked again with all that
    is written at every step.
    """
    if weights.ndim != 2 or weights.shape[1] != len(histories) or not len(histories):
        raise ValueError(
            f"weights must be [W, N] with N = {len(histories)}, the histories, of which there must "
            f"be one at least, got {list(weights.shape)}"
        )
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    shares = torch.as_tensor(weights, dtype=torch.float64)
    meter = oracle if isinstance(oracle, Metered) else Metered(oracle)
    if isinstance(meter.oracle, ModelOracle) and _goes_on(meter.oracle, histories):
        return _CachedStreams(meter.oracle, meter, histories, shares, copies)
    return _AskedStreams(meter, histories, shares, copies)


def write(
    oracle: LogitOracle, histories: Sequence[Tokens], weights: NDArray[Any], steps: int
) -> Tokens:
    """The likeliest next token of a sum with weights [N], `steps` times over."""
    streams = open_streams(oracle, histories, np.asarray(weights)[None])
    written: list[int] = []
    while len(written) < steps:
        written.append(int(streams.law[0, 0].argmax()))
        if len(written) < steps:
            streams.advance(torch.tensor([written[-1:]]))
    return tuple(written)


class _AskedStreams:
    """Those of an oracle that is asked for the histories' logits."""

    def __init__(
        self, oracle: LogitOracle, histories: Sequence[Tokens], weights: Tensor, copies: int
    ) -> None:
        self._oracle, self._histories, self._weights = oracle, list(histories), weights
        self._written: list[Tokens] = [()] * copies
        self.law = self._after(self._written)

    def advance(self, tokens: Tensor) -> Tensor:
        before, rows = self._written, tokens.tolist()
        self._written = [(*old, *new) for old, new in zip(before, rows)]
        ends = range(1, tokens.shape[1] + 1)
        wanted = [(*old, *new[:end]) for old, new in zip(before, rows) for end in ends]
        law = self._after(wanted).unflatten(1, (len(rows), -1))
        self.law = law[:, :, -1]
        return law

    def _after(self, written: Sequence[Tokens]) -> Tensor:
        """The law after each of these [W, len(written), V]."""
        futures = list(dict.fromkeys(written))
        step = max(1, _AT_ONCE // (len(futures) * self._oracle.vocab_size))
        found: Tensor | None = None
        for first in range(0, len(self._histories), step):
            block = self._histories[first : first + step]
            logits = centred(self._oracle.log_probs(block, futures))
            shares = self._weights[:, first : first + step].to(logits)
            part = torch.einsum("wn,nfv->wfv", shares, logits)
            found = part if found is None else found + part
        assert found is not None
        return found[:, [futures.index(each) for each in written]].log_softmax(-1)


@dataclass
class _Block:
    """Streams of n histories, C of each side by side, under m draws."""

    weights: Tensor  # [W, n]
    lengths: Tensor  # [n C]
    mask: Tensor  # [n C, T], 0 at the padding on the left
    cache: Any  # of [m n C] rows


class _CachedStreams:
    """Those of a model, which keeps what it has encoded."""

    @torch.no_grad()
    def __init__(
        self,
        oracle: ModelOracle,
        meter: Metered,
        histories: Sequence[Tokens],
        weights: Tensor,
        copies: int,
    ) -> None:
        oracle.check(histories, [()])
        self._different = len(set(histories))
        meter.charge(self._different)
        self._passes, self._meter, self._copies = oracle.passes, meter, copies
        self._vocab_size = oracle.vocab_size
        self._longest = len(oracle.prompt) + max(map(len, histories))
        self._head = _linear_head(oracle)
        self._weights = weights.to(oracle.passes.device, torch.float32)
        self._written: list[Tokens] = [()] * copies
        contexts = [oracle.prompt + history for history in histories]
        draws = oracle.passes.draws
        self._samples = torch.arange(draws, device=oracle.passes.device)
        sums = _Sums(self._head)
        self._blocks = [
            self._encoded([contexts[number] for number in numbers], self._weights[:, numbers], sums)
            for numbers in oracle.batches(contexts, draws * copies, weighted=False)
        ]
        self.law = sums.law(self._weights.sum(1))[:, :, 0].expand(-1, copies, -1)

    def _encoded(self, contexts: list[Tokens], weights: Tensor, sums: _Sums) -> _Block:
        padded = Padded.of(contexts, self._samples.device)
        last = torch.tensor([padded.ids.shape[1] - 1], device=padded.ids.device)
        found, cache = self._passes.run(
            padded.ids,
            self._samples,
            padded.positions,
            last,
            mask=padded.mask,
            headless=self._head is not None,
        )
        sums.add(found[:, :, None], weights)
        rows = torch.arange(len(self._samples) * len(contexts), device=padded.ids.device)
        return _Block(
            weights,
            padded.lengths.repeat_interleave(self._copies),
            padded.mask.repeat_interleave(self._copies, 0),
            selected(cache, rows.repeat_interleave(self._copies)),
        )

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self._samples.device)
        self._count(tokens)
        most = max(len(block.mask) for block in self._blocks) * len(self._samples)
        width = max(1, _AT_ONCE // (most * self._vocab_size))
        if self._head is not None:
            width = tokens.shape[1]
        law = torch.cat([self._after(part) for part in tokens.split(width, dim=1)], dim=2)
        self.law = law[:, :, -1]
        return law

    def _after(self, tokens: Tensor) -> Tensor:
        """One pass over all streams; the law after each of the tokens."""
        sums = _Sums(self._head)
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        for block in self._blocks:
            ids = tokens.repeat(block.weights.shape[1], 1)
            block.mask = torch.cat([block.mask, torch.ones_like(ids)], dim=1)
            found, block.cache = self._passes.run(
                ids,
                self._samples,
                block.lengths[:, None] + offsets,
                offsets,
                mask=block.mask,
                cache=block.cache,
                headless=self._head is not None,
            )
            block.lengths = block.lengths + tokens.shape[1]
            sums.add(found.unflatten(1, (-1, self._copies)), block.weights)
        return sums.law(self._weights.sum(1))

    def _count(self, tokens: Tensor) -> None:
        """What the meter has not counted yet: contexts that end in one of these tokens."""
        before = self._written
        self._written = [(*old, *new) for old, new in zip(before, tokens.tolist())]
        new = set(with_prefixes(self._written)) - set(with_prefixes(before))
        self._passes.check_length(self._longest + len(self._written[0]))
        self._meter.charge(self._different * len(new))


class _Sums:
    """Weighted sums over histories, as passes bring them in."""

    def __init__(self, head: CausalLM | None) -> None:
        self._head = head
        self._sum: Tensor | None = None

    def add(self, found: Tensor, weights: Tensor) -> None:
        """Hidden states [1, n, C, L, D], or logits [m, n, C, L, V], with weights [W, n]."""
        with full_precision(found.device):
            if self._head is None:
                found = centred(found.log_softmax(-1).logsumexp(0))  # of M times the mean
            else:
                found = found[0]
            part = torch.einsum("wn,ncld->wcld", weights, found)
        self._sum = part if self._sum is None else self._sum + part

    def law(self, total: Tensor) -> Tensor:
        """[W, C, L, V]; total: of the weights [W]."""
        assert self._sum is not None
        if self._head is None:
            return self._sum.log_softmax(-1)
        head = self._head.head
        with full_precision(self._sum.device):
            logits = F.linear(self._sum, head.weight.float())
        if head.bias is not None:
            logits = logits + total[:, None, None, None] * head.bias.float()
        return (logits * self._head.logit_scale).log_softmax(-1)


def _linear_head(oracle: ModelOracle) -> CausalLM | None:
    """The model's parts, if weights of histories commute with its head."""
    parts = oracle.passes.parts
    if oracle.passes.draws > 1 or parts is None or parts.softcap is not None:
        return None
    return parts


def _goes_on(oracle: ModelOracle, histories: Sequence[Tokens]) -> bool:
    """Whether it can go on from caches of the histories, whatever is written."""
    passes, shortest = oracle.passes, len(oracle.prompt) + min(map(len, histories))
    return shortest > 0 and not passes.weighs_draws and passes.can_share(passes.positions or 0)
