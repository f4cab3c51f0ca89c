"""Random edits of token ids, laid out so that no label is predicted by a token that has seen it.

In sample m of row b, position t has an edit with probability `rate`, of a kind drawn evenly:

    edit      lays down               label t + 1 is predicted at
    (none)    x_t                     x_t
    replace   a neighbour of x_t      the neighbour
    insert    any token, then x_t     x_t
    delete    nothing                 the token before
    swap      x_{t+1}, then x_t       the token before, where x_t is missing; label t + 2 at x_t

so the token that predicts label t + 1 has seen edits of x_0 .. x_t and nothing else. Position t + 1
of a swap has no edit of its own.

A swap lays x_t down after its label, so label t + 1 is predicted without x_t, as under a deletion.
One causal pass allows nothing else. Decoding does the same where x_t is the last token so far, so
that texts have the distribution that scoring measures. The last token before a position that is not
`editable` is not swapped, and its label is predicted at it. If x_{t+1} is a special token, the two
keep their order, but label t + 1 is predicted at the token before all the same: the place of a
prediction must not depend on its label.

Special tokens are neither edited nor drawn, the first token of a document is neither deleted nor
swapped, and documents do not mix. A document of n tokens has room for `max_positions` - n more:
an insertion is dropped where the insertions drawn so far outnumber that room plus the deletions
so far, so no sample has more positions than the model. This rule alone looks ahead: at the number
n, never at tokens.

Edits are drawn by the words w of Philox (see `noise`) for counter (2^32 - 1, t, m, b), a block that
no latent uses: an edit if w0 < rate 2^32, of kind floor(w1 2^-32 #kinds), with token number
floor(w2 2^-32 #tokens) of the tokens to choose from.

Rates may be learned, one for each kind: lambda_k, whose sum is the rate. w1 then chooses a kind by
its share of the sum. A choice of edits omega depends on rates by its distribution alone, so they
learn by its score: d log p = sum over samples of w_m d log q(omega_m), with the estimator's own
weights w. log q sums over the places whose action is free: log lambda_k of a drawn edit, or
log(1 - sum of lambda_k over the kinds that are possible there) of a place that has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastperturb import noise
from fastperturb.engine.positions import document_starts
from fastperturb.engine.tracing import untraced

KINDS = ("replace", "insert", "delete", "swap")
# These leave every token in the prefix of its label.
DEFAULT_KINDS = ("replace", "insert")

_REPLACE, _INSERT, _DELETE, _SWAP = range(len(KINDS))
_KEEP = -1
_BLOCK = 0xFFFFFFFF
# Tokens whose neighbours are looked up at a time, and rows of the table compared with them.
_QUERIES, _ROWS = 64, 16384


class Drawn(NamedTuple):
    """The actions that were drawn, for the score of rates that learn."""

    action: Tensor  # [m, B, T], an index in KINDS; -1: no edit
    free: Tensor  # [m, B, T] bool: an action could be drawn
    possible: Tensor  # [B, T, #kinds] bool: an edit of this kind could be


class Edited(NamedTuple):
    """Edited samples of a batch, padded on the right to the longest."""

    ids: Tensor  # [m, B, L]
    attention_mask: Tensor | None  # [m, B, L]
    position_ids: Tensor | None  # [m, B, L]
    source: Tensor  # [m, B, T], the index in L at which label t + 1 is predicted
    origin: Tensor  # [m, B, L], the index in T at which a place was laid down; -1: at none
    drawn: Drawn

    def of_places(self, values: Tensor) -> Tensor:
        """Return tokens' values [B, T] at the places of the copies: [m, B, L]."""
        return values.expand(len(self.origin), -1, -1).gather(2, self.origin.clamp_min(0))


