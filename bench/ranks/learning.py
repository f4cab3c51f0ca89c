"""`python -m bench.ranks.learning`: models learned from logit queries, of known targets.

    exact     targets of rank 1 to 8, alphabets of 4 to 32 tokens, lengths 5 to 12: all 1856
    noisy     an oracle with Gaussian errors in its logits; tolerance at six times their size
    parity    bits, and the parity of a secret third of them, flipped one time in ten
    bounded   tolerance at the size of the noise, so that noise becomes ranks: with and without the
              bound on coefficients

The results go to OUTPUT/learning.json and learning.md. Distances are total variation, by
enumeration up to 100,000 sequences, else over 2000 samples of the target.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from bench.ranks.targets import Noisy, generic_ranks, sampled_distance, total_variation
from fastperturb import runs
from fastperturb.rank import ISAN, QueryBudgetSpent, learn
from fastperturb.rank.learn import noisy_parity
from fastperturb.report.table import aligned

LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Options:
    """Learn known targets."""

    output_dir: Path = Path("runs/ranks/results")


def main(options: Options) -> None:
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "exact": exact(),
        "noisy": noisy(),
        "parity": parity(),
        "bounded": bounded(),
        **runs.provenance(),
    }
    runs.write_json(options.output_dir / "learning.json", results)
    text = table(results)
    (options.output_dir / "learning.md").write_text(text, encoding="utf-8")
    print(text)


def exact() -> list[dict[str, Any]]:
    """Return a row for each rank, over all alphabets and lengths."""
    rows = []
    for rank in tqdm(range(1, 9), "exact"):
        learned = [
            learned_row(ISAN.random(V, T, rank, seed=rank))
            for V in range(4, 33)
            for T in range(5, 13)
        ]
        recovered = [row["ranks"] == generic_ranks(row["V"], row["T"], rank) for row in learned]
        queries = [row["queries"] for row in learned]
        rows.append(
            {
                "rank": rank,
                "targets": len(learned),
                "recovered": sum(recovered),
                "most_total_variation": max(row["total_variation"] for row in learned),
                "queries": [min(queries), median(queries), max(queries)],
                "seconds": median(row["seconds"] for row in learned),
            }
        )
    return rows


def noisy() -> list[dict[str, Any]]:
    return [
        {"noise": noise, "rank": rank, **learned_row(target, noise=noise, tolerance=6 * noise)}
        for V, T, rank in ((4, 8, 3), (4, 8, 6), (32, 12, 8))
        for target in [ISAN.random(V, T, rank, seed=1)]
        for noise in LEVELS
    ]


def parity() -> list[dict[str, Any]]:
    secrets = {bits: range(0, bits, 3) for bits in (5, 10, 20, 40)}
    return [
        {"bits": bits, **learned_row(noisy_parity(bits, secret, flip=0.1))}
        for bits, secret in secrets.items()
    ]


def bounded(lengths: Sequence[int] = (20, 30, 40), seeds: int = 3) -> list[dict[str, Any]]:
    """Return a row for each length, with and without the bound: medians over seeds."""
    rows = []
    for length in lengths:
        by_seed = []
        for seed in range(seeds):
            target = ISAN.random(4, length, 2, seed=seed)
            try:
                model = learn(Noisy(target, 0.03), length, tolerance=0.03, budget=300 * length)
            except QueryBudgetSpent as spent:
                model = spent.learned
            unbounded, sequences = model.to_isan(), target.sample(100, seed=1)
            prefixes = unbounded.prefixes(sequences[:, :-1])
            largest = max(np.abs(states).max() for _, states, _ in prefixes)
            distances = [sampled_distance(target, way, sequences) for way in (model, unbounded)]
            by_seed.append((largest, *distances))
        largest, with_bound, without = (median(values) for values in zip(*by_seed))
        rows.append(
            {
                "length": length,
                "noise": 0.03,
                "largest_coefficient_without": float(largest),
                "total_variation": with_bound,
                "total_variation_without": without,
            }
        )
    return rows


def learned_row(target: ISAN, *, noise: float = 0.0, tolerance: float = 1e-3) -> dict[str, Any]:
    oracle = Noisy(target, noise) if noise else target
    start = time.perf_counter()
    model = learn(oracle, target.length, tolerance=tolerance)
    return {
        "V": target.vocab_size,
        "T": target.length,
        "ranks": model.ranks,
        "queries": model.queries,
        "seconds": round(time.perf_counter() - start, 4),
        "total_variation": total_variation(target, model),
        "failed": model.failed,
    }


def table(results: dict[str, Any]) -> str:
    exact_rows = [
        [
            str(row["rank"]),
            f"{row['recovered']} of {row['targets']}",
            f"{row['most_total_variation']:.1e}",
            "{:,} / {:,.0f} / {:,}".format(*row["queries"]),
        ]
        for row in results["exact"]
    ]
    noisy_rows = [
        [
            f"{row['V']} tokens, length {row['T']}, rank {row['rank']}",
            f"{row['noise']:g}",
            str(max(row["ranks"])),
            f"{row['total_variation']:.4f}",
            f"{row['queries']:,}",
        ]
        for row in results["noisy"]
    ]
    parity_rows = [
        [str(row["bits"]), f"{row['queries']:,}", f"{row['total_variation']:.1e}"]
        for row in results["parity"]
    ]
    bounded_rows = [
        [
            str(row["length"]),
            f"{row['largest_coefficient_without']:.0f}",
            f"{row['total_variation_without']:.2f}",
            f"{row['total_variation']:.2f}",
        ]
        for row in results["bounded"]
    ]
    parts = {
        "Exact rank": [
            [
                "rank",
                "all ranks recovered",
                "largest total variation",
                "fewest / median / most queries",
            ],
            *exact_rows,
        ],
        "Noisy oracle": [
            ["target", "noise", "learned rank", "total variation", "queries"],
            *noisy_rows,
        ],
        "Noisy parity": [["bits", "queries", "total variation"], *parity_rows],
        "Noise taken for ranks": [
            ["length", "largest coefficient, unbounded", "total variation, unbounded", "bounded"],
            *bounded_rows,
        ],
    }
    return "\n\n".join(f"## {title}\n\n{aligned(lines)}" for title, lines in parts.items()) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options))
