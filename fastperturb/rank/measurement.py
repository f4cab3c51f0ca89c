"""What is measured of one model: its matrices' spectra, angles and sizes, and its combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastperturb.rank.angles import column_space_angles, row_space_angles
from fastperturb.rank.comparison import compare
from fastperturb.rank.matrix import LogitMatrix, logit_matrix
from fastperturb.rank.oracle import LogitOracle, Metered, Tokens
from fastperturb.rank.power_law import by_size, power_law
from fastperturb.rank.spectrum import Spectrum, spectrum
from fastperturb.rank.texts import pieces, shuffled, with_prefixes
from fastperturb.rank.truncation import kl_by_rank

# What counts of the singular values for the numerical rank, and how many directions are compared.
TOLERANCE, ANGLES = 0.01, 32


@dataclass(frozen=True)
class Questions:
    """What every model is asked: on the same, so that they can be compared."""

    histories: list[Tokens]
    targets: list[Tokens]
    futures: list[Tokens]
    shuffled_histories: list[Tokens]
    shuffled_futures: list[Tokens]

    @classmethod
    def of(
        cls,
        documents: Sequence[np.ndarray[Any, Any]],
        *,
        histories: int,
        history_tokens: int,
        futures: int,
        future_tokens: int,
        targets: int,
        seed: int,
    ) -> Questions:
        """Pieces of documents, and the same with their tokens in another order."""
        generator = np.random.default_rng(seed)
        length = max(history_tokens, future_tokens)
        found = pieces(documents, histories + targets + futures, length, generator)
        rows = [piece[:history_tokens] for piece in found[: histories + targets]]
        runs = [piece[:future_tokens] for piece in found[histories + targets :]]
        return cls(
            rows[:histories],
            rows[histories:],
            with_prefixes(runs),
            shuffled(rows[:histories], generator),
            with_prefixes(shuffled(runs, generator)),
        )


@dataclass(frozen=True)
class Measured:
    """The results of a model as JSON holds them, and its spectrum."""

    found: dict[str, Any]
    spectrum: Spectrum

    def line(self) -> str:
        """The gist of it."""
        exponent = self.found["exponent"]
        return (
            f"exponent {exponent['estimate']:.3f} [{exponent['low']:.3f}, {exponent['high']:.3f}], "
            f"{self.found['queries']:,} queries"
        )


def measure(
    oracle: LogitOracle,
    questions: Questions,
    *,
    top_k: int | None,
    steps: int,
    continuations: int,
    earlier: LogitOracle | None,
    seed: int,
) -> Measured:
    """Everything that there is to say of a model."""
    meter = Metered(oracle)
    top_k = None if top_k is None or top_k >= oracle.vocab_size else top_k
    both = [*questions.histories, *questions.targets]
    everything = logit_matrix(meter, both, questions.futures, top_k=top_k)
    count = len(questions.histories)
    real, targets = everything.select(slice(count)), everything.select(slice(count, None))
    nonsense = logit_matrix(
        meter, questions.shuffled_histories, questions.futures, top_k=everything.tokens
    )
    of_real = spectrum(real.values)
    found = {
        "spectrum": of_real.to_dict(),
        "rank": {"tolerance": TOLERANCE, "rank": of_real.rank(TOLERANCE)},
        "exponent": power_law(of_real, seed=seed).to_dict(),
        "kl": _kl(real, of_real),
        "angles": _angles(meter, questions, real, of_real, nonsense, top_k),
        "sizes": [each.to_dict() for each in by_size(real.values, tolerance=TOLERANCE)],
    }
    if questions.targets:
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
    return Measured({**found, "queries": meter.queries}, of_real)


def _kl(real: LogitMatrix, of_real: Spectrum) -> list[dict[str, Any]]:
    """In sample, and of every second history on directions that the others taught."""
    known, other = real.values[::2], real.values[1::2]
    of_known = spectrum(known)
    held_out = kl_by_rank(other, of_known, learned_from=known)
    return [kl_by_rank(real.values, of_real).to_dict(), held_out.to_dict()]


def _angles(
    meter: Metered,
    questions: Questions,
    real: LogitMatrix,
    of_real: Spectrum,
    nonsense: LogitMatrix,
    top_k: int | None,
) -> dict[str, Any]:
    """Of real and shuffled histories or futures, and of two halves of the real ones."""
    of_nonsense = spectrum(nonsense.values)
    others = logit_matrix(meter, questions.histories, questions.shuffled_futures, top_k=top_k)
    of_others = spectrum(others.values)
    halves = [real.values[::2], real.values[1::2]]
    of_halves = [spectrum(each) for each in halves]
    rank = min(
        ANGLES,
        *(len(each.singular_values) for each in (of_real, of_nonsense, of_others, *of_halves)),
    )
    found = {
        "histories and shuffled ones": row_space_angles(
            real.values, of_real, nonsense.values, of_nonsense, rank=rank
        ),
        "two halves of the histories": row_space_angles(
            halves[0], of_halves[0], halves[1], of_halves[1], rank=rank
        ),
        "futures and shuffled ones": column_space_angles(of_real, of_others, rank=rank),
    }
    return {name: each.to_dict() for name, each in found.items()}