class Edits(nn.Module):
    """Draws edits and applies them; it learns its rates, or nothing.

    rate_limits: the lowest and the highest sum of rates that learn; None: the rate stays.
    special: bool [V], the tokens that are neither edited nor drawn.
    max_positions: of the model; None is no limit.
    embed_dim, embed_rms: the embedding table's, by which a checkpoint knows its base.
    """

    special: Tensor
    drawable: Tensor
    embed_rms: Tensor

    def __init__(
        self,
        *,
        rate: float,
        kinds: Sequence[str],
        neighbors: int,
        rate_limits: tuple[float, float] | None,
        special: Tensor,
        max_positions: int | None,
        embed_dim: int,
        embed_rms: Tensor,
    ) -> None:
        super().__init__()
        self.rate, self.kinds, self.neighbors = rate, tuple(kinds), neighbors
        self.limits = rate_limits
        if rate_limits is not None:
            low, high = rate_limits
            share = torch.full((len(self.kinds),), (rate - low) / (high - low))
            self.rate_logits = nn.Parameter(torch.logit(share).to(embed_rms.device))
        self.max_positions, self.embed_dim = max_positions, embed_dim
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("drawable", (~special).nonzero()[:, 0], persistent=False)
        self.register_buffer("embed_rms", embed_rms)

    @untraced  # the number of edits varies
    @torch.no_grad()
    def forward(
        self,
        table: Tensor,  # [V, D], the input embeddings
        ids: Tensor,  # [B, T]
        seed: Tensor,
        samples: Tensor,  # [m] or [m, B]
        *,
        rows: Tensor,  # [B] or [B, T]
        positions: Tensor | None,  # [B, T], which key the noise
        editable: Tensor | None,  # [B, T] bool, where edits are allowed
        attention_mask: Tensor | None,  # [B, T]
        position_ids: Tensor | None,  # [B, T], for the model; they restart with a document
    ) -> Edited:
        """Return the samples with these numbers."""
        ids = ids.long()
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.bool()
        editable = torch.ones_like(real) if editable is None else editable
        allowed = ~self.special[ids] & editable
        first, start = _documents(real, position_ids)
        words = self._words(ids, seed, samples, rows, positions)
        before_fixed = F.pad((real & ~editable)[:, 1:], (0, 1))
        possible = self._possible(first, before_fixed)
        action, second = self._actions(words, allowed, possible, first)  # [m, B, T]
        drawn = Drawn(action, allowed & ~second, possible)
        action = self._with_room(action, real, start, position_ids)
        tokens = self._tokens(table, ids, action, second & allowed, words[2])

        is_laid = real.flip(1).cumsum(1).flip(1) > 0  # all but padding on the right
        inserted = action == _INSERT
        count = (is_laid & (action != _DELETE)).long() + inserted
        end = count.cumsum(-1)
        length = max(ids.shape[1], int(end[..., -1].max()))
        at = (end - 1).where(count > 0, length)
        before = (end - 2).where(inserted, length)

        def laid(values: Tensor, extra: Tensor | int, empty: int = 0) -> Tensor:
            """Scatter each position's value [m, B, T] to its place in L, and those inserted."""
            shape = (*values.shape[:2], length + 1)  # the last place is dropped
            out = values.new_full(shape, empty)
            out.scatter_(2, at, values)
            extra = torch.as_tensor(extra, dtype=out.dtype, device=out.device)
            return out.scatter_(2, before, extra.expand_as(before))[..., :length]

        mask = places = None
        if attention_mask is not None:
            mask = laid(attention_mask.expand_as(action), 1)
        if position_ids is not None:
            before_start = (end - count).gather(2, start.expand_as(end))
            place = position_ids.gather(1, start) + end - 1 - before_start
            places = laid(place, place - 1)
        source = (end - 1 - (action == _SWAP).long()).clamp_min(0)
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(action)
        return Edited(
            laid(tokens, _pick(words[2], self.drawable)),
            mask,
            places,
            source,
            laid(index, index, empty=-1),
            drawn,
        )

    def rates(self) -> Tensor | None:
        """Return the probability of each kind of edit, if they learn: [#kinds], in fp64."""
        if self.limits is None:
            return None
        low, high = self.limits
        return (low + (high - low) * self.rate_logits.double().sigmoid()) / len(self.kinds)

    def score(self, drawn: Drawn) -> Tensor | None:
        """Return 0 at each place [m, B, T], with the gradient of log q; None if rates are fixed."""
        rates = self.rates()
        if rates is None or not torch.is_grad_enabled():
            return None
        kept = torch.log1p(-(drawn.possible * rates).sum(-1)).expand_as(drawn.action)  # [m, B, T]
        log_q = kept
        for index, kind in enumerate(self.kinds):
            log_q = torch.where(drawn.action == KINDS.index(kind), rates[index].log(), log_q)
        log_q = log_q.where(drawn.free, 0.0)
        return log_q - log_q.detach()

    def _words(
        self, ids: Tensor, seed: Tensor, samples: Tensor, rows: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return Philox's four words for each sample and position, each [m, B, T]."""
        shape = (ids.shape[0], ids.shape[1])
        m, b, t = noise.counters(
            samples, rows, positions, shape, antithetic=False, device=ids.device
        )
        block = torch.full((), _BLOCK, device=ids.device)
        counter = torch.broadcast_tensors(block, t, m[..., None], b)
        words = noise.philox(torch.stack(counter, dim=-1), torch.stack([seed, seed >> 32]))
        return words.unbind(-1)

    def _possible(self, first: Tensor, before_fixed: Tensor) -> Tensor:
        """Return which kinds of edit a position may have: bool [B, T, #kinds]."""
        barred = {"delete": first, "swap": first | before_fixed}
        none = torch.zeros_like(first)
        return ~torch.stack([barred.get(kind, none) for kind in self.kinds], dim=-1)

    def _chosen(self, words: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return where an edit is drawn, and the number of its kind among ours: [m, B, T]."""
        rates = self.rates()
        if rates is None:
            return words[0] < round(self.rate * 2**32), words[1] * len(self.kinds) >> 32
        lower = torch.ones(len(rates), len(rates), device=rates.device).tril()
        edges = (lower * rates).sum(-1) / rates.sum() * 2**32  # CUDA's cumsum has no fixed order
        kind = torch.bucketize(words[1].double(), edges[:-1], right=True)
        return words[0] < rates.sum() * 2**32, kind

    def _actions(
        self, words: tuple[Tensor, ...], allowed: Tensor, possible: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each position's edit, and which positions are the second of a swap."""
        kinds = torch.tensor([KINDS.index(kind) for kind in self.kinds], device=allowed.device)
        is_edited, kind = self._chosen(words)
        may = possible.expand(*kind.shape, -1).gather(-1, kind[..., None])[..., 0]
        action = kinds[kind].where(allowed & is_edited & may, _KEEP)
        # Of neighbours that all drew a swap, every other one takes the next along.
        swaps = action == _SWAP
        index = torch.arange(swaps.shape[-1], device=swaps.device)
        run_start = index.where(~swaps, -1).cummax(-1).values
        swaps = swaps & ((index - run_start) % 2 == 1)
        second = F.pad(swaps[..., :-1], (1, 0)) & ~first
        return action.masked_fill(second, _KEEP), second

    def _with_room(
        self, action: Tensor, real: Tensor, start: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        """Drop the insertions that would take a document past the model's positions."""
        if self.max_positions is None:
            return action
        if position_ids is None:
            position_ids = torch.arange(real.shape[1], device=real.device).expand_as(real)
        last = torch.zeros_like(start).scatter_reduce_(
            1, start, position_ids.where(real, 0), "amax"
        )
        room = (self.max_positions - 1 - last.gather(1, start)).clamp_min(0)
        inserted = action == _INSERT
        excess = _so_far(inserted, start) - _so_far(action == _DELETE, start) - room
        return action.masked_fill(inserted & (excess > 0), _KEEP)

    def _tokens(
        self, table: Tensor, ids: Tensor, action: Tensor, trades: Tensor, word: Tensor
    ) -> Tensor:
        """Return each position's own token [m, B, T]; where `trades`, t and t - 1 trade places."""
        tokens = ids.expand_as(action)
        trades_with_next = F.pad(trades[..., 1:], (0, 1))
        tokens = torch.where(trades_with_next, ids.roll(-1, 1), tokens)
        tokens = torch.where(trades, ids.roll(1, 1), tokens)
        replaced = action == _REPLACE
        unique, index = tokens[replaced].unique(return_inverse=True)
        near = nearest(table, unique, self.neighbors, self.special)
        chosen = word[replaced] * near.shape[1] >> 32
        return tokens.masked_scatter(replaced, near[index, chosen])

    def extra_repr(self) -> str:
        rates = self.rates()
        rate = f"rate={self.rate:g}"
        if rates is not None:
            rate = f"rates={[round(value, 4) for value in rates.tolist()]}, limits={self.limits}"
        return f"{rate}, kinds={self.kinds}, neighbors={self.neighbors}"


@torch.no_grad()
def nearest(table: Tensor, tokens: Tensor, count: int, special: Tensor) -> Tensor:  # [U, count]
    """Return the `count` other tokens most similar by cosine to each of `tokens`, none special.

    They are looked up anew at each call, so the result follows a table that trains. A token costs
    as much as one position in the LM head.
    """
    count = min(count, int((~special).sum()) - 1)
    indices = []
    # Neither autocast nor a call's other tokens (blocks have one size) may change a similarity.
    with torch.autocast(table.device.type, enabled=False):
        for block in F.pad(tokens, (0, -len(tokens) % _QUERIES)).split(_QUERIES):
            query = F.normalize(table[block].float(), dim=-1)
            parts = [query @ F.normalize(part.float(), dim=-1).T for part in table.split(_ROWS)]
            similarity = torch.cat(parts, dim=1).masked_fill_(special, -torch.inf)
            similarity.scatter_(1, block[:, None], -torch.inf)
            indices.append(similarity.topk(count).indices)
    return torch.cat(indices)[: len(tokens)]


def _documents(real: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which tokens begin a document, and where each token's document begins: [B, T]."""
    if position_ids is None:
        first = real & (real.cumsum(1) == 1)
    else:
        first = document_starts(position_ids, real)
    index = torch.arange(real.shape[1], device=real.device)
    return first, index.where(first, 0).cummax(1).values


def _so_far(events: Tensor, start: Tensor) -> Tensor:
    """Count a document's events [m, B, T] up to each position."""
    total = events.cumsum(-1)
    return total - (total - events.long()).gather(2, start.expand_as(total))


def _pick(word: Tensor, choices: Tensor) -> Tensor:
    return choices[word * len(choices) >> 32]
