"""`python -m bench.sampling`: measure what is missing, and write results.json.

A run that was stopped continues: units.jsonl keeps the finished units.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.sampling import measure, summary, texts
from bench.sampling.measure import Reference, Unit
from fastperturb import runs

# The text, the reach of a latent, and the transform, the most important first.
SETTINGS = (
    ("wikipedia", "token", "initial"),
    ("stories", "token", "initial"),
    ("wikipedia", "sequence", "initial"),
    ("stories", "sequence", "initial"),
    ("wikipedia", "token", "trained"),
)


def units(batches: int) -> list[Unit]:
    """Return all units: each setting's first batch, then each one's second, and so on."""
    return [Unit(*setting, number) for number in range(batches) for setting in SETTINGS]


def finished(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measure_missing(folder: Path, batches: int) -> None:
    path = folder / "units.jsonl"
    done = [Unit(**result["unit"]) for result in finished(path)]
    with path.open("a", encoding="utf-8") as file:
        for unit in units(batches):
            if unit in done:
                continue
            model = measure.model_of(unit)
            ids = texts.batch(unit.text, unit.number, batches)
            result = measure.measure(unit, model, ids, Reference.of(model, ids))
            file.write(json.dumps(result, allow_nan=False) + "\n")
            file.flush()
            print(f"measured {unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sampling"))
    parser.add_argument("--batches", type=int, default=8, help="batches of pieces a setting")
    parser.add_argument("--no-measuring", action="store_true", help="only report on what there is")
    options = parser.parse_args()
    measures = not options.no_measuring
    if measures and not texts.are_there():
        return
    torch.set_num_threads(1)
    # A folder with files is welcome: it holds the units to continue from.
    folder = runs.open_output_dir(options.output_dir, overwrite=True)
    if measures:
        measure_missing(folder, options.batches)
    results = {
        "rows": summary.rows(finished(folder / "units.jsonl")),
        **runs.provenance(),
        "device": f"{runs.cpu_model()}, one thread",
    }
    runs.write_json(folder / "results.json", results)


if __name__ == "__main__":
    main()
