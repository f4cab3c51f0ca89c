"""`python -m bench.synthetic`: train what is missing, and write results, tables and pictures.

A run that was stopped continues: outcomes.jsonl and coverage.jsonl keep the finished parts.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from bench.synthetic import bias, context, coverage, outcomes, pictures, sampling, summary, table
from bench.synthetic.arms import SEEDS, all_arms
from bench.synthetic.baselines import baselines
from fastperturb import runs
from fastperturb.demo.training import BATCH

# Studies beside that of the estimators.
STUDIES = {"sampling": sampling, "context": context}


def run(folder: Path, *, study: str, workers: int, train: bool) -> None:
    arms = STUDIES[study].all_arms() if study in STUDIES else all_arms()
    if train:
        outcomes.train(arms, SEEDS, folder / "outcomes.jsonl", workers=workers)
    rows = summary.rows(arms, outcomes.read(folder / "outcomes.jsonl"))
    settings = dict.fromkeys(replace(arm.setting, batch=BATCH) for arm in arms)
    results = {
        "rows": rows,
        "baselines": [
            summary.baseline_row(setting, [baselines(seed, setting) for seed in SEEDS])
            for setting in settings
        ],
        "seeds": list(SEEDS),
        **runs.provenance(),
        "device": f"{runs.cpu_model()}, processes of one thread",
    }
    if study in STUDIES:
        results["comparisons"] = STUDIES[study].comparisons(rows)
    else:
        results["comparisons"] = summary.comparisons(rows)
        results["bias"] = bias.rows()
        results["coverage"] = replicated(folder / "coverage.jsonl")
        pictures.draw_all(results, folder)
    runs.write_json(folder / "results.json", results)
    (folder / "table.md").write_text(table.render(results), encoding="utf-8")
    print(f"wrote the results to {folder}")


def replicated(path: Path) -> list[dict[str, object]]:
    """Return the coverage of every design; replicate those that the file does not hold yet."""
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
    parser.add_argument("--study", choices=("estimators", *STUDIES), default="estimators")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true", help="only report on what is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A folder with files is welcome: it holds the outcomes to continue from.
    folder = runs.open_output_dir(options.output_dir, overwrite=True)
    run(folder, study=options.study, workers=options.workers, train=not options.no_training)
