"""`make bench`: every benchmark on this machine's best device, into one results.json.

It needs torch alone, so that it also runs on a GPU machine that has nothing else installed.
"""

import argparse
import itertools
from pathlib import Path

import torch

from bench import harness, heads, perturb_embed, wrapper
from fastperturb import runs


def run(output_dir: Path, *, overwrite: bool, repeats: int) -> None:
    folder = runs.open_output_dir(output_dir, overwrite=overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[harness.Row] = []
    for measured in itertools.chain(
        perturb_embed.rows(device, repeats=repeats),
        heads.rows(device, repeats=max(5, repeats // 4)),  # a hundred times longer each
        wrapper.rows(device, repeats=max(5, repeats // 4)),
    ):
        harness.show(measured)
        rows += measured
    payload = {**runs.provenance(), "rows": harness.as_json(rows)}
    runs.write_json(folder / "results.json", payload)
    print(f"\n{payload['device']}, commit {payload['commit']}: {folder / 'results.json'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    run(options.output_dir, overwrite=options.overwrite, repeats=options.repeats)
