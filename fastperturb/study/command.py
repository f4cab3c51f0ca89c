"""`fastperturb study`: train several methods alike on one domain, and evaluate all of them on all.

A study trains each method and each control with each seed, for equal optimizer steps, and
evaluates each at its best step on the validation text. A gain must exceed what these controls
gain, so they always run: a temperature tuned on the validation text for every method; the baseline
under noise that it was not trained with; the baseline at other learning rates; every perturbed
model without its noise; a deterministic transform with the same parameters; and the baseline at
the compute of the other methods.

    OUTPUT/runs/...       one folder per run, see `runner`
    OUTPUT/results.json   all measurements, by document, with the options
    OUTPUT/table.md       the changes with their intervals, and the verdicts
    OUTPUT/*.png          changes in and out of domain, curves by samples, shift, token scales

A study that is started again continues: finished runs are not repeated, and a training that was
killed continues from its last checkpoint. Methods, seeds and domains may be added.
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
from fastperturb.study.options import (
    StudyOptions,
    StudyRun,
    defining_options,
    planned_runs,
)
from fastperturb.study.runner import TextDigests
from fastperturb.train import held_out_blocks

# Options that cannot change within one output folder, besides those of train. Methods, seeds and
# domains may be added: runs and judgements are found again by a digest of their own options.
_FIXED = ("in_domain", "baseline")


def run(options: StudyOptions) -> int:
    """Train and judge what is not there yet, write the report, and return the exit status."""
    folder = _open(options)
    # Texts and the base come first: an error in them should appear before hours of training.
    unigrams, texts = read_texts(options)
    base = runner.judge_base(options, folder / "runs", texts)
    planned = planned_runs(options)
    distinct = list({run.key: run for run in reversed(planned)}.values())[::-1]
    folders = {run.key: _folder(folder, run) for run in distinct}
    trained, failed = _run_all(
        runner.train_run,
        [(run, run.num_samples, (run, folders[run.key], texts)) for run in distinct],
        options,
        "training",
    )
    best = {_best_baseline(planned, trained, seed, options) for seed in options.seeds}
    to_judge = [
        (
            run,
            1 if run.options.has_one_sample else options.draws,
            (run, folders[run.key], options, run.key in best, texts),
        )
        for run in distinct
        if run.key in trained
    ]
    judged, failed_to_judge = _run_all(runner.judge_run, to_judge, options, "judging")
    results = {
        "in_domain": options.in_domain,
        "domains": list(options.domains),
        "baseline": options.baseline,
        "seeds": list(options.seeds),
        "base": base,
        "unigram": unigrams,
        "cells": [
            _cell(run, options) | trained[run.key] | judged[run.key]
            for run in planned
            if run.key in judged
        ],
        "config": options.to_dict(),
        "cpu_seconds": round(
            sum(training["training_seconds"] for training in trained.values())
            + sum(judgement["judging_seconds"] for judgement in judged.values())
        ),
        **runs.provenance(),
    }
    report(results, folder)
    for name, error in (failed | failed_to_judge).items():
        print(f"failed: {name}: {error}; its log.txt in {folder / 'runs'} says more")
    return 1 if failed or failed_to_judge else 0


def report(results: dict[str, Any], folder: Path) -> None:
    """Add the summary to the results, and write results.json, table.md and the pictures."""
    from fastperturb.study import pictures, summary, table

    results["summary"] = summary.summarise(results)
    runs.write_json(folder / "results.json", results)
    text = table.markdown(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    pictures.draw(results, folder)
    print(text)
    print(f"results.json, table.md and pictures are in {folder}")


def read_texts(options: StudyOptions) -> tuple[dict[str, dict[str, Any]], TextDigests]:
    """Read all texts; return the unigram likelihoods of every domain, and digests of the texts.

    The unigrams have the token frequencies of the training text, and those of the domain itself.
    """
    tokenizer, train = runner.tokenizer_of(options), options.train
    blocks = evaluation_blocks(train.data, train, tokenizer)
    if train.max_tokens is not None:
        blocks = blocks[: -(-train.max_tokens // train.block_size)]
    counts = likelihood.label_counts(blocks, len(tokenizer))
    held_out = content(held_out_blocks(train, tokenizer))
    unigrams: dict[str, dict[str, Any]] = {"training": {}, "own": {}}
    judging = [held_out]
    for name, where in options.domains.items():
        domain = domains.read(name, where, options.reading, tokenizer)
        own = likelihood.label_counts(domain.blocks, len(tokenizer))
        unigrams["training"][name] = likelihood.unigram(domain, counts).to_dict()
        unigrams["own"][name] = likelihood.unigram(domain, own, smoothing=0.0).to_dict()
        judging.append(content(domain.blocks))
    training = [content(blocks), held_out]
    return unigrams, TextDigests(digest(training)[:16], digest(judging)[:16])


def content(blocks: Sequence[Block]) -> str:
    """Return a digest of the tokens."""
    tokens = hashlib.sha256()
    for block in blocks:
        tokens.update(block.tokens.tobytes())
    return tokens.hexdigest()


def _open(options: StudyOptions) -> Path:
    """Open the output folder: a new one, or that of this same study, to continue it."""
    folder, identity_file = options.output_dir, options.output_dir / "study.json"
    fixed = {name: getattr(options, name) for name in _FIXED}
    identity = {"train": defining_options(options.train), **fixed}
    if identity_file.exists() and not options.overwrite:
        before = runner.read(identity_file)
        differing = [key for key in identity if before.get(key) != identity[key]]
        if differing:
            raise FileExistsError(
                f"output_dir {folder} holds a study with other {', '.join(differing)}: name "
                "another folder, or start anew with --overwrite"
            )
        return folder
    runs.open_output_dir(folder, overwrite=options.overwrite)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    runs.write_json(identity_file, identity)
    return folder


def _folder(folder: Path, run: StudyRun) -> Path:
    """Return the folder of a run, found by its key: its method may have been renamed since."""
    name = re.sub(r"[^\w.]+", "_", f"{run.method} seed {run.seed} {run.key}")
    return next((folder / "runs").glob(f"*_{run.key}"), folder / "runs" / name)


def _best_baseline(
    planned: Sequence[StudyRun],
    trained: dict[str, dict[str, Any]],
    seed: int,
    options: StudyOptions,
) -> str:
    """Return the key of the baseline run whose learning rate is best on the validation text."""
    rates = [
        run
        for run in planned
        if run.seed == seed
        and run.key in trained
        and (run.method == options.baseline or run.control == "learning_rate")
    ]
    if not rates:
        raise ChildProcessError(
            f"every training of the baseline {options.baseline!r} failed with seed {seed}: see "
            f"the log.txt of its folders in {options.output_dir / 'runs'}"
        )
    # Ties go to the lowest rate, as in the summary.
    return min(
        rates,
        key=lambda run: (trained[run.key]["validation_nll"], run.options.learning_rate),
    ).key


def _cell(run: StudyRun, options: StudyOptions) -> dict[str, Any]:
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


def _run_all(
    work: Callable[..., dict[str, Any]],
    tasks: Sequence[tuple[StudyRun, float, tuple[Any, ...]]],  # run, cost, arguments of work
    options: StudyOptions,
    description: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, BaseException]]:
    """Work on all runs in parallel; return results by key, and errors by the name of the run."""
    ordered = sorted(tasks, key=lambda task: task[1], reverse=True)  # long ones last would wait
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, BaseException] = {}
    # One process at a time on a GPU, whose memory several would fight over.
    on_gpu = runs.torch_device(options.train.device).type == "cuda"
    count = options.workers or (1 if on_gpu else workers.cores())
    done = workers.finished(work, [arguments for _, _, arguments in ordered], workers=count)
    for index, future in tqdm(done, desc=description, total=len(ordered)):
        run, error = ordered[index][0], future.exception()
        if error is None:
            results[run.key] = future.result()
        else:
            failed[run.name] = error
    return results, failed
