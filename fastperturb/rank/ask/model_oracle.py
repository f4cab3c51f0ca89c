"""A language model as an oracle: each history is encoded once, and all futures share its cache.

Histories are encoded in batches, and futures run on copies of their caches; a future that another
one extends is answered by that one's pass. Under a perturbation the M samples share one seed and
one row id, and a token's noise is keyed by its position in prompt + history + future, so that
together they are one fixed language model, whose answer depends on the context alone:

    token       log mean_m p[m](z | c)
    sequence    log (sum_m w[m] p[m](z | c) / sum_m w[m]), where w[m] is the probability under
                sample m of all tokens of the context c but the first, as the chain rule of that
                marginal has it
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastperturb.rank.ask.futures import MergedFutures
from fastperturb.rank.ask.mixture import Mixture
from fastperturb.rank.ask.oracle import check_tokens
from fastperturb.rank.ask.passes import Padded, Passes, copy_rows
from fastperturb.rank.types import Tokens

# Logits of one pass at the most, whatever batch_tokens is: 128 MiB in fp32.
_MAX_LOGITS = 2**25


class ModelOracle:
    """A Hugging Face causal LM, or a PerturbedLM, as a `LogitOracle`.

    prompt: tokens in front of every history. A model has no distribution after an empty context, so
        where a history and a future are both empty, give the begin token, say.
    num_samples, seed: the number of samples M of a PerturbedLM, and the seed of their noise. A
        model whose samples are all the same, as under `exact()`, takes one.
    batch_tokens: about how many tokens a pass holds, over all samples and copied caches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prompt: Tokens = (),
        num_samples: int = 32,
        seed: int = 0,
        batch_tokens: int = 8192,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.passes = Passes(model, num_samples=num_samples, seed=seed)
        self.vocab_size = self.passes.vocab_size
        check_tokens("prompt", [prompt], self.vocab_size)
        self.prompt = tuple(prompt)
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def log_probs(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Tensor:
        """Return log Pr[z | h f] of all pairs [H, F, V] in fp32, on the model's device."""
        contexts = [self.prompt + history for history in histories]
        self.check(histories, futures)
        passes, device = self.passes, self.passes.device
        num_samples, weighted = passes.num_samples, passes.is_weighted
        shape = (len(contexts), len(futures), self.vocab_size)
        mixture = Mixture(shape, num_samples, weighted, device)
        merged = MergedFutures.of(futures, device)
        longest = max(map(len, contexts)) + max(map(len, futures))
        samples_per_pass = min(num_samples, self.rows(longest, longest if weighted else 1))
        for batch in self._batches(contexts, samples_per_pass, weighted):
            chosen = {index: contexts[index] for index in batch}
            for samples in torch.arange(num_samples, device=device).split(samples_per_pass):
                if passes.can_share_cache(longest) and min(map(len, chosen.values())):
                    encoded = self._encode(chosen, samples, weighted)
                    self._answer_from_caches(encoded, merged, samples, mixture)
                else:
                    self._answer_whole(chosen, futures, samples, mixture)
        return mixture.log_probs

    def rows(self, tokens: int, logits: int) -> int:
        """Return how many rows a pass holds, with `tokens` tokens each and `logits` of logits."""
        fitting = _MAX_LOGITS // (max(1, logits) * self.vocab_size)
        return max(1, min(self._batch_tokens // max(1, tokens), fitting))

    def check(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> None:
        """Raise for a question that the model cannot answer."""
        self.passes.check_dropout()
        check_tokens("histories", histories, self.vocab_size)
        check_tokens("futures", futures, self.vocab_size)
        shortest, longest = (
            len(self.prompt) + extreme(map(len, histories)) + extreme(map(len, futures))
            for extreme in (min, max)
        )
        if not shortest:
            raise ValueError(
                "a history and a future are both empty, and a model has no distribution after an "
                "empty context: give ModelOracle a prompt=, the begin token (bos_token_id,), say"
            )
        self.passes.check_length(longest)

    def _batches(
        self, contexts: Sequence[Tokens], num_samples: int, weighted: bool
    ) -> Iterator[list[int]]:
        """Yield indices of contexts of similar length, as many as fit a pass; empty ones apart."""
        left = sorted(range(len(contexts)), key=lambda index: -len(contexts[index]))
        while left:
            longest = len(contexts[left[0]])
            count = max(1, self.rows(longest, longest if weighted else 1) // num_samples)
            batch = [i for i in left[:count] if contexts[i] or not longest]
            left = left[len(batch) :]
            yield batch

    def _encode(self, contexts: dict[int, Tokens], samples: Tensor, weighted: bool) -> _Encoded:
        """Run contexts and keep their caches."""
        padded = Padded.of(list(contexts.values()), samples.device)
        ids, mask, longest = padded.ids, padded.mask, padded.ids.shape[1]
        kept = torch.arange(0 if weighted else longest - 1, longest, device=ids.device)
        logits, cache = self.passes.run(ids, samples, padded.positions, kept, mask=mask)
        log_weights = logits.new_zeros(logits.shape[:2], dtype=torch.float64)
        if weighted:
            log_probs = _log_probs_of(logits[:, :, :-1], ids[:, 1:])
            log_weights = log_probs.where(mask[:, :-1].bool(), 0.0).sum(-1, dtype=torch.float64)
        numbers = torch.tensor(list(contexts), device=ids.device)
        last = logits[:, :, -1].clone()  # a view would keep all others
        return _Encoded(numbers, padded.lengths, mask, cache, last, log_weights)

    def _answer_from_caches(
        self, encoded: _Encoded, merged: MergedFutures, samples: Tensor, mixture: Mixture
    ) -> None:
        """Answer all futures of encoded contexts by passes on copies of their caches."""
        for empty in merged.empty_columns:
            columns = torch.full_like(encoded.numbers, empty)
            mixture.add(encoded.numbers, columns, encoded.logits, encoded.log_weights)
        count, length = encoded.mask.shape
        pairs, first = count * len(merged.to_run), 0  # of a future and a context, futures outermost
        while first < pairs:
            width = len(merged.to_run[first // count])  # no later future is longer
            kept = width if mixture.weighted else min(width, merged.distinct_lengths)
            rows = max(1, self.rows(length + width, kept) // len(samples))
            pair = torch.arange(first, min(first + rows, pairs), device=samples.device)
            ids = merged.ids[pair // count, :width]
            served = merged.served_by(pair // count)
            self._run_futures(encoded, pair % count, ids, served, samples, mixture)
            first += rows

    def _run_futures(
        self,
        encoded: _Encoded,
        context: Tensor,  # [N], of the encoded ones
        ids: Tensor,  # [N, T], the futures that continue them
        served: tuple[Tensor, Tensor, Tensor],  # as from MergedFutures.served_by
        samples: Tensor,
        mixture: Mixture,
    ) -> None:
        offsets = torch.arange(ids.shape[1], device=ids.device)
        row, column, position = served
        kept, index = offsets, position
        if not mixture.weighted:
            kept, index = position.unique(return_inverse=True)
        sample = torch.arange(len(samples), device=ids.device)
        cache_rows = sample[:, None] * len(encoded.numbers) + context
        logits, _ = self.passes.run(
            ids,
            samples,
            encoded.lengths[context, None] + offsets,
            kept,
            mask=torch.cat([encoded.mask[context], torch.ones_like(ids)], dim=1),
            cache=copy_rows(encoded.cache, cache_rows.flatten()),
        )
        log_weights = encoded.log_weights[:, context[row]]
        if mixture.weighted:
            first = _log_probs_of(encoded.logits[:, context], ids[:, 0])
            others = _log_probs_of(logits[:, :, :-1], ids[:, 1:])
            # Not cumsum, which adds in an order of its own on a GPU.
            tokens = torch.cat([first[..., None], others], dim=-1).double().unbind(-1)
            summed = torch.stack(list(itertools.accumulate(tokens)), dim=-1)
            log_weights = log_weights + summed[:, row, position]
        mixture.add(encoded.numbers[context[row]], column, logits[:, row, index], log_weights)

    def _answer_whole(
        self,
        contexts: dict[int, Tokens],
        futures: Sequence[Tokens],
        samples: Tensor,
        mixture: Mixture,
    ) -> None:
        """Answer each pair by a pass over all of its tokens, batched by length."""
        device = samples.device
        by_length: dict[int, list[tuple[Tokens, int, int]]] = {}
        for number, context in contexts.items():
            for column, future in enumerate(futures):
                whole = context + future
                by_length.setdefault(len(whole), []).append((whole, number, column))
        for length, group in by_length.items():
            size = max(1, self.rows(length, length if mixture.weighted else 1) // len(samples))
            for first in range(0, len(group), size):
                tokens, numbers, columns = zip(*group[first : first + size])
                ids = torch.tensor(tokens, device=device)
                positions = torch.arange(length, device=device).expand_as(ids)
                kept = positions[0, 0 if mixture.weighted else -1 :]
                logits, _ = self.passes.run(ids, samples, positions, kept)
                log_weights = logits.new_zeros(logits.shape[:2], dtype=torch.float64)
                if mixture.weighted:
                    log_weights = _log_probs_of(logits[:, :, :-1], ids[:, 1:]).double().sum(-1)
                mixture.add(
                    torch.tensor(numbers, device=device),
                    torch.tensor(columns, device=device),
                    logits[:, :, -1],
                    log_weights,
                )


@dataclass(frozen=True)
class _Encoded:
    """Encoded contexts that futures continue: h of them, under m samples."""

    numbers: Tensor  # [h], the rows of the answer that they are
    lengths: Tensor  # [h]
    mask: Tensor  # [h, L], 0 at the padding on the left
    cache: DynamicCache  # of [m h] rows
    logits: Tensor  # [m, h, V], after the last token
    log_weights: Tensor  # [m, h] fp64: of all tokens after the first if weighted, else 0


def _log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs of tokens [N, T] under logits [m, N, T, V]: [m, N, T]."""
    index = tokens.expand(logits.shape[:-1])[..., None]
    return logits.gather(-1, index)[..., 0] - logits.logsumexp(-1)
