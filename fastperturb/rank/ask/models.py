"""A language model as an oracle: each history encoded once, its cache shared by all futures.

Histories are encoded in batches, and futures run on copies of their caches; a future with which
another one begins is answered by that one's pass. Under a perturbation the M draws share one seed
and one row number, and a token's noise is keyed by its place in prompt + history + future, so that
together they are one fixed language model, whose answer depends on the context alone:

    token       log mean_m p[m](z | c)
    sequence    log (sum_m w[m] p[m](z | c) / sum_m w[m]), where w[m] is the probability under draw
                m of all tokens of the context c but the first, as the chain rule of that marginal
                has it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastperturb.rank.ask.oracle import Tokens
from fastperturb.rank.ask.passes import Padded, Passes, selected
from fastperturb.rank.ask.questions import FutureRuns, Mixture

# Of one pass, whatever batch_tokens is: 128 MiB in fp32.
_MOST_LOGITS = 2**25


class ModelOracle:
    """A Hugging Face causal LM, or a PerturbedLM, as a `LogitOracle`.

    prompt: tokens in front of every history. No model tells anything after the empty context, so
        one is needed, the begin token, say, where a history and a future are both empty.
    num_samples, seed: the draws M of a PerturbedLM and what keys them. One that has one draw, as
        under `exact()`, takes one.
    batch_tokens: about how many tokens a pass holds, of all draws and copied caches together.
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
        """log Pr[z | h f] of all pairs [H, F, V] in fp32, on the model's device."""
        contexts = [self.prompt + history for history in histories]
        self.check(histories, futures)
        passes, device = self.passes, self.passes.device
        draws, weighted = passes.draws, passes.weighs_draws
        shape = (len(contexts), len(futures), self.vocab_size)
        answers = Mixture(shape, draws, weighted, device)
        asked = FutureRuns.of(futures, device)
        reach = max(map(len, contexts)) + max(map(len, futures))
        together = min(draws, self.rows(reach, reach if weighted else 1))
        for batch in self.batches(contexts, together, weighted):
            for samples in torch.arange(draws, device=device).split(together):
                texts = {index: contexts[index] for index in batch}
                if passes.can_share(reach) and min(map(len, texts.values())):
                    encoded = self._encode(texts, samples, weighted)
                    self._continue(encoded, asked, samples, answers)
                else:
                    self._ask_whole(texts, futures, samples, answers)
        return answers.log_probs

    def batches(
        self, contexts: Sequence[Tokens], draws: int, weighted: bool
    ) -> Iterator[list[int]]:
        """Numbers of contexts of about one length, as many as a pass holds; empty ones apart."""
        left = sorted(range(len(contexts)), key=lambda index: -len(contexts[index]))
        while left:
            longest = len(contexts[left[0]])
            count = max(1, self.rows(longest, longest if weighted else 1) // draws)
            batch = [i for i in left[:count] if contexts[i] or not longest]
            left = left[len(batch) :]
            yield batch

    def rows(self, tokens: int, logits: int) -> int:
        """How many rows of so many tokens, with logits at so many of them, a pass holds."""
        most = _MOST_LOGITS // (max(1, logits) * self.vocab_size)
        return max(1, min(self._batch_tokens // max(1, tokens), most))

    def _encode(self, texts: dict[int, Tokens], samples: Tensor, weighted: bool) -> _Encoded:
        """The caches of some contexts."""
        padded = Padded.of(list(texts.values()), samples.device)
        ids, mask, longest = padded.ids, padded.mask, padded.ids.shape[1]
        kept = torch.arange(0 if weighted else longest - 1, longest, device=ids.device)
        logits, cache = self.passes.run(ids, samples, padded.positions, kept, mask=mask)
        log_weights = logits.new_zeros(logits.shape[:2], dtype=torch.float64)
        if weighted:
            told = _log_probs_of(logits[:, :, :-1], ids[:, 1:])
            log_weights = told.where(mask[:, :-1].bool(), 0.0).sum(-1, dtype=torch.float64)
        numbers = torch.tensor(list(texts), device=ids.device)
        last = logits[:, :, -1].clone()  # a view would keep all others
        return _Encoded(numbers, padded.lengths, mask, cache, last, log_weights)

    def _continue(
        self, encoded: _Encoded, asked: FutureRuns, samples: Tensor, answers: Mixture
    ) -> None:
        """Answer all futures of some encoded contexts."""
        for empty in asked.at_once:
            columns = torch.full_like(encoded.numbers, empty)
            answers.add(encoded.numbers, columns, encoded.logits, encoded.log_weights)
        count, length = encoded.mask.shape
        pairs, first = count * len(asked.runs), 0  # of a run and a context, runs outermost
        while first < pairs:
            width = len(asked.runs[first // count])  # no later run is longer
            kept = width if answers.weighted else min(width, asked.lengths)
            last = min(first + max(1, self.rows(length + width, kept) // len(samples)), pairs)
            pair = torch.arange(first, last, device=samples.device)
            ids = asked.ids[pair // count, :width]
            answered = asked.answered(pair // count)
            self._continue_by(encoded, pair % count, ids, answered, samples, answers)
            first = last

    def _continue_by(
        self,
        encoded: _Encoded,
        context: Tensor,  # [N]
        ids: Tensor,  # [N, T], what it goes on with
        answered: tuple[Tensor, Tensor, Tensor],  # as from FutureRuns.answered
        samples: Tensor,
        answers: Mixture,
    ) -> None:
        offsets = torch.arange(ids.shape[1], device=ids.device)
        row, column, place = answered
        kept, index = (offsets, place) if answers.weighted else place.unique(return_inverse=True)
        draws = torch.arange(len(samples), device=ids.device)
        copies = draws[:, None] * len(encoded.numbers) + context
        logits, _ = self.passes.run(
            ids,
            samples,
            encoded.lengths[context, None] + offsets,
            kept,
            mask=torch.cat([encoded.mask[context], torch.ones_like(ids)], dim=1),
            cache=selected(encoded.cache, copies.flatten()),
        )
        log_weights = encoded.log_weights[:, context[row]]
        if answers.weighted:
            first = _log_probs_of(encoded.logits[:, context], ids[:, 0])
            others = _log_probs_of(logits[:, :, :-1], ids[:, 1:])
            told = torch.cat([first[..., None], others], dim=-1).double().cumsum(-1)
            log_weights = log_weights + told[:, row, place]
        answers.add(encoded.numbers[context[row]], column, logits[:, row, index], log_weights)

    def _ask_whole(
        self,
        texts: dict[int, Tokens],
        futures: Sequence[Tokens],
        samples: Tensor,
        answers: Mixture,
    ) -> None:
        """Answer each pair by a pass over all of its context, among others of its length."""
        device = samples.device
        by_length: dict[int, list[tuple[Tokens, int, int]]] = {}
        for number, text in texts.items():
            for column, future in enumerate(futures):
                whole = text + future
                by_length.setdefault(len(whole), []).append((whole, number, column))
        for length, group in by_length.items():
            size = max(1, self.rows(length, length if answers.weighted else 1) // len(samples))
            for first in range(0, len(group), size):
                chunk, *place = zip(*group[first : first + size])
                numbers, columns = (torch.tensor(each, device=device) for each in place)
                ids = torch.tensor(chunk, device=device)
                positions = torch.arange(length, device=device).expand_as(ids)
                kept = positions[0, 0 if answers.weighted else -1 :]
                logits, _ = self.passes.run(ids, samples, positions, kept)
                log_weights = logits.new_zeros(logits.shape[:2], dtype=torch.float64)
                if answers.weighted:
                    log_weights = _log_probs_of(logits[:, :, :-1], ids[:, 1:]).double().sum(-1)
                answers.add(numbers, columns, logits[:, :, -1], log_weights)

    def check(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> None:
        """Refuse what the model cannot be asked."""
        self.passes.check_still()
        check_tokens("histories", histories, self.vocab_size)
        check_tokens("futures", futures, self.vocab_size)
        shortest, longest = (
            len(self.prompt) + of(map(len, histories)) + of(map(len, futures)) for of in (min, max)
        )
        if not shortest:
            raise ValueError(
                "a history and a future are both empty, and no model tells what comes after "
                "nothing: give ModelOracle a prompt=, the begin token (bos_token_id,), say"
            )
        self.passes.check_length(longest)


def check_tokens(name: str, sequences: Sequence[Tokens], vocab_size: int) -> None:
    """Refuse what is no list of sequences of token ids below `vocab_size`."""
    if not len(sequences):
        raise ValueError(f"{name} must hold at least one sequence of tokens, which may be empty")
    for number, tokens in enumerate(sequences):
        wrong = [token for token in tokens if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"{name} must be of token ids in [0, {vocab_size}), got {wrong[0]} in the one "
                f"numbered {number}"
            )


@dataclass(frozen=True)
class _Encoded:
    """Contexts that futures continue; h of them, under m draws."""

    numbers: Tensor  # [h], which contexts of the question
    lengths: Tensor  # [h]
    mask: Tensor  # [h, L], 0 at the padding on the left
    cache: DynamicCache  # of [m h] rows
    logits: Tensor  # [m, h, V], after the last token
    log_weights: Tensor  # [m, h] fp64, of all tokens after the first, if wanted


def _log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of tokens [N, T] under logits [m, N, T, V]: [m, N, T]."""
    index = tokens.expand(logits.shape[:-1])[..., None]
    return logits.gather(-1, index)[..., 0] - logits.logsumexp(-1)
