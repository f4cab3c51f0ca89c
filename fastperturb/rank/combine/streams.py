"""Weighted sums of the logits of several histories, continued by the same tokens.

    distribution[w, c] = softmax( sum_n weights[w, n] * centred logits of history n after c )

`follow` returns the distributions along given continuations c, `Streams` those of tokens that come
one after the other, in one batched decode. Each history is encoded once for all continuations.
Weights commute with a linear head,

    sum_n w[n] (h[n] W^T + b) = (sum_n w[n] h[n]) W^T + (sum_n w[n]) b,

so last hidden states are summed and the head runs once per sum: N times less work, and no logits of
single histories. A soft cap, or the mean over samples of a perturbed model, does not commute; there
the logits of one pass are summed before the next one.
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
from fastperturb.rank.ask.model_oracle import ModelOracle
from fastperturb.rank.ask.oracle import LogitOracle, Metered, centred
from fastperturb.rank.ask.passes import Padded, copy_rows
from fastperturb.rank.texts import with_prefixes
from fastperturb.rank.types import Tokens

# Log-probs of single histories that are in memory at a time: 256 MiB.
_BLOCK = 2**26


class Streams(Protocol):
    """W weighted sums over N histories, each of them after C continuations.

    law: the distributions of the next token, as log-probs [W, C, V].
    """

    law: Tensor

    def advance(self, tokens: Tensor) -> Tensor:
        """Continue by tokens [C, L]; return log-probs after each of them [W, C, L, V]."""
        ...


def open_streams(
    oracle: LogitOracle, histories: Sequence[Tokens], weights: NDArray[Any], *, copies: int = 1
) -> Streams:
    """Open streams of histories with weights [W, N] and `copies` C, the number of continuations.

    A model keeps the caches of all N C histories, under all samples. Any other oracle, or a model
    that cannot continue from a cache, is asked at every step about all tokens written so far.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    shares = _checked(weights, histories)
    model, meters = _unwrapped(oracle)
    if isinstance(model, ModelOracle) and _continues_from_cache(model, histories):
        return _CachedStreams(_EncodedHistories(model, meters, histories, copies), shares)
    return _AskedStreams(oracle, histories, shares, copies)


def follow(
    oracle: LogitOracle, histories: Sequence[Tokens], weights: NDArray[Any], tokens: Tensor
) -> Tensor:
    """Return log-probs before each of tokens [C, L], and after the last [W, C, L + 1, V].

    The result is that of `open_streams` and `advance`, but of a model only the caches of one batch
    of histories are held at a time.
    """
    shares = _checked(weights, histories)
    model, meters = _unwrapped(oracle)
    if isinstance(model, ModelOracle) and _continues_from_cache(model, histories):
        return _EncodedHistories(model, meters, histories, len(tokens)).follow(shares, tokens)
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
    """Write `steps` tokens by a sum with weights [N]: the likeliest, or sampled by a generator."""
    streams = open_streams(oracle, histories, np.asarray(weights)[None])
    written: list[int] = []
    while True:
        log_probs = streams.law[0, 0].cpu()
        if generator is None:
            written.append(int(log_probs.argmax()))
        else:
            written.append(int(torch.multinomial(log_probs.exp(), 1, generator=generator)))
        if len(written) == steps:
            return tuple(written)
        streams.advance(torch.tensor([written[-1:]]))


