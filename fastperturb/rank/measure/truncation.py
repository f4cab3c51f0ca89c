"""The average KL divergence of a model from its logit matrix truncated to rank r.

Rows of the matrix are replaced by their projections on r directions. A softmax over the K tokens of
each pair of a history and a future gives its distribution p_r, and the result is the mean over
pairs of KL(p || p_r). In sample, the directions are the matrix's own leading right singular
vectors. Held out, they were learned on other histories, so that only directions that histories
share help.

With top-k columns p is the model's distribution given that the token is one of the K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastperturb.rank.measure.singular_values import (
    Spectrum,
    check_logits,
    column_blocks,
    row_blocks,
)
from fastperturb.rank.types import Floats, Logits

_COLUMNS = 1024  # at a time, or one future's: short runs of a memory map are slow to read
_CACHED = 1 << 16  # logits at a time that all ranks pass over: 512 KiB, a core's cache


@dataclass(frozen=True)
class KLByRank:
    """The mean KL(p || p_r) in nats over all pairs of histories and futures, for some ranks r."""

    ranks: list[int]
    kl: list[float]
    held_out: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kl_by_rank(
    values: Logits,
    spectrum: Spectrum,
    *,
    ranks: Sequence[int] | None = None,
    learned_from: Logits | None = None,
) -> KLByRank:
    """Return the average KL of values [H, F, K] from their truncation, for each rank.

    spectrum: the spectrum of `learned_from` if given, else of `values`.
    ranks: default 0 (the uniform distribution), 1, 2, 4, ... and all that the spectrum has.
    learned_from: the logits of other histories [any, F, K], on the same futures, on whose leading
        right singular vectors the rows are projected (coefficients by least squares over all
        columns). Default: `values`, where the truncation is the best of its rank in least squares.

    One future's columns are held for all the ranks at once, max(ranks) * K numbers in fp64.
    """
    check_logits(values)
    basis = values if learned_from is None else learned_from
    held_out = learned_from is not None
    _check_spectrum(values, basis, spectrum, held_out)
    ranks = _checked_ranks(ranks, len(spectrum.singular_values))
    # The right singular vectors are V^T = to_right^T basis, and `rows` are the coordinates of
    # values in them: U S where values are their own basis.
    to_right = spectrum.to_right(ranks[-1])
    if held_out:
        rows = np.zeros((len(values), ranks[-1]))
        for block, basis_block in column_blocks(values, basis):
            rows += block @ (basis_block.T @ to_right)
    else:
        rows = to_right * spectrum.singular_values[: ranks[-1]] ** 2
    totals = np.zeros(len(ranks))
    step = max(1, _COLUMNS // values.shape[2])
    for first in range(0, values.shape[1], step):
        futures = slice(first, first + step)
        right = np.zeros((ranks[-1], basis[0, futures].size))  # V^T, these columns
        for where, basis_block in row_blocks(basis, futures):
            right += to_right[where].T @ basis_block
        for where, block in row_blocks(values, futures):
            totals += _summed_kl(block, rows[where], right, ranks, values.shape[2])
    pairs = values.shape[0] * values.shape[1]
    return KLByRank(ranks, (totals / pairs).tolist(), held_out)


def _check_spectrum(values: Logits, basis: Logits, spectrum: Spectrum, held_out: bool) -> None:
    if spectrum.shape != basis.shape or basis.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"spectrum is of {list(spectrum.shape)}, values are {list(values.shape)}"
            + (f" and learned_from {list(basis.shape)}" if held_out else "")
            + ": the spectrum must be that of learned_from if given, else of values, and both must "
            "have the same futures and tokens"
        )


def _checked_ranks(ranks: Sequence[int] | None, full: int) -> list[int]:
    """Return the ranks, by default 0, powers of 2 and the full rank; raise unless they rise."""
    if ranks is None:
        return [0, *(2**n for n in range(full.bit_length()) if 2**n < full), full]
    rising = [int(rank) for rank in ranks]
    if not rising or rising[0] < 0 or rising[-1] > full or rising != sorted(set(rising)):
        raise ValueError(
            f"ranks must rise from 0 or more to at most {full}, the spectrum's, got {rising}"
        )
    return rising


def _summed_kl(
    block: Floats, rows: Floats, right: Floats, ranks: Sequence[int], tokens: int
) -> Floats:
    """Return, for each rank, the KL summed over the pairs of a block [rows, futures * tokens].

    With d = L - L_r, the part that truncation drops, KL(p || p_r) = log E_p[exp(-d)] + E_p[d].
    """
    totals = np.zeros(len(ranks))
    step = max(32, _CACHED // block.shape[1])
    for first in range(0, len(block), step):
        part = slice(first, first + step)
        logits = block[part].reshape(-1, tokens)
        log_p = logits - _log_sum_exp(logits)
        p, dropped, lower = np.exp(log_p), block[part].copy(), 0
        for number, rank in enumerate(ranks):
            dropped -= rows[part, lower:rank] @ right[lower:rank]
            lower = rank
            d = dropped.reshape(-1, tokens)
            totals[number] += _log_sum_exp(log_p - d).sum() + np.vdot(p, d)
    return totals


def _log_sum_exp(logits: Floats) -> Floats:
    top = logits.max(-1, keepdims=True)
    result: Floats = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    return result
