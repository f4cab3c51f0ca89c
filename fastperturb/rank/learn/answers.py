"""Answers of an oracle, which is asked about every context only once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastperturb.rank.ask.oracle import LogitOracle, Metered, centred
from fastperturb.rank.types import Floats, Tokens


class Answers:
    """An oracle's centred logits by context, asked for only where they are not known.

    budget: the largest number of contexts to know in the end; None is no limit.
    known: the logits [V] of contexts that were asked before.
    """

    def __init__(
        self,
        oracle: LogitOracle,
        *,
        budget: int | None = None,
        known: Mapping[Tokens, Floats] | None = None,
    ) -> None:
        self.logits: dict[Tokens, Floats] = dict(known or {})
        self._oracle = Metered(oracle, budget)
        if budget is not None and budget < len(self.logits):
            raise ValueError(
                f"budget must cover the {len(self.logits)} contexts that known holds, got {budget}"
            )
        self._oracle.queries = len(self.logits)
        self.vocab_size = oracle.vocab_size

    def of(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Floats:
        """Return the logits of all pairs of histories of one length and futures [H, F, V]."""
        for unknown_futures, unknown_histories in self._unknown(histories, futures).items():
            self._ask(unknown_histories, unknown_futures)
        logits = [self.logits[history + future] for history in histories for future in futures]
        return np.array(logits).reshape(len(histories), len(futures), self.vocab_size)

    def rows(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> Floats:
        """Return the logits as a matrix whose columns are pairs (future, token) [H, F V]."""
        return self.of(histories, futures).reshape(len(histories), len(futures) * self.vocab_size)

    def _unknown(
        self, histories: Sequence[Tokens], futures: Sequence[Tokens]
    ) -> dict[tuple[Tokens, ...], list[Tokens]]:
        """Return the fewest grids, futures to histories, that cover the unknown pairs alone."""
        grids: dict[tuple[Tokens, ...], list[Tokens]] = {}
        for history in dict.fromkeys(histories):
            missing = tuple(future for future in futures if history + future not in self.logits)
            if missing:
                grids.setdefault(missing, []).append(history)
        return grids

    def _ask(self, histories: Sequence[Tokens], futures: Sequence[Tokens]) -> None:
        log_probs = self._oracle.log_probs(histories, futures)
        shape = (len(histories), len(futures), self.vocab_size)
        if log_probs.shape != shape:
            raise ValueError(
                f"the oracle must answer [H, F, V] = {list(shape)}, got {list(log_probs.shape)}"
            )
        logits = centred(log_probs.detach().cpu().double()).numpy()
        for history, rows in zip(histories, logits):
            for future, row in zip(futures, rows):
                if not np.isfinite(row).all():
                    raise ValueError(
                        f"the oracle's log-probs after {history + future} are not all finite: "
                        "logit rank needs a distribution that gives every token some probability"
                    )
                self.logits[history + future] = row
