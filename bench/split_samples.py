"""A training step whose samples are split over processes, against the same step in one of them.

    torchrun --nproc-per-node 2 -m bench.split_samples

A GPT-2-like model (frozen, with LoRA), batched, one thread a process on a CPU. While one process
works alone the others wait, so that it has the machine to itself.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import torch

from bench import harness
from bench.wrapper import Case, model_of
from fastperturb import PerturbConfig, runs, wrap
from fastperturb.train import distributed

CPU_CASE = Case(4, 256, 50257, 16, 2, 128, "float32")
GPU_CASE = Case(16, 2048, 128256, 32, 1, 1024, "bfloat16")


def rows(world: distributed.World, *, repeats: int) -> list[harness.Row]:
    torch.set_num_threads(1)
    case = GPU_CASE if world.device.type == "cuda" else CPU_CASE
    config = PerturbConfig(num_samples=case.M, plan="batched")
    alone, split = (wrap(model_of(case, world.device), config) for _ in range(2))
    module = distributed.distribute(split, world, "ddp")
    ids = torch.randint(case.V, (case.B, case.T), device=world.device)

    def one() -> None:
        if world.is_main:
            alone.zero_grad()
            alone(input_ids=ids, labels=ids, seed=5).loss.backward()

    def together() -> None:
        distributed.wait(world)
        split.zero_grad()
        module(input_ids=ids, labels=ids, seed=5).loss.backward()

    return harness.measure(
        "split_samples",
        [
            harness.Variant("one", "full", one, opaque=True),
            harness.Variant(f"mc={world.mc_size}", "full", together, opaque=True),
        ],
        x=asdict(case),
        least_bytes={},
        device=world.device,
        repeats=repeats,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/split_samples"))
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    world = distributed.start(mc=int(os.environ.get("WORLD_SIZE", 1)))
    measured = rows(world, repeats=options.repeats)
    if world.is_main:
        folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
        harness.show(measured, naive=["one"], floor=["one"])
        payload = {**runs.provenance(), "rows": harness.as_json(measured)}
        runs.write_json(folder / "results.json", payload)
    distributed.stop()
