"""The models whose logit rank is compared: stories260K adapted to fiction, at equal steps.

    exact          plain LoRA
    jensen         isotropic noise of fixed scale; the loss is the mean of the samples' log-probs
    lowrank, mlp   a learned transform; the loss is the log of their mean probability (iwae)

Besides, all weights of the base are trained twice in a row: the first training is an earlier
checkpoint of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastperturb import PerturbConfig, train
from fastperturb.runs.workers import finished
from fastperturb.train import LoraOptions, TrainOptions

SEEDS = (0, 1, 2)
EARLIER, LATER = "earlier", "later"

_MARGINAL = PerturbConfig(num_samples=8, plan="batched", init_scale=0.2)
METHODS = {
    "exact": ("exact", _MARGINAL),
    "jensen": ("fixed", replace(_MARGINAL, estimator="jensen")),
    "lowrank": ("learned", _MARGINAL),
    "mlp": ("learned", replace(_MARGINAL, transform="mlp")),
}


def train_missing(base: str, texts: Path, folder: Path, *, workers: int) -> None:
    """Train every model without results; a training that was stopped resumes."""
    common = TrainOptions(
        model=base,
        data=(str(texts / "train.jsonl"),),
        eval_data=(str(texts / "valid.jsonl"),),
        eval_every=100,
        max_steps=300,
        save_every=100,
        batch_size=4,
        block_size=128,
        learning_rate=2e-3,
        transform_learning_rate=1e-2,
        device="cpu",
        resume="auto",
    )
    adapted = [
        [
            replace(
                common,
                method=method,
                perturb=perturb,
                seed=seed,
                output_dir=folder / f"{name}_{seed}",
            )
        ]
        for seed in SEEDS
        for name, (method, perturb) in METHODS.items()
    ]
    whole = replace(common, method="exact", lora=LoraOptions(rank=0), learning_rate=1e-3)
    first = replace(whole, output_dir=folder / EARLIER)
    second = replace(
        whole, model=str(folder / EARLIER / "model"), seed=1, output_dir=folder / LATER
    )
    missing = [
        (row,)
        for row in ([first, second], *adapted)
        if not (row[-1].output_dir / "results.json").exists()
    ]
    for _, done in finished(in_turn, missing, workers=workers) if missing else ():
        done.result()


def in_turn(trainings: Sequence[TrainOptions]) -> None:
    for options in trainings:
        train.run(options)
