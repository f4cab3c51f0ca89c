"""All measurements of one model: its spectrum, exponent, KL by rank, angles and combinations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastperturb.rank.ask.oracle import LogitOracle, Metered
from fastperturb.rank.combine.comparison import compare
from fastperturb.rank.measure.angles import Angles, column_space_angles, row_space_angles
from fastperturb.rank.measure.exponents import power_law, submatrix_fits
from fastperturb.rank.measure.matrix import LogitMatrix, logit_matrix
from fastperturb.rank.measure.singular_values import Spectrum, spectrum
from fastperturb.rank.measure.truncation import kl_by_rank
from fastperturb.rank.texts import TextPieces
from fastperturb.rank.types import Integers, Logits

# Singular values above this share of the first count for the rank; and directions to compare.
TOLERANCE, ANGLES = 0.01, 32


@dataclass(frozen=True)
class RankMeasurement:
    """The measurements of a model.

    results: as results.json holds them.
    spectrum: that of the matrix of histories.
    tokens: the tokens of its columns [F, K]; None is all.
    """

    results: dict[str, Any]
    spectrum: Spectrum
    tokens: Integers | None

    def summary(self) -> str:
        """Return the exponent and its interval in a line."""
        exponent = self.results["exponent"]
        return (
            f"exponent {exponent['estimate']:.3f} [{exponent['low']:.3f}, {exponent['high']:.3f}]"
        )


def measure(
    oracle: LogitOracle,
    pieces: TextPieces,
    *,
    top_k: int | Integers | None = None,
    steps: int = 15,
    continuations: int = 4,
    earlier: LogitOracle | None = None,
    seed: int = 0,
) -> RankMeasurement:
    """Measure a model on pieces of text.

    top_k: the number of tokens to keep for each future; or, to compare with a model that was
        measured before, the tokens of that one.
    steps, continuations, earlier, seed: those of `compare`, and of `power_law`.
    """
    meter = Metered(oracle)
    if isinstance(top_k, int) and top_k >= oracle.vocab_size:
        top_k = None
    rows = [*pieces.histories, *pieces.targets]
    whole = logit_matrix(meter, rows, pieces.futures, top_k=top_k)
    count = len(pieces.histories)
    real, targets = whole.select(slice(count)), whole.select(slice(count, None))
    shuffled = logit_matrix(meter, pieces.shuffled_histories, pieces.futures, top_k=whole.tokens)
    real_spectrum = spectrum(real.values)
    exponent = power_law(real_spectrum, seed=seed)  # first, as it rejects small matrices
    halves = _Halves.of(real.values)
    truncated = [
        kl_by_rank(real.values, real_spectrum),
        kl_by_rank(halves.second, halves.first_spectrum, learned_from=halves.first),
    ]
    angles = _row_angles(halves, shuffled.values[1::2]) | _column_angles(meter, pieces, whole, real)
    sizes = submatrix_fits(real.values, real_spectrum, tolerance=TOLERANCE)
    results: dict[str, Any] = {
        "spectrum": real_spectrum.to_dict(),
        "rank": {"tolerance": TOLERANCE, "rank": real_spectrum.rank(TOLERANCE)},
        "exponent": exponent.to_dict(),
        "kl": [curve.to_dict() for curve in truncated],
        "angles": {name: pair.to_dict() for name, pair in angles.items()},
        "sizes": [size.to_dict() for size in sizes],
    }
    if pieces.targets:
        comparison = compare(
            meter,
            {"linear combination": real, "of shuffled histories": shuffled},
            targets,
            steps=steps,
            continuations=continuations,
            earlier=earlier,
            seed=seed,
        )
        results["generation"] = comparison.to_dict(seed=seed)
    results["queries"] = {"of the matrix": real.queries, "in all": meter.queries}
    return RankMeasurement(results, real_spectrum, whole.tokens)


@dataclass(frozen=True)
class _Halves:
    """Every second history of a matrix, the first included, and the others."""

    first: Logits
    second: Logits
    first_spectrum: Spectrum
    second_spectrum: Spectrum

    @classmethod
    def of(cls, values: Logits) -> _Halves:
        first, second = values[::2], values[1::2]
        return cls(first, second, spectrum(first), spectrum(second))


def _row_angles(halves: _Halves, shuffled_half: Logits) -> dict[str, Angles]:
    """Return angles from the first half to the second, and to shuffled histories of the second."""
    others = {
        "two halves of the histories": (halves.second, halves.second_spectrum),
        "one half and the other shuffled": (shuffled_half, spectrum(shuffled_half)),
    }
    first = halves.first_spectrum
    return {
        name: row_space_angles(
            halves.first, first, values, other, rank=_compared_directions(first, other)
        )
        for name, (values, other) in others.items()
    }


def _column_angles(
    meter: Metered, pieces: TextPieces, whole: LogitMatrix, real: LogitMatrix
) -> dict[str, Angles]:
    """Return angles from the first half of the futures to the second, and to shuffled futures."""
    shuffled = logit_matrix(
        meter,
        pieces.histories,
        pieces.shuffled_futures,
        top_k=None if whole.tokens is None else whole.tokens.shape[1],
    )
    half = real.values.shape[1] // 2
    first = spectrum(real.values[:, :half])
    others = {
        "two halves of the futures": spectrum(real.values[:, half:]),
        "one half and the other shuffled (futures)": spectrum(shuffled.values[:, half:]),
    }
    return {
        name: column_space_angles(first, other, rank=_compared_directions(first, other))
        for name, other in others.items()
    }


def _compared_directions(*spectra: Spectrum) -> int:
    return min(ANGLES, *(len(spectrum.singular_values) for spectrum in spectra))
