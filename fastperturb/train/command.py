"""`fastperturb train`: a base model, text and a method in; a model, its metrics and curves out.

    OUTPUT/model/                the model after the last step, for `fastperturb.load`
    OUTPUT/best/                 the model with the lowest held-out perplexity
    OUTPUT/checkpoints/step-N/   a model and the state from which --resume auto continues
    OUTPUT/metrics.jsonl         one line a step, and one an evaluation
    OUTPUT/results.json          evaluations, options, versions, device, commit
    OUTPUT/curves.png            plots of the metrics

`torchrun --nproc-per-node N -m fastperturb train ...` runs it on N processes.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastperturb import runs
from fastperturb.checkpoint.pretrained import load_tokenizer
from fastperturb.data import Block, TrainingData, evaluation_blocks, training_data
from fastperturb.train import distributed, state
from fastperturb.train.distributed import World
from fastperturb.train.options import TrainOptions


def run(options: TrainOptions) -> int:
    """Run `fastperturb train` and return the exit status."""
    world = distributed.start(mc=options.mc, device=options.device)
    if world.mesh is None and options.parallel == "fsdp":
        raise ValueError("parallel=fsdp shards over processes: start them by torchrun")
    if options.dry_run:
        dry_run(options, world)
    else:
        train(options, world)
    # Not after an error: other processes may wait in a collective that this one will not join.
    distributed.stop()
    return 0


def train(options: TrainOptions, world: World) -> None:
    """Train from the start or from the newest checkpoint, and write the output folder."""
    from fastperturb.train.loop import Loop
    from fastperturb.train.report import Report

    folder = options.output_dir
    if world.is_main:
        _open(options)
    distributed.wait(world)
    data, held_out, tokenizer = _read(options, world)
    loop = Loop(options, world, data, held_out, tokenizer, folder)
    saved = state.latest(folder / "checkpoints") if options.resume == "auto" else None
    saved_step = -1 if saved is None else saved.step
    distributed.check_same(world, saved_step, "the checkpoint to continue from")
    if saved is not None:
        loop.restore(saved)
    elif world.is_main:
        # A run that was killed before its first checkpoint may have left these.
        for name in ("best", "model"):
            shutil.rmtree(folder / name, ignore_errors=True)
    distributed.wait(world)
    with Report(
        folder,
        total_steps=loop.total_steps,
        report_to=options.report_to,
        config=options.to_dict(),
        start_step=loop.step,
        is_main=world.is_main,
        run_id=loop.run_id,
    ) as report:
        loop.run(report)
    loop.save_model(folder / "model")
    if world.is_main:
        _write_results(loop, folder)


def dry_run(options: TrainOptions, world: World) -> None:
    """Print the options, the number of steps and the estimated memory."""
    import yaml

    from fastperturb.train.dry_run import estimate
    from fastperturb.train.loop import Loop

    data, held_out, tokenizer = _read(options, world)
    loop = Loop(options, world, data, held_out, tokenizer, options.output_dir)
    memory = estimate(loop)
    if world.is_main:
        print(yaml.safe_dump(options.to_dict(), sort_keys=False), end="")
        print(f"steps: {loop.total_steps}")
        print(memory)


def _open(options: TrainOptions) -> None:
    """Make the output folder, or open that of a run to continue."""
    folder = options.output_dir
    runs.open_output_dir(folder, overwrite=options.overwrite or options.resume == "auto")
    if options.overwrite:
        # A later resume must not find the checkpoints of another run.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _read(options: TrainOptions, world: World) -> tuple[TrainingData, Sequence[Block], Any]:
    """Return training data, held-out blocks and the tokenizer; one process fills the caches."""
    tokenizer = load_tokenizer(
        options.tokenizer or options.model, trust_remote_code=options.trust_remote_code
    )
    if not world.is_main:
        distributed.wait(world)
    data = training_data(options, tokenizer, seed=options.seed)
    held_out = held_out_blocks(options, tokenizer) if options.eval_data else ()
    if world.is_main:
        distributed.wait(world)
    return data, held_out, tokenizer


def held_out_blocks(options: TrainOptions, tokenizer: Any) -> Sequence[Block]:
    """Return the blocks that a run is evaluated on."""
    eval_options = dataclasses.replace(options, split=options.eval_split or options.split)
    return evaluation_blocks(options.eval_data, eval_options, tokenizer)[: options.eval_blocks]


def _write_results(loop: Any, folder: Path) -> None:
    """Write results.json and curves.png, and print a summary."""
    from fastperturb.train import curves

    options: TrainOptions = loop.options
    runs.write_json(
        folder / "results.json",
        {
            "method": options.method,
            "steps": loop.step,
            "evaluations": loop.evaluations,
            "best": loop.best,
            "config": options.to_dict(),
            "perturbation": loop.lm.config.to_dict(),
            **runs.provenance(),
        },
    )
    curves.draw(folder / "metrics.jsonl", folder / "curves.png")
    print(f"{loop.step} steps of {options.method}; the model is in {folder / 'model'}")
    if loop.best is not None:
        best = loop.best
        print(
            f"held-out perplexity {loop.evaluations[-1]['perplexity']:.4g} at the end, "
            f"{best['perplexity']:.4g} at step {best['step']:.0f} ({folder / 'best'})"
        )
