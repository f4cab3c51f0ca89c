"""`python -m bench.ranks.speed`: a logit matrix and a combined decode, against naive code.

    matrix    one context at a time; whole contexts in batches of one length; logit_matrix
    decode    15 tokens by a combination of 200 histories: every context encoded again at each
              step and all logits computed, against streams

Variants take turns, results are compared first, and the ratios are of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from transformers import AutoModelForCausalLM

from fastperturb import runs
from fastperturb.rank import ModelOracle, logit_matrix, write
from fastperturb.rank.ask.oracle import centred

BEGIN = (1,)


@dataclass(frozen=True)
class Options:
    """Time logit matrices and combined decodes."""

    base: str = "../shared/data/models/stories260K-hf"
    output_dir: Path = Path("runs/ranks/results")
    repeats: int = 7


def main(options: Options) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.base).eval()
    random = np.random.default_rng(0)
    vocab = model.config.vocab_size
    histories = [tuple(row) for row in random.integers(3, vocab, (50, 64)).tolist()]
    futures = [tuple(random.integers(3, vocab, random.integers(0, 9)).tolist()) for _ in range(50)]
    oracle = ModelOracle(model, prompt=BEGIN)
    matrix: dict[str, Callable[[], Any]] = {
        "one context at a time": lambda: one_by_one(model, histories, futures),
        "whole contexts in batches": lambda: in_batches(model, histories, futures),
        "logit_matrix": lambda: logit_matrix(oracle, histories, futures).values,
    }
    pool = [tuple(row) for row in random.integers(3, vocab, (200, 32)).tolist()]
    weights = random.dirichlet(np.ones(len(pool)))
    decode: dict[str, Callable[[], Any]] = {
        "contexts again at each step": lambda: decoded_again(model, pool, weights, 15),
        "streams": lambda: np.array(write(oracle, pool, weights, 15)),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "matrix": timed(matrix, options.repeats),
        "decode": timed(decode, options.repeats),
        "threads": torch.get_num_threads(),
        **runs.provenance(),
    }
    runs.write_json(options.output_dir / "speed.json", results)
    for name in ("matrix", "decode"):
        for row in results[name]:
            print(f"{name}: {row['way']}: {row['seconds']:.3f} s, {row['ratio']:.2f} of the last")


def timed(ways: dict[str, Callable[[], Any]], repeats: int) -> list[dict[str, Any]]:
    """Time each way `repeats` times in turn, having checked that all give the same result."""
    expected, *others = [run() for run in ways.values()]
    for result in others:
        np.testing.assert_allclose(result, expected, atol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    last = list(medians.values())[-1]
    return [{"way": way, "seconds": value, "ratio": value / last} for way, value in medians.items()]


@torch.no_grad()
def one_by_one(model: Any, histories: list[Any], futures: list[Any]) -> Any:
    rows = [
        [model(torch.tensor([BEGIN + h + f])).logits[0, -1].log_softmax(-1) for f in futures]
        for h in histories
    ]
    return centred(torch.stack([torch.stack(row) for row in rows])).numpy()


@torch.no_grad()
def in_batches(model: Any, histories: list[Any], futures: list[Any]) -> Any:
    log_probs = torch.empty(len(histories), len(futures), model.config.vocab_size)
    for length in sorted(set(map(len, futures))):
        columns = [column for column, future in enumerate(futures) if len(future) == length]
        pairs = [(row, column) for row in range(len(histories)) for column in columns]
        for first in range(0, len(pairs), 64):
            batch = pairs[first : first + 64]
            ids = torch.tensor([BEGIN + histories[row] + futures[column] for row, column in batch])
            logits = model(ids, logits_to_keep=1).logits[:, -1].log_softmax(-1)
            rows, batch_columns = zip(*batch)
            log_probs[list(rows), list(batch_columns)] = logits
    return centred(log_probs).numpy()


@torch.no_grad()
def decoded_again(model: Any, histories: list[Any], weights: Any, steps: int) -> Any:
    shares, written = torch.from_numpy(weights).float(), ()
    for _ in range(steps):
        ids = torch.tensor([BEGIN + history + written for history in histories])
        logits = model(ids, logits_to_keep=1).logits[:, -1]
        written += (int((shares @ centred(logits)).argmax()),)
    return np.array(written)


if __name__ == "__main__":
    main(tyro.cli(Options))
