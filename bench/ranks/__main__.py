"""`python -m bench.ranks`: train the models that are missing, measure all, and write tables.

    OUTPUT/methods/     `fastperturb rank` of the base and of every method and seed
    OUTPUT/base/        the same of the base on many histories, with combinations
    OUTPUT/later/       the same of the base trained twice, with the first training as `earlier`
    OUTPUT/summary.*    methods over seeds: JSON, a table and a picture

Each of the three folders is measured once: delete its table.md to measure again. The texts are
those of `python -m bench.studies.documents`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from bench.ranks import summary
from bench.ranks.training import EARLIER, LATER, METHODS, SEEDS, train_missing
from fastperturb import rank, runs
from fastperturb.rank import RankOptions


@dataclass(frozen=True)
class Options:
    """Measure logit ranks."""

    base: str = "../shared/data/models/stories260K-hf"
    texts: Path = Path("runs/texts/stories")
    models: Path = Path("runs/ranks/models")
    output_dir: Path = Path("runs/ranks/results")
    workers: int = 2


def main(options: Options) -> None:
    train_missing(options.base, options.texts, options.models, workers=options.workers)
    out, trained = options.output_dir, options.models
    common = RankOptions(
        models=(f"base={options.base}",),
        text=str(options.texts / "test.jsonl"),
        base=options.base,
        histories=300,
        futures=24,
        num_samples=16,
        targets=0,
        device="cpu",
        output_dir=out / "methods",
        overwrite=True,
    )
    adapted = [f"{name}_{seed}={trained / f'{name}_{seed}'}" for name in METHODS for seed in SEEDS]
    base = replace(
        common,
        text=str(options.texts / "train.jsonl"),
        histories=2000,
        futures=64,
        targets=16,
        output_dir=out / "base",
    )
    later = replace(
        base,
        models=(f"later={trained / LATER / 'model'}",),
        text=common.text,
        base=None,
        histories=1200,
        earlier=str(trained / EARLIER / "model"),
        output_dir=out / "later",
    )
    for measurement in (replace(common, models=(*common.models, *adapted)), base, later):
        if not (measurement.output_dir / "table.md").exists():
            rank.run(measurement)
    results: dict[str, Any] = json.loads((out / "methods" / "results.json").read_text())
    over_seeds = {**summary.over_seeds(results["models"]), **runs.provenance()}
    runs.write_json(out / "summary.json", over_seeds)
    (out / "summary.md").write_text(summary.table(over_seeds), encoding="utf-8")
    summary.draw(over_seeds, out / "summary.png")
    print(summary.table(over_seeds))


if __name__ == "__main__":
    main(tyro.cli(Options))
