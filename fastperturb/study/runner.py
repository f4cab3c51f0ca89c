"""One run of a study: trained in its own folder, then judged. Finished work is not done again.

FOLDER/train/         the output of `fastperturb train`, without its checkpoints
FOLDER/trained.json   steps, best step, shift; written when the training is finished
FOLDER/judged.json    measurements in each view and at each temperature
FOLDER/log.txt        the printed output of training and judging
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

from fastperturb import ops, runs, train
from fastperturb.checkpoint.atomic import digest
from fastperturb.checkpoint.pretrained import check_positions
from fastperturb.config import PerturbConfig
from fastperturb.data import domains
from fastperturb.data.domains import Domain
from fastperturb.engine.architectures import understand
from fastperturb.eval import likelihood, models
from fastperturb.model import PerturbedLM, wrap
from fastperturb.model import load as load_checkpoint
from fastperturb.study.options import StudyOptions, StudyRun
from fastperturb.train import methods
from fastperturb.train.report import METRICS_NAME, read_metrics

# Seed of the noise in every judgement, so that methods with the same latents get the same noise.
SEED = 0
# How many tokens are listed as the most and as the least shifted, and the samples behind it.
_LISTED_TOKENS, _SCALE_SAMPLES = 12, 64

Record = dict[str, Any]  # one measurement, as judged.json holds it


class TextDigests(NamedTuple):
    """Digests of the tokens that are read: they show if the text in a file was changed."""

    training: str
    judging: str


def train_run(run: StudyRun, folder: Path, texts: TextDigests) -> dict[str, Any]:
    """Train a run, continue a training that was killed, or read a finished one."""
    done = folder / "trained.json"
    if done.exists() and (before := read(done))["texts"] == texts.training:
        return before
    if done.exists():  # trained on other texts at the same place
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    output, start = folder / "train", time.process_time()
    with logged(folder / "log.txt"):
        train.run(replace(run.options, output_dir=output, resume="auto"))
    results = read(output / "results.json")
    with_shift = [line for line in read_metrics(output / METRICS_NAME) if "shift" in line]
    steps, options = results["steps"], run.options
    trained = {
        "learning_rate": options.learning_rate,
        "steps": steps,
        "best_step": results["best"]["step"],
        "validation_nll": results["best"]["nll"],
        "draws": run.num_samples,
        "token_passes": steps * options.batch_size * options.block_size * run.num_samples,
        "training_seconds": round(time.process_time() - start, 1),
        "shift": [[line["step"], line["shift"]] for line in with_shift] if run.learned else [],
        "texts": texts.training,
        "trained_by": runs.provenance(),
    }
    runs.write_json(done, trained)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    shutil.rmtree(output / "model", ignore_errors=True)
    return trained


def judge_run(
    run: StudyRun, folder: Path, study: StudyOptions, with_noise: bool, texts: TextDigests
) -> dict[str, Any]:
    """Measure the best model of a training; with_noise adds noise that it was not trained with."""
    trained = read(folder / "trained.json")
    done = folder / "judged.json"
    key = judgement_key(study, texts, with_noise, trained["best_step"], trained["validation_nll"])
    if done.exists() and (before := read(done))["judged_by"] == key:
        return before
    start = time.process_time()
    with logged(folder / "log.txt"):
        lm, tokenizer = load_best(run, folder / "train" / "best")
        with models.autocast(lm, run.options.precision):
            judged = _judge(lm, tokenizer, run, study, with_noise=with_noise)
    seconds = round(time.process_time() - start, 1)
    judged |= {"judging_seconds": seconds, "judged_by": key}
    runs.write_json(done, judged)
    return judged


def _judge(
    lm: PerturbedLM, tokenizer: Any, run: StudyRun, study: StudyOptions, *, with_noise: bool
) -> dict[str, Any]:
    judge = Judge(study, tokenizer)
    is_random = not run.options.has_one_sample
    measurements = judge.measure(lm, "as_trained", num_samples=study.draws if is_random else 1)
    if is_random:
        with lm.exact():
            measurements += judge.measure(lm, "without_noise", num_samples=1)
    scales = token_scales(lm, tokenizer) if run.learned else None
    if with_noise:
        scale = study.noise_scale or study.train.perturb.init_scale
        config = PerturbConfig(transform="diagonal", init_scale=scale)
        with_fixed_noise = wrap(lm.base, config).eval()
        measurements += judge.measure(with_fixed_noise, "noise_added", num_samples=study.draws)
    return {"token_scales": scales, "measurements": measurements}


def judge_base(study: StudyOptions, folder: Path, texts: TextDigests) -> list[Record]:
    """Measure the base model before any training."""
    options = study.train
    done = folder / "base.json"
    key = judgement_key(study, texts, options.model, options.precision, options.attn_implementation)
    if not done.exists() or read(done)["judged_by"] != key:
        folder.mkdir(parents=True, exist_ok=True)
        with logged(folder / "log.txt"):
            base = methods.load_base(options).to(runs.torch_device(options.device))
            check_positions(options.model, base, study.reading.block_size)
            lm = wrap(base, PerturbConfig()).eval()
            judge = Judge(study, tokenizer_of(study))
            with lm.exact(), models.autocast(lm, options.precision):
                records = judge.measure(lm, "as_trained", num_samples=1)
        runs.write_json(done, {"measurements": records, "judged_by": key})
    measurements: list[Record] = read(done)["measurements"]
    return measurements


def judgement_key(study: StudyOptions, texts: TextDigests, *others: Any) -> str:
    """Return a digest of everything that a judgement depends on."""
    options = study.to_dict()
    names = ("domains", "reading", "draws", "tuning_draws", "noise_scale")
    return digest([*texts, *others, *(options[name] for name in names)])[:16]


class Judge:
    """Measures models on every domain, at temperature 1 and at the best one on validation text."""

    def __init__(self, study: StudyOptions, tokenizer: Any) -> None:
        self.study = study
        held_out = train.held_out_blocks(study.train, tokenizer)
        one_document = np.zeros(study.train.block_size, np.int64)
        self.validation = Domain("validation", held_out, [one_document] * len(held_out))
        self.domains = [
            domains.read(name, where, study.reading, tokenizer)
            for name, where in study.domains.items()
        ]

    def measure(self, lm: PerturbedLM, view: str, *, num_samples: int) -> list[Record]:
        """Return one record for each temperature."""
        batch_size = self.study.train.batch_size
        tuned = likelihood.tuned_temperature(
            lm,
            self.validation,
            num_samples=min(num_samples, self.study.tuning_draws),
            seed=SEED,
            batch_size=batch_size,
        )

        def at(domain: Domain, temperature: float) -> dict[str, Any]:
            return likelihood.measure(
                lm,
                domain,
                num_samples=num_samples,
                seed=SEED,
                batch_size=batch_size,
                temperature=temperature,
            ).to_dict()

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


def load_best(run: StudyRun, folder: Path) -> tuple[PerturbedLM, Any]:
    """Load the best model of a training, and its tokenizer."""
    from transformers import AutoTokenizer

    options = run.options
    if not options.lora.rank:
        options = replace(options, model=str(folder))
    lm = load_checkpoint(methods.load_base(options), folder)
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
    """Return E |T(e) - e| / |e| of the tokens that are shifted most, and of those shifted least."""
    embed: Any = understand(lm.base).embed
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([number for number in range(len(tokenizer)) if number not in special])
    parts: list[Tensor] = []
    for part in ids.to(embed.weight.device).split(1024):
        e = embed(part[:, None]).float()  # (N, 1, D)
        perturbed = ops.perturb_embed(e, None, lm.transform, SEED, _SCALE_SAMPLES)  # (M, N, 1, D)
        length = e.norm(dim=-1).clamp_min(1e-12)  # that of a padding token may be 0
        parts.append(((perturbed - e).norm(dim=-1) / length).mean(0)[:, 0].cpu())
    scales = torch.cat(parts)
    order = scales.argsort(descending=True)

    def named(chosen: Tensor) -> list[tuple[str, float]]:
        tokens = tokenizer.convert_ids_to_tokens(ids[chosen].tolist())
        return list(zip(tokens, scales[chosen].tolist()))

    return {
        "most": named(order[:_LISTED_TOKENS]),
        "least": named(order[-_LISTED_TOKENS:].flip(0)),
    }


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append printed output to a file: runs in parallel would garble the terminal."""
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
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
