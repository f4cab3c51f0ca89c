"""What is measured of one model: its matrices' spectra, angles and sizes, and its combinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastperturb.rank.ask.oracle import LogitOracle, Metered, Tokens
from fastperturb.rank.combine.comparison import compare
from fastperturb.rank.measure.angles import column_space_angles, row_space_angles
from fastperturb.rank.measure.matrix import logit_matrix
from fastperturb.rank.measure.power_law import by_size, power_law
from fastperturb.rank.measure.spectrum import Spectrum, spectrum
from fastperturb.rank.measure.truncation import kl_by_rank
from fastperturb.rank.texts import pieces, shuffled, with_prefixes

# What counts of the singular values for the numerical rank, and how many directions are compared.
TOLERANCE, ANGLES = 0.01, 32


@dataclass(frozen=True)
class Asked:
    """What every model is asked: on the same, so that they can be compared."""

    histories: list[Tokens]
    targets: list[Tokens]
    futures: list[Tokens]
    shuffled_histories: list[Tokens]
    shuffled_futures: list[Tokens]

    @classmethod
    def of(
        cls,
        documents: Sequence[NDArray[np.integer]],
        *,
        histories: int,
        history_tokens: int,
        futures: int,
        future_tokens: int,
        targets: int,
        seed: int,
    ) -> Asked:
        """Pieces of documents, and the same with their tokens in another order.

        Targets come from a fifth of the text that gives nothing else: other documents, but for
        one at most.
        """
        generator = np.random.default_rng(seed)
        found = pieces(documents, max(history_tokens, future_tokens), generator)
        spare = len(found) - histories - futures
        kept = len(found) - min(max(targets, len(found) // 5), spare) if targets else len(found)
        own = _different(found[kept:], history_tokens, targets, generator)
        rows = _different(found[:kept], history_tokens, histories, generator, without=own)
        runs = _different(found[:kept], future_tokens, futures, generator, without=rows)
        if min(spare, len(rows) - histories, len(runs) - futures, len(own) - targets) < 0:
            raise ValueError(
                f"the text has {len(found)} different pieces of "
                f"{max(history_tokens, future_tokens)} tokens, too few for {histories} histories, "
                f"{futures} futures and {targets} targets that differ: give more text, or ask for "
                "fewer, or for longer histories"
            )
        shuffled_runs = with_prefixes(shuffled(list(runs.values()), generator))
        given = list(rows.values())
        return cls(
            given,
            list(own.values()),
            with_prefixes(list(runs.values())),
            shuffled(given, generator),
            shuffled_runs,
        )


def _different(
    found: Sequence[Tokens],
    length: int,
    count: int,
    generator: np.random.Generator,
    *,
    without: Mapping[Tokens, Tokens] | None = None,
) -> dict[Tokens, Tokens]:
    """Up to `count` pieces at random, cut to a length at which they differ: the cut of each piece.

    without: pieces that are taken, whose cuts are not to come again.
    """
    taken = dict(without or {})
    cuts = set(taken.values())
    chosen: dict[Tokens, Tokens] = {}
    for number in generator.permutation(len(found)):
        piece, cut = found[number], found[number][:length]
        if len(chosen) < count and piece not in taken and cut not in cuts:
            chosen[piece] = cut
            cuts.add(cut)
    return chosen


@dataclass(frozen=True)
class Measured:
    """The results of a model as JSON holds them, its spectrum, and of which tokens that is."""

    found: dict[str, Any]
    spectrum: Spectrum
    tokens: NDArray[np.int64] | None

    def line(self) -> str:
        """The gist of it."""
        found = self.found["exponent"]
        return f"exponent {found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def measure(
    oracle: LogitOracle,
    asked: Asked,
    *,
    top_k: int | NDArray[np.int64] | None = None,
    steps: int = 15,
    continuations: int = 4,
    earlier: LogitOracle | None = None,
    seed: int = 0,
) -> Measured:
    """Everything that there is to say of a model. Arguments are those of the command's options.

    top_k: also the tokens of another model that was measured, to be compared with it.
    """
    meter = Metered(oracle)
    if isinstance(top_k, int) and top_k >= oracle.vocab_size:
        top_k = None
    both = [*asked.histories, *asked.targets]
    everything = logit_matrix(meter, both, asked.futures, top_k=top_k)
    count = len(asked.histories)
    real, targets = everything.select(slice(count)), everything.select(slice(count, None))
    nonsense = logit_matrix(meter, asked.shuffled_histories, asked.futures, top_k=everything.tokens)
    of_real = spectrum(real.values)
    exponent = power_law(of_real, seed=seed)  # before all else, as it may be refused
    halves = real.values[::2], real.values[1::2]
    of_halves = spectrum(halves[0]), spectrum(halves[1])
    cuts = [
        kl_by_rank(real.values, of_real),
        kl_by_rank(halves[1], of_halves[0], learned_from=halves[0]),
    ]
    shuffled_half = nonsense.values[1::2]
    of_rows = {
        "two halves of the histories": (halves[1], of_halves[1]),
        "one half and the other shuffled": (shuffled_half, spectrum(shuffled_half)),
    }
    other_futures = logit_matrix(
        meter,
        asked.histories,
        asked.shuffled_futures,
        top_k=None if everything.tokens is None else everything.tokens.shape[1],
    ).values
    half = real.values.shape[1] // 2
    of_first = spectrum(real.values[:, :half])
    of_columns = {
        "two halves of the futures": spectrum(real.values[:, half:]),
        "one half and the other shuffled (futures)": spectrum(other_futures[:, half:]),
    }
    angles = {
        name: row_space_angles(halves[0], of_halves[0], values, of, rank=_angled(of_halves[0], of))
        for name, (values, of) in of_rows.items()
    } | {
        name: column_space_angles(of_first, of, rank=_angled(of_first, of))
        for name, of in of_columns.items()
    }
    found = {
        "spectrum": of_real.to_dict(),
        "rank": {"tolerance": TOLERANCE, "rank": of_real.rank(TOLERANCE)},
        "exponent": exponent.to_dict(),
        "kl": [each.to_dict() for each in cuts],
        "angles": {name: each.to_dict() for name, each in angles.items()},
        "sizes": [each.to_dict() for each in by_size(real.values, of_real, tolerance=TOLERANCE)],
    }
    if asked.targets:
        compared = compare(
            meter,
            {"linear combination": real, "of shuffled histories": nonsense},
            targets,
            steps=steps,
            continuations=continuations,
            earlier=earlier,
            seed=seed,
        )
        found["generation"] = compared.to_dict(seed=seed)
    found["queries"] = {"of the matrix": real.queries, "in all": meter.queries}
    return Measured(found, of_real, everything.tokens)


def _angled(*spectra: Spectrum) -> int:
    """How many directions are compared."""
    return min(ANGLES, *(len(each.singular_values) for each in spectra))
