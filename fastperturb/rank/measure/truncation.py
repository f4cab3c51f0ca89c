"""What a model loses when its logit matrix is cut to rank r: the average KL divergence.

Rows of the matrix are replaced by their projections on a few directions, each (history, future)
gets its law p_r back by a softmax over its K tokens, and what counts is the mean over pairs of
KL(p || p_r). In sample the directions are the matrix's own leading right singular vectors; held
out they were learned on other histories, and only what low rank shares between histories helps.

With top-k columns p is the model's law given that the token is one of the K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastperturb.rank.measure.spectrum import (
    Floats,
    Spectrum,
    Values,
    check,
    column_blocks,
    row_blocks,
)

_COLUMNS = 1024  # at a time, or one future's: short runs of a memory map are slow to read
_CACHED = 1 << 16  # logits that many passes are made over at a time: 512 KiB, a core's cache


@dataclass(frozen=True)
class KLByRank:
    """The mean KL(p || p_r) in nats over all pairs of histories and futures, for some ranks r."""

    ranks: list[int]
    kl: list[float]
    held_out: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kl_by_rank(
    values: Values,
    spectrum: Spectrum,
    *,
    ranks: Sequence[int] | None = None,
    learned_from: Values | None = None,
) -> KLByRank:
    """The average KL of values [H, F, K] against rank.

    spectrum: of `values`, or of `learned_from`.
    ranks: default 0 (the uniform law), 1, 2, 4, ... and all that the spectrum has.
    learned_from: other histories [any, F, K], on the same futures, whose leading right singular
        vectors the rows are projected on (coefficients by least squares over all columns). Default:
        values' own, where the cut is the best of its rank in least squares.

    One future's columns are held for all the ranks at once, max(ranks) * K numbers in fp64.
    """
    check(values)
    held_out = learned_from is not None
    known = values if learned_from is None else learned_from
    if spectrum.shape != known.shape or known.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"spectrum is of {list(spectrum.shape)}, values are {list(values.shape)}"
            + (f" and learned_from {list(known.shape)}" if held_out else "")
            + ": the spectrum must be that of learned_from if given, else of values, and both must "
            "have the same futures and tokens"
        )
    most = len(spectrum.singular_values)
    if ranks is None:
        ranks = [0, *(2**n for n in range(most.bit_length()) if 2**n < most), most]
    if not len(ranks) or min(ranks) < 0 or max(ranks) > most or list(ranks) != sorted(set(ranks)):
        raise ValueError(
            f"ranks must rise from 0 or more to at most {most}, the spectrum's, got {list(ranks)}"
        )
    # The right singular vectors are V^T = to_right^T known, and rows of values have coordinates in
    # them: U S where they are values' own.
    to_right = spectrum.left[:, : ranks[-1]] / spectrum.singular_values[: ranks[-1]]
    if held_out:
        rows = np.zeros((len(values), ranks[-1]))
        for block, known_block in column_blocks(values, known):
            rows += block @ (known_block.T @ to_right)
    else:
        rows = to_right * spectrum.singular_values[: ranks[-1]] ** 2
    totals = np.zeros(len(ranks))
    step = max(1, _COLUMNS // values.shape[2])
    for first in range(0, values.shape[1], step):
        futures = slice(first, first + step)
        right = np.zeros((ranks[-1], known[0, futures].size))  # V^T, these columns
        for where, known_block in row_blocks(known, futures):
            right += to_right[where].T @ known_block
        for where, block in row_blocks(values, futures):
            totals += _summed_kl(block, rows[where], right, ranks, values.shape[2])
    pairs = values.shape[0] * values.shape[1]
    return KLByRank([int(each) for each in ranks], (totals / pairs).tolist(), held_out)


def _summed_kl(
    block: Floats, rows: Floats, right: Floats, ranks: Sequence[int], tokens: int
) -> Floats:
    """For each rank the KL summed over the pairs of a block [rows, futures * tokens].

    With d = L - L_r, what the cut leaves out, KL(p || p_r) = log E_p[exp(-d)] + E_p[d].
    """
    totals = np.zeros(len(ranks))
    step = max(32, _CACHED // block.shape[1])
    for some in (slice(first, first + step) for first in range(0, len(block), step)):
        logits = block[some].reshape(-1, tokens)
        log_p = logits - _log_sum_exp(logits)
        p, left_out, before = np.exp(log_p), block[some].copy(), 0
        for number, rank in enumerate(ranks):
            left_out -= rows[some, before:rank] @ right[before:rank]
            before = rank
            d = left_out.reshape(-1, tokens)
            totals[number] += _log_sum_exp(log_p - d).sum() + np.vdot(p, d)
    return totals


def _log_sum_exp(logits: Floats) -> Floats:
    """Over the last axis, which stays."""
    top = logits.max(-1, keepdims=True)
    found: Floats = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    return found
