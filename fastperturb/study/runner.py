"""One run of a study: trained in its own folder, then judged; both are kept and not done again.

FOLDER/train/         what `fastperturb train` leaves, without its checkpoints
FOLDER/trained.json   steps, choice of the best, shift: the training is whole
FOLDER/judged.json    its measurements under each view and temperature
FOLDER/log.txt        what the training printed
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastperturb
from fastperturb import PerturbConfig, PerturbedLM, ops, runs, train
from fastperturb.checkpoint.atomic import digest
from fastperturb.checkpoint.pretrained import check_positions
from fastperturb.data import domains
from fastperturb.data.domains import Domain
from fastperturb.engine.architectures import understand
from fastperturb.eval import likelihood, models
from fastperturb.study.options import Run, StudyOptions
from fastperturb.train import methods
from fastperturb.train.report import METRICS_NAME, read_metrics

# What keys the noise of every judgement: methods of one family meet the same.
SEED = 0
# Tokens named as the most and the least moved, and the draws that tell.
_NAMED, _SCALE_DRAWS = 12, 64

Measurement = dict[str, Any]


class Texts(NamedTuple):
    """Digests of what is read, by which a text that was changed in its place is known."""

    training: str
    judging: str


def train_run(run: Run, folder: Path, texts: Texts) -> dict[str, Any]:
    """Train, or go on where a training was killed, or read what one left."""
    done = folder / "trained.json"
    if done.exists() and (before := read(done))["texts"] == texts.training:
        return before
    if done.exists():  # of other texts at the same place
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own, start = folder / "train", time.process_time()
    with logged(folder / "log.txt"):
        train.run(replace(run.options, output_dir=own, resume="auto"))
    results = read(own / "results.json")
    labelled = [line for line in read_metrics(own / METRICS_NAME) if "shift" in line]
    steps, options = results["steps"], run.options
    trained = {
        "learning_rate": options.learning_rate,
        "steps": steps,
        "best_step": results["best"]["step"],
        "validation_nll": results["best"]["nll"],
        "draws": run.draws,
        "token_passes": steps * options.batch_size * options.block_size * run.draws,
        "training_seconds": round(time.process_time() - start, 1),
        "shift": [[line["step"], line["shift"]] for line in labelled] if run.learned else [],
        "texts": texts.training,
        "trained_by": runs.provenance(),
    }
    runs.write_json(done, trained)
    shutil.rmtree(own / "checkpoints", ignore_errors=True)
    shutil.rmtree(own / "model", ignore_errors=True)
    return trained


def judge_run(
    run: Run, folder: Path, study: StudyOptions, with_noise: bool, texts: Texts
) -> dict[str, Any]:
    """Measure the best model of a training; with_noise: also under noise new to it."""
    trained = read(folder / "trained.json")
    done = folder / "judged.json"
    by = judged_by(study, texts, with_noise, trained["best_step"], trained["validation_nll"])
    if done.exists() and (before := read(done))["judged_by"] == by:
        return before
    start = time.process_time()
    with logged(folder / "log.txt"):
        lm, tokenizer = load_best(run, folder / "train" / "best")
        with models.autocast(lm, run.options.precision):
            judged = _judge(lm, tokenizer, run, study, with_noise=with_noise)
    seconds = round(time.process_time() - start, 1)
    judged |= {"judging_seconds": seconds, "judged_by": by}
    runs.write_json(done, judged)
    return judged


def _judge(
    lm: PerturbedLM, tokenizer: Any, run: Run, study: StudyOptions, *, with_noise: bool
) -> dict[str, Any]:
    judge = Judge(study, tokenizer)
    noisy = not run.options.has_one_sample
    measurements = judge.measure(lm, "as_trained", draws=study.draws if noisy else 1)
    if noisy:
        with lm.exact():
            measurements += judge.measure(lm, "without_noise", draws=1)
    scales = token_scales(lm, tokenizer) if run.learned else None
    if with_noise:
        scale = study.noise_scale or study.train.perturb.init_scale
        config = PerturbConfig(transform="diagonal", init_scale=scale)
        moved = fastperturb.wrap(lm.base, config).eval()
        measurements += judge.measure(moved, "noise_added", draws=study.draws)
    return {"token_scales": scales, "measurements": measurements}


def judge_base(study: StudyOptions, folder: Path, texts: Texts) -> list[Measurement]:
    """The model as it was given, which no run has trained."""
    options = study.train
    done = folder / "base.json"
    by = judged_by(study, texts, options.model, options.precision, options.attn_implementation)
    if not done.exists() or read(done)["judged_by"] != by:
        folder.mkdir(parents=True, exist_ok=True)
        with logged(folder / "log.txt"):
            base = methods.load_base(options).to(runs.torch_device(options.device))
            check_positions(options.model, base, study.reading.block_size)
            lm = fastperturb.wrap(base, PerturbConfig()).eval()
            judge = Judge(study, tokenizer_of(study))
            with lm.exact(), models.autocast(lm, options.precision):
                found = judge.measure(lm, "as_trained", draws=1)
        runs.write_json(done, {"measurements": found, "judged_by": by})
    measurements: list[Measurement] = read(done)["measurements"]
    return measurements


def judged_by(study: StudyOptions, texts: Texts, *others: Any) -> str:
    """Changes with what a judgement depends on."""
    told = study.to_dict()
    names = ("domains", "reading", "draws", "tuning_draws", "noise_scale")
    return digest([*texts, *others, *(told[name] for name in names)])[:16]


class Judge:
    """Likelihoods of every domain, at temperature 1 and at the one that the validation chose."""

    def __init__(self, study: StudyOptions, tokenizer: Any) -> None:
        self.study = study
        held_out = train.held_out_blocks(study.train, tokenizer)
        one_document = np.zeros(study.train.block_size, np.int64)
        self.validation = Domain("validation", held_out, [one_document] * len(held_out))
        self.domains = [
            domains.read(name, where, study.reading, tokenizer)
            for name, where in study.domains.items()
        ]

    def measure(self, lm: PerturbedLM, view: str, *, draws: int) -> list[Measurement]:
        batch_size = self.study.train.batch_size
        tuned = likelihood.tuned_temperature(
            lm,
            self.validation,
            num_samples=min(draws, self.study.tuning_draws),
            seed=SEED,
            batch_size=batch_size,
        )

        def at(domain: Domain, temperature: float) -> dict[str, Any]:
            found = likelihood.measure(
                lm,
                domain,
                num_samples=draws,
                seed=SEED,
                batch_size=batch_size,
                temperature=temperature,
            )
            return found.to_dict()

        return [
            {
                "view": view,
                "temperature": temperature,
                "tuned": is_tuned,
                "validation_nll": at(self.validation, temperature)["nll"],
                "domains": {domain.name: at(domain, temperature) for domain in self.domains},
            }
            for temperature, is_tuned in ((1.0, False), (tuned, True))
        ]


def load_best(run: Run, folder: Path) -> tuple[PerturbedLM, Any]:
    """The model that a training kept, and its tokenizer."""
    from transformers import AutoTokenizer

    options = run.options
    if not options.lora.rank:
        options = replace(options, model=str(folder))
    lm = fastperturb.load(methods.load_base(options), folder)
    lm = lm.to(runs.torch_device(options.device))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    return lm.eval(), tokenizer


def tokenizer_of(study: StudyOptions) -> Any:
    from transformers import AutoTokenizer

    options = study.train
    return AutoTokenizer.from_pretrained(
        options.tokenizer or options.model, trust_remote_code=options.trust_remote_code
    )


@torch.no_grad()
def token_scales(lm: PerturbedLM, tokenizer: Any) -> dict[str, list[tuple[str, float]]]:
    """E |T(e) - e| / |e| of single tokens: those that move most, and those that move least."""
    embed: Any = understand(lm.base).embed
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([number for number in range(len(tokenizer)) if number not in special])
    found: list[Tensor] = []
    for part in ids.to(embed.weight.device).split(1024):
        e = embed(part[:, None]).float()  # (N, 1, D)
        moved = ops.perturb_embed(e, None, lm.transform, SEED, _SCALE_DRAWS)
        length = e.norm(dim=-1).clamp_min(1e-12)  # a padding token's may be 0
        found.append(((moved - e).norm(dim=-1) / length).mean(0)[:, 0].cpu())
    scales = torch.cat(found)
    order = scales.argsort(descending=True)

    def named(chosen: Tensor) -> list[tuple[str, float]]:
        tokens = tokenizer.convert_ids_to_tokens(ids[chosen].tolist())
        return list(zip(tokens, scales[chosen].tolist()))

    return {"most": named(order[:_NAMED]), "least": named(order[-_NAMED:].flip(0))}


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What is printed within goes to a file: many runs at once would garble a terminal."""
    with (
        path.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            yield
        except Exception:
            traceback.print_exc(file=file)
            raise


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