class _AskedStreams:
    """Streams of an oracle that is asked for the logits of every history at every step."""

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
        continuations = [(*old, *new[:end]) for old, new in zip(before, rows) for end in ends]
        log_probs = self._after(continuations).unflatten(1, (len(rows), -1))
        self.law = log_probs[:, :, -1]
        return log_probs

    def _after(self, continuations: Sequence[Tokens]) -> Tensor:
        """Return log-probs after each of these continuations [W, their number, V]."""
        futures = list(dict.fromkeys(continuations))
        step = max(1, _BLOCK // (len(futures) * self._oracle.vocab_size))
        total: Tensor | None = None
        for first in range(0, len(self._histories), step):
            block = self._histories[first : first + step]
            logits = centred(self._oracle.log_probs(block, futures))
            shares = self._weights[:, first : first + step].to(logits)
            with full_precision(logits.device):
                part = torch.einsum("wn,nfv->wfv", shares, logits)
            total = part if total is None else total + part
        assert total is not None
        return total[:, [futures.index(tokens) for tokens in continuations]].log_softmax(-1)


@dataclass
class _Batch:
    """The caches of n histories, C copies of each side by side, under m samples."""

    numbers: list[int]  # [n], the indices of the histories
    lengths: Tensor  # [n C]
    mask: Tensor  # [n C, T], 0 at the padding on the left
    cache: Any  # of [m n C] rows


class _EncodedHistories:
    """A model's histories, encoded and continued in batches, C copies of each."""

    def __init__(
        self, oracle: ModelOracle, meters: list[Metered], histories: Sequence[Tokens], copies: int
    ) -> None:
        oracle.check(histories, [()])
        self.copies, self.device = copies, oracle.passes.device
        self._oracle, self._passes, self._meters = oracle, oracle.passes, meters
        self._contexts = [oracle.prompt + history for history in histories]
        self._distinct = len(set(self._contexts))
        self._samples = torch.arange(self._passes.num_samples, device=self.device)
        self._head = _LinearHead.of(oracle)
        self._written: list[Tokens] = [()] * copies
        self._charge(1)

    def sums(self) -> _Sums:
        return _Sums(self._head)

    @torch.no_grad()
    def follow(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """Return log-probs before each of tokens [C, L], and after the last [W, C, L + 1, V]."""
        self.charge(tokens)
        tokens, shares = tokens.to(self.device), weights.to(self.device, torch.float32)
        first, rest = self.sums(), self.sums()
        for numbers in self._batches(tokens.shape[1]):
            batch, output = self._encode(numbers)
            first.add(output, shares[:, numbers])
            if tokens.shape[1]:
                rest.add(self.advance(batch, tokens), shares[:, numbers])
        log_probs = first.log_probs(shares).expand(-1, self.copies, -1, -1)
        if not tokens.shape[1]:
            return log_probs
        return torch.cat([log_probs, rest.log_probs(shares)], dim=2)

    def encode_all(self) -> Iterator[tuple[_Batch, Tensor]]:
        """Yield batches of encoded histories, and the model's output after each history."""
        return map(self._encode, self._batches(1))

    def _batches(self, tokens: int) -> Iterator[list[int]]:
        """Yield indices of histories that fit a pass when continued by `tokens` tokens."""
        longest = max(map(len, self._contexts)) + tokens
        logits = 1 if self._head is not None else tokens
        rows = self._oracle.rows(longest, logits) // (len(self._samples) * self.copies)
        numbers = sorted(range(len(self._contexts)), key=lambda n: -len(self._contexts[n]))
        size = max(1, rows)
        return (numbers[first : first + size] for first in range(0, len(numbers), size))

    def _encode(self, numbers: list[int]) -> tuple[_Batch, Tensor]:
        padded = Padded.of([self._contexts[number] for number in numbers], self.device)
        last = torch.tensor([padded.ids.shape[1] - 1], device=self.device)
        headless = self._head is not None
        output, cache = self._passes.run(
            padded.ids, self._samples, padded.positions, last, mask=padded.mask, headless=headless
        )
        rows = torch.arange(len(self._samples) * len(numbers), device=self.device)
        batch = _Batch(
            numbers,
            padded.lengths.repeat_interleave(self.copies),
            padded.mask.repeat_interleave(self.copies, 0),
            copy_rows(cache, rows.repeat_interleave(self.copies)),
        )
        return batch, output[:, :, None]

    def advance(self, batch: _Batch, tokens: Tensor) -> Tensor:
        """Continue a batch by tokens [C, L], and return the model's output after each of them."""
        ids = tokens.repeat(len(batch.numbers), 1)
        offsets = torch.arange(tokens.shape[1], device=self.device)
        batch.mask = torch.cat([batch.mask, torch.ones_like(ids)], dim=1)
        output, batch.cache = self._passes.run(
            ids,
            self._samples,
            batch.lengths[:, None] + offsets,
            offsets,
            mask=batch.mask,
            cache=batch.cache,
            headless=self._head is not None,
        )
        batch.lengths = batch.lengths + tokens.shape[1]
        return output.unflatten(1, (-1, self.copies))

    def charge(self, tokens: Tensor) -> None:
        """Check the length, and charge the meters for the new contexts that these tokens end."""
        before = self._written
        self._written = [(*old, *new) for old, new in zip(before, tokens.tolist())]
        longest = max(map(len, self._contexts)) + len(self._written[0])
        self._passes.check_length(longest)
        self._charge(len(set(with_prefixes(self._written)) - set(with_prefixes(before))))

    def _charge(self, continuations: int) -> None:
        for meter in self._meters:
            meter.charge(self._distinct * continuations)


class _CachedStreams:
    """Streams of a model that keeps the caches of all histories."""

    @torch.no_grad()
    def __init__(self, histories: _EncodedHistories, weights: Tensor) -> None:
        self._histories = histories
        self._weights = weights.to(histories.device, torch.float32)
        self._batches: list[_Batch] = []
        sums = histories.sums()
        for batch, output in histories.encode_all():
            sums.add(output, self._weights[:, batch.numbers])
            self._batches.append(batch)
        self.law = sums.log_probs(self._weights)[:, :, 0].expand(-1, histories.copies, -1)

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        self._histories.charge(tokens)
        # Token by token, as a pass over several would hold the logits of each.
        log_probs = torch.cat([self._after(part) for part in tokens.split(1, dim=1)], dim=2)
        self.law = log_probs[:, :, -1]
        return log_probs

    def _after(self, tokens: Tensor) -> Tensor:
        sums = self._histories.sums()
        for batch in self._batches:
            output = self._histories.advance(batch, tokens.to(self._histories.device))
            sums.add(output, self._weights[:, batch.numbers])
        return sums.log_probs(self._weights)


@dataclass(frozen=True)
class _LinearHead:
    """A head with which weights of histories commute, in fp32."""

    weight: Tensor  # [V, D]
    bias: Tensor | None
    scale: float

    @classmethod
    def of(cls, oracle: ModelOracle) -> _LinearHead | None:
        parts = oracle.passes.parts
        if oracle.passes.num_samples > 1 or parts is None or parts.softcap is not None:
            return None
        bias = None if parts.head.bias is None else parts.head.bias.detach().float()
        return cls(parts.head.weight.detach().float(), bias, parts.logit_scale)


class _Sums:
    """Weighted sums over histories of hidden states, or of logits, added up batch by batch."""

    def __init__(self, head: _LinearHead | None) -> None:
        self._head = head
        self._sum: Tensor | None = None

    def add(self, output: Tensor, weights: Tensor) -> None:
        """Add hidden states [1, n, C, L, D], or logits [m, n, C, L, V], with weights [W, n]."""
        with full_precision(output.device):
            if self._head is None:
                output = centred(output.log_softmax(-1).logsumexp(0))  # of M times the mean
            else:
                output = output[0]
            part = torch.einsum("wn,ncld->wcld", weights, output)
        self._sum = part if self._sum is None else self._sum + part

    def log_probs(self, weights: Tensor) -> Tensor:
        """Return log-probs [W, C, L, V], given the weights [W, N] of all histories."""
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
            f"weights must be [W, N] with N = {len(histories)}, the number of histories, at least "
            f"1, got {list(weights.shape)}"
        )
    return torch.as_tensor(weights, dtype=torch.float64)


def _unwrapped(oracle: LogitOracle) -> tuple[LogitOracle, list[Metered]]:
    """Return the innermost oracle, and the meters around it."""
    meters = []
    while isinstance(oracle, Metered):
        meters.append(oracle)
        oracle = oracle.oracle
    return oracle, meters


def _continues_from_cache(oracle: ModelOracle, histories: Sequence[Tokens]) -> bool:
    """Return True if a model can continue from caches of the histories, whatever is written."""
    passes, shortest = oracle.passes, len(oracle.prompt) + min(map(len, histories))
    return shortest > 0 and not passes.is_weighted and passes.can_share_cache(passes.positions or 0)
