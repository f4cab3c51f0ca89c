"""Options of a small evaluation, and its results, for the tests of eval."""

import json

from fastperturb.eval.options import EvalOptions


def options_of(folder, output, **changes):
    """Return options to compare a learned and a plain model on two texts."""
    options = {
        "models": (f"learned={folder / 'learned'}", f"plain={folder / 'base'}"),
        "domains": (f"near={folder / 'near.txt'}", f"far={folder / 'far.txt'}"),
        "document_separator": "\n\n",
        "block_size": 16,
        "num_samples": 4,
        "device": "cpu",
        "output_dir": output,
    }
    return EvalOptions(**options | changes)


def results_of(output):
    return json.loads((output / "results.json").read_text())
