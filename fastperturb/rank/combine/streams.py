"""Histories that go on together with the same tokens, read as weighted sums of their logits.

    law[w, c] = softmax( sum_n weights[w, n] * centred logits of history n after continuation c )

`follow` tells the law along continuations that are given, `Streams` that of tokens that come one
after the other, in one batched decode. Each history is encoded once for all continuations. Under a
linear head the weights commute with it,

    sum_n w[n] (h[n] W^T + b) = (sum_n w[n] h[n]) W^T + (sum_n w[n]) b,

so last hidden states are summed and the head runs on one row a sum: N times less work, and no
logits of single histories. A soft cap, or the mean over draws of a perturbed model, does not
commute; there the logits of a pass are summed before the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastperturb.ops.dispatch import full_precision
from fastperturb.rank.ask.models import ModelOracle
from fastperturb.rank.ask.oracle import LogitOracle, Metered, Tokens, centred
from fastperturb.rank.ask.passes import Padded, selected
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

    A model keeps the caches of all N C of them, under all draws. What it cannot go on with from a
    cache, and any other oracle, is asked again with all that is written at every step.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    shares = _checked(weights, histories)
    model, meters = _unwrapped(oracle)
    if isinstance(model, ModelOracle) and _goes_on(model, histories):
        return _CachedStreams(_Model(model, meters, histories, copies), shares)
    return _AskedStreams(oracle, histories, shares, copies)


def follow(
    oracle: LogitOracle, histories: Sequence[Tokens], weights: NDArray[Any], tokens: Tensor
) -> Tensor:
    """The law before each of tokens [C, L], and after the last [W, C, L + 1, V].

    As `open_streams` and `advance`, but of a model no more is held than of one batch of histories.
    """
    shares = _checked(weights, histories)
    model, meters = _unwrapped(oracle)
    if isinstance(model, ModelOracle) and _goes_on(model, histories):
        return _Model(model, meters, histories, len(tokens)).follow(shares, tokens)
    streams = _AskedStreams(oracle, histories, shares, len(tokens))
    if not tokens.shape[1]:
        return streams.law[:, :, None]
    return torch.cat([streams.law[:, :, None], streams.advance(tokens)], dim=2)


def write(
    oracle: LogitOracle,
    histories: Sequence[Tokens],
    weights: NDArray[Any],
    steps: int,
    *,
    generator: torch.Generator | None = None,
) -> Tokens:
    """`steps` tokens by a sum with weights [N]: the likeliest, or drawn by a generator."""
    streams = open_streams(oracle, histories, np.asarray(weights)[None])
    written: list[int] = []
    while True:
        law = streams.law[0, 0].cpu()
        if generator is None:
            written.append(int(law.argmax()))
        else:
            written.append(int(torch.multinomial(law.exp(), 1, generator=generator)))
        if len(written) == steps:
            return tuple(written)
        streams.advance(torch.tensor([written[-1:]]))


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
            with full_precision(logits.device):
                part = torch.einsum("wn,nfv->wfv", shares, logits)
            found = part if found is None else found + part
        assert found is not None
        return found[:, [futures.index(each) for each in written]].log_softmax(-1)


@dataclass
class _Block:
    """Streams of n histories, C of each side by side, under m draws."""

    numbers: list[int]  # [n], which histories
    lengths: Tensor  # [n C]
    mask: Tensor  # [n C, T], 0 at the padding on the left
    cache: Any  # of [m n C] rows


class _Model:
    """A model as its streams run it, block by block of histories."""

    def __init__(
        self, oracle: ModelOracle, meters: list[Metered], histories: Sequence[Tokens], copies: int
    ) -> None:
        oracle.check(histories, [()])
        self.copies, self.device = copies, oracle.passes.device
        self._oracle, self._passes, self._meters = oracle, oracle.passes, meters
        self._contexts = [oracle.prompt + history for history in histories]
        self._different = len(set(self._contexts))
        self._samples = torch.arange(self._passes.draws, device=self.device)
        self._head = _LinearHead.of(oracle)
        self._written: list[Tokens] = [()] * copies
        self._charge(1)

    def sums(self) -> _Sums:
        return _Sums(self._head)

    @torch.no_grad()
    def follow(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """As the function of this name."""
        self.count(tokens)
        tokens, shares = tokens.to(self.device), weights.to(self.device, torch.float32)
        first, rest = self.sums(), self.sums()
        for numbers in self._batches(tokens.shape[1]):
            block, read = self.encoded(numbers)
            first.add(read, shares[:, numbers])
            if tokens.shape[1]:
                rest.add(self.advanced(block, tokens), shares[:, numbers])
        law = first.law(shares).expand(-1, self.copies, -1, -1)
        return torch.cat([law, rest.law(shares)], dim=2) if tokens.shape[1] else law

    def blocks(self) -> Iterator[tuple[_Block, Tensor]]:
        """All histories, encoded, and what is read after them."""
        return map(self.encoded, self._batches(1))

    def _batches(self, tokens: int) -> Iterator[list[int]]:
        """Numbers of histories whose streams a pass holds, each going on by so many tokens."""
        longest = max(map(len, self._contexts)) + tokens
        logits = 1 if self._head is not None else tokens
        rows = self._oracle.rows(longest, logits) // (len(self._samples) * self.copies)
        numbers = sorted(range(len(self._contexts)), key=lambda n: -len(self._contexts[n]))
        size = max(1, rows)
        return (numbers[first : first + size] for first in range(0, len(numbers), size))

    def encoded(self, numbers: list[int]) -> tuple[_Block, Tensor]:
        padded = Padded.of([self._contexts[number] for number in numbers], self.device)
        last = torch.tensor([padded.ids.shape[1] - 1], device=self.device)
        headless = self._head is not None
        read, cache = self._passes.run(
            padded.ids, self._samples, padded.positions, last, mask=padded.mask, headless=headless
        )
        rows = torch.arange(len(self._samples) * len(numbers), device=self.device)
        block = _Block(
            numbers,
            padded.lengths.repeat_interleave(self.copies),
            padded.mask.repeat_interleave(self.copies, 0),
            selected(cache, rows.repeat_interleave(self.copies)),
        )
        return block, read[:, :, None]

    def advanced(self, block: _Block, tokens: Tensor) -> Tensor:
        """What is read after each of tokens [C, L]; the block has gone on by them."""
        ids = tokens.repeat(len(block.numbers), 1)
        offsets = torch.arange(tokens.shape[1], device=self.device)
        block.mask = torch.cat([block.mask, torch.ones_like(ids)], dim=1)
        read, block.cache = self._passes.run(
            ids,
            self._samples,
            block.lengths[:, None] + offsets,
            offsets,
            mask=block.mask,
            cache=block.cache,
            headless=self._head is not None,
        )
        block.lengths = block.lengths + tokens.shape[1]
        return read.unflatten(1, (-1, self.copies))

    def count(self, tokens: Tensor) -> None:
        """Charge the meters for the contexts that these tokens end, unless they were before."""
        before = self._written
        self._written = [(*old, *new) for old, new in zip(before, tokens.tolist())]
        longest = max(map(len, self._contexts)) + len(self._written[0])
        self._passes.check_length(longest)
        self._charge(len(set(with_prefixes(self._written)) - set(with_prefixes(before))))

    def _charge(self, continuations: int) -> None:
        for meter in self._meters:
            meter.charge(self._different * continuations)


class _CachedStreams:
    """Those of a model, which keeps what it has encoded."""

    @torch.no_grad()
    def __init__(self, model: _Model, weights: Tensor) -> None:
        self._model = model
        self._weights = weights.to(model.device, torch.float32)
        self._blocks: list[_Block] = []
        sums = model.sums()
        for block, read in model.blocks():
            sums.add(read, self._weights[:, block.numbers])
            self._blocks.append(block)
        self.law = sums.law(self._weights)[:, :, 0].expand(-1, model.copies, -1)

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        self._model.count(tokens)
        # Token by token, as a pass over several would hold the logits of each.
        law = torch.cat([self._after(part) for part in tokens.split(1, dim=1)], dim=2)
        self.law = law[:, :, -1]
        return law

    def _after(self, tokens: Tensor) -> Tensor:
        sums = self._model.sums()
        for block in self._blocks:
            read = self._model.advanced(block, tokens.to(self._model.device))
            sums.add(read, self._weights[:, block.numbers])
        return sums.law(self._weights)


@dataclass(frozen=True)
class _LinearHead:
    """A head with which weights of histories commute, in fp32."""

    weight: Tensor  # [V, D]
    bias: Tensor | None
    scale: float

    @classmethod
    def of(cls, oracle: ModelOracle) -> _LinearHead | None:
        parts = oracle.passes.parts
        if oracle.passes.draws > 1 or parts is None or parts.softcap is not None:
            return None
        bias = None if parts.head.bias is None else parts.head.bias.detach().float()
        return cls(parts.head.weight.detach().float(), bias, parts.logit_scale)


class _Sums:
    """Weighted sums over histories, as passes bring them in."""

    def __init__(self, head: _LinearHead | None) -> None:
        self._head = head
        self._sum: Tensor | None = None

    def add(self, read: Tensor, weights: Tensor) -> None:
        """Hidden states [1, n, C, L, D], or logits [m, n, C, L, V], with weights [W, n]."""
        with full_precision(read.device):
            if self._head is None:
                read = centred(read.log_softmax(-1).logsumexp(0))  # of M times the mean
            else:
                read = read[0]
            part = torch.einsum("wn,ncld->wcld", weights, read)
        self._sum = part if self._sum is None else self._sum + part

    def law(self, weights: Tensor) -> Tensor:
        """[W, C, L, V]; weights [W, N], all of them."""
        assert self._sum is not None
        if self._head is None:
            return self._sum.log_softmax(-1)
        with full_precision(self._sum.device):
            logits = F.linear(self._sum, self._head.weight)
        if self._head.bias is not None:
            logits = logits + weights.sum(1)[:, None, None, None] * self._head.bias
        return (logits * self._head.scale).log_softmax(-1)


def _checked(weights: NDArray[Any], histories: Sequence[Tokens]) -> Tensor:
    if weights.ndim != 2 or weights.shape[1] != len(histories) or not len(histories):
        raise ValueError(
            f"weights must be [W, N] with N = {len(histories)}, the histories, of which there must "
            f"be one at least, got {list(weights.shape)}"
        )
    return torch.as_tensor(weights, dtype=torch.float64)


def _unwrapped(oracle: LogitOracle) -> tuple[LogitOracle, list[Metered]]:
    """What answers, and the meters around it."""
    meters = []
    while isinstance(oracle, Metered):
        meters.append(oracle)
        oracle = oracle.oracle
    return oracle, meters


def _goes_on(oracle: ModelOracle, histories: Sequence[Tokens]) -> bool:
    """Whether it can go on from caches of the histories, whatever is written."""
    passes, shortest = oracle.passes, len(oracle.prompt) + min(map(len, histories))
    return shortest > 0 and not passes.weighs_draws and passes.can_share(passes.positions or 0)
