"""`python -m bench.synthetic`: trains what is missing, and writes results, tables and pictures.

A run that was stopped goes on where it was: outcomes.jsonl and coverage.jsonl keep what is done.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from bench.synthetic import bias, coverage, draw, outcomes, summary, table
from bench.synthetic.arms import SEEDS, all_arms
from bench.synthetic.baselines import baselines
from fastperturb import runs
from fastperturb.demo.training import BATCH


def run(folder: Path, *, workers: int, train: bool) -> None:
    arms = all_arms()
    if train:
        outcomes.train(arms, SEEDS, folder / "outcomes.jsonl", workers=workers)
    lines = summary.rows(arms, outcomes.read(folder / "outcomes.jsonl"))
    truths = dict.fromkeys(replace(arm.setting, batch=BATCH) for arm in arms)
    beside = {truth: [baselines(seed, truth) for seed in SEEDS] for truth in truths}
    results = {
        "rows": lines,
        "baselines": [summary.baseline_row(*each) for each in beside.items()],
        "comparisons": summary.comparisons(lines),
        "bias": bias.rows(),
        "coverage": replicated(folder / "coverage.jsonl"),
        "seeds": list(SEEDS),
        **runs.provenance(),
        "device": f"{runs.cpu_model()}, processes of one thread",
    }
    runs.write_json(folder / "results.json", results)
    (folder / "table.md").write_text(table.render(results), encoding="utf-8")
    draw.draw_all(results, folder)
    print(f"wrote results.json, table.md and pictures to {folder}")


def replicated(path: Path) -> list[dict[str, object]]:
    """Every design's coverage; those that the file holds are not replicated again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {(row["name"], row["examples"]): row for row in map(json.loads, lines)}
    with path.open("a", encoding="utf-8") as file:
        for design in coverage.DESIGNS:
            name = (design.name, design.examples)
            if name not in done:
                done[name] = coverage.row(design)
                file.write(json.dumps(done[name], allow_nan=False) + "\n")
                file.flush()
    return [done[design.name, design.examples] for design in coverage.DESIGNS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true", help="report on what is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Its own outcomes are what a folder that holds files is for.
    folder = runs.open_output_dir(options.output_dir, overwrite=True)
    run(folder, workers=options.workers, train=not options.no_training)
