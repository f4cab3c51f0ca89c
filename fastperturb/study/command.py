"""`fastperturb study`: every method trained alike on one domain, and judged on all of them.

A study trains each method and each control with each seed, at equal optimizer steps, and judges
the best step of each, which the validation text chose. The controls that a gain must stand beside
are always there: a temperature tuned on the validation text for every method; the baseline under
noise that it was not trained with; the baseline at other learning rates, stopped where it was
best; every perturbed model without its noise; a deterministic transform with the same parameters;
and the baseline at the compute of the others.

    OUTPUT/runs/...       one folder a training, see `runner`
    OUTPUT/results.json   everything that was measured, by document, with what was told
    OUTPUT/table.md       who gained what, with intervals, and the verdict
    OUTPUT/*.png          changes in and out of domain, M-curves, shift, token scales

Started again it goes on: what is finished is not run again, and a training that was killed
continues from its last checkpoint. Methods, seeds and domains may be added.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastperturb import runs
from fastperturb.checkpoint.atomic import digest
from fastperturb.data import Block, domains, evaluation_blocks
from fastperturb.eval import likelihood
from fastperturb.runs import workers
from fastperturb.study import runner
from fastperturb.study.options import Run, StudyOptions, essence, runs_of
from fastperturb.study.runner import Texts
from fastperturb.train import held_out_blocks

# What makes a study another one. Methods, seeds and domains may be added to it: each run and each
# judgement is known by what it was told.
_SETTLED = ("in_domain", "baseline")


def run(options: StudyOptions) -> int:
    folder = _open(options)
    # Texts and the base first: what cannot be read or judged should be known before training.
    unigrams, texts = read_texts(options)
    base = runner.judge_base(options, folder / "runs", texts)
    planned = runs_of(options)
    distinct = list({each.key: each for each in reversed(planned)}.values())[::-1]
    folders = {each.key: _folder(folder, each) for each in distinct}
    trained, failed = _all(
        runner.train_run,
        [(each, each.draws, (each, folders[each.key], texts)) for each in distinct],
        options,
        "training",
    )
    best = {_best_baseline(planned, trained, seed, options) for seed in options.seeds}
    judging = [
        (
            each,
            1 if each.options.has_one_sample else options.draws,
            (each, folders[each.key], options, each.key in best, texts),
        )
        for each in distinct
        if each.key in trained
    ]
    judged, unjudged = _all(runner.judge_run, judging, options, "judging")
    results = {
        "in_domain": options.in_domain,
        "domains": list(options.domains),
        "baseline": options.baseline,
        "seeds": list(options.seeds),
        "base": base,
        "unigram": unigrams,
        "cells": [
            _cell(each, options) | trained[each.key] | judged[each.key]
            for each in planned
            if each.key in judged
        ],
        "config": options.to_dict(),
        "cpu_seconds": round(
            sum(each["training_seconds"] for each in trained.values())
            + sum(each["judging_seconds"] for each in judged.values())
        ),
        **runs.provenance(),
    }
    report(results, folder)
    for name, error in (failed | unjudged).items():
        print(f"failed: {name}: {error}; its log.txt in {folder / 'runs'} says more")
    return 1 if failed or unjudged else 0


def report(results: dict[str, Any], folder: Path) -> None:
    """What follows from the measurements: the verdict, the table and the pictures."""
    from fastperturb.study import pictures, summary, table

    results["summary"] = summary.summarise(results)
    runs.write_json(folder / "results.json", results)
    text = table.markdown(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    pictures.draw(results, folder)
    print(text)
    print(f"results.json, table.md and pictures are in {folder}")


def read_texts(options: StudyOptions) -> tuple[dict[str, dict[str, Any]], Texts]:
    """Every domain under token frequencies, the training text's and its own; and all digests."""
    tokenizer, train = runner.tokenizer_of(options), options.train
    blocks = evaluation_blocks(train.data, train, tokenizer)
    if train.max_tokens is not None:
        blocks = blocks[: -(-train.max_tokens // train.block_size)]
    counts = likelihood.label_counts(blocks, len(tokenizer))
    held_out = content(held_out_blocks(train, tokenizer))
    found: dict[str, dict[str, Any]] = {"training": {}, "own": {}}
    judged = [held_out]
    for name, where in options.domains.items():
        domain = domains.read(name, where, options.reading, tokenizer)
        own = likelihood.label_counts(domain.blocks, len(tokenizer))
        found["training"][name] = likelihood.unigram(domain, counts).to_dict()
        found["own"][name] = likelihood.unigram(domain, own, smoothing=0.0).to_dict()
        judged.append(content(domain.blocks))
    return found, Texts(digest([content(blocks), held_out])[:16], digest(judged)[:16])


def content(blocks: Sequence[Block]) -> str:
    """A digest of the tokens."""
    found = hashlib.sha256()
    for block in blocks:
        found.update(block.tokens.tobytes())
    return found.hexdigest()


def _open(options: StudyOptions) -> Path:
    """The output folder: new, or that of this same study, to go on with."""
    folder, settled = options.output_dir, options.output_dir / "study.json"
    told = {"train": essence(options.train), **{k: getattr(options, k) for k in _SETTLED}}
    if settled.exists() and not options.overwrite:
        before = runner.read(settled)
        other = [key for key in told if before.get(key) != told[key]]
        if other:
            raise FileExistsError(
                f"output_dir {folder} holds a study with other {', '.join(other)}: name another "
                "folder, or start anew with --overwrite"
            )
        return folder
    runs.open_output_dir(folder, overwrite=options.overwrite)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    runs.write_json(settled, told)
    return folder


def _folder(folder: Path, run: Run) -> Path:
    """Of a run, which is known by its key, whatever its method was called before."""
    name = re.sub(r"[^\w.]+", "_", f"{run.method} seed {run.seed} {run.key}")
    return next((folder / "runs").glob(f"*_{run.key}"), folder / "runs" / name)


def _best_baseline(
    planned: Sequence[Run], trained: dict[str, dict[str, Any]], seed: int, options: StudyOptions
) -> str:
    """The key of the baseline whose learning rate did best on the validation text."""
    rates = [
        each
        for each in planned
        if each.seed == seed
        and each.key in trained
        and (each.method == options.baseline or each.control == "learning_rate")
    ]
    if not rates:
        raise ChildProcessError(
            f"every training of the baseline {options.baseline!r} failed with seed {seed}: see "
            f"the log.txt of its folders in {options.output_dir / 'runs'}"
        )
    # As the summary chooses: of equal ones the lowest rate.
    return min(
        rates,
        key=lambda each: (trained[each.key]["validation_nll"], each.options.learning_rate),
    ).key


def _cell(run: Run, options: StudyOptions) -> dict[str, Any]:
    role = "baseline" if run.method == options.baseline else "control" if run.control else "method"
    return {
        "method": run.method,
        "seed": run.seed,
        "role": role,
        "control": run.control,
        "of": run.of,
        "learned": run.learned,
        "run": run.key,
    }


def _all(
    work: Callable[..., dict[str, Any]],
    tasks: Sequence[tuple[Run, int, tuple[Any, ...]]],  # of which run, its cost, arguments
    options: StudyOptions,
    doing: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, BaseException]]:
    """Each run's result by its key, and the errors of those that failed, by their names."""
    ordered = sorted(tasks, key=lambda task: task[1], reverse=True)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, BaseException] = {}
    # Processes would not share a GPU's memory well.
    on_gpu = runs.torch_device(options.train.device).type == "cuda"
    count = options.workers or (1 if on_gpu else workers.cores())
    done = workers.finished(work, [arguments for _, _, arguments in ordered], workers=count)
    for index, future in tqdm(done, desc=doing, total=len(ordered)):
        run, error = ordered[index][0], future.exception()
        if error is None:
            found[run.key] = future.result()
        else:
            failed[run.name] = error
    return found, failed
