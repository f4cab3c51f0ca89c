"""The arms of the study: every training of every experiment, run once with each seed.

An arm's `line` and `x` are its place in the table and the picture of its experiment. Arms of
different experiments that are the same training are trained once.

At equal flops every arm has the demo's 1300 steps and sends 1300 x 256 x 16 (row, sample) pairs
through the net: an estimator with fewer samples gets larger batches. Steps, learning rate and
schedule are then the same for all, and a noisy estimator gets the averaging that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastperturb.demo.jobs import Job
from fastperturb.demo.methods import Method
from fastperturb.demo.training import BATCH, Setting

SEEDS = (0, 1, 2, 3, 4)
STEPS = 1300
SAMPLES = 16  # as in the demo; equal flops are those of so many samples

EXACT = Method(name="exact", estimator="jensen", num_samples=1)
ESTIMATORS = ("iwae", "jvi_clip", "quadratic", "mlmc", "sumo", "iwae + 10 quadratic", "jensen")
SCALES = (0.05, 0.07, 0.1, 0.15)
NOISE = (0.0, 0.1, 0.2, 0.3, 0.45)
SIZES = (500, 2_000, 8_000, 30_000, 120_000, None)
# With the trunk held only the few parameters of the transform train.
HELD_STEPS = 800
LARGEST = 120_000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train; its seeds make one row of a table. Field names are keys of results."""

    experiment: str
    line: str
    x: float | None  # None: fresh pairs every step
    method: Method
    steps: int = STEPS
    setting: Setting = field(default_factory=Setting)

    def job(self, seed: int) -> Job:
        return Job(seed, self.method, self.steps, self.setting)


def learned(estimator: str, num_samples: int, **options: Any) -> Method:
    options = {"transform": "lowrank", **options}
    quadratic = 0.0
    if estimator == "iwae + 10 quadratic":
        estimator, quadratic = "iwae", 10.0
    return Method(
        name="learned",
        estimator=estimator,
        quadratic=quadratic,
        num_samples=num_samples,
        **options,
    )


def fixed(scale: float, num_samples: int = SAMPLES, estimator: str = "iwae") -> Method:
    return Method(
        name="fixed",
        transform="diagonal",
        estimator=estimator,
        num_samples=num_samples,
        scale=scale,
    )


def all_arms() -> list[Arm]:
    """Return every arm of the study, the most important first."""
    return [
        Arm(experiment="draws", line="exact", x=1, method=EXACT),
        *by_samples(ESTIMATORS[:5], (2, 4, 8, 16)),
        *fixed_scales(),
        *held_samples(),
        *equal_flops(),
        *held_sizes(),
        *held_noise(),
        *sizes(),
        *noise(),
        *latent_dims(),
        *by_samples(("iwae + 10 quadratic",), (4, 16)),
        *by_samples(("jensen",), (16,)),
    ]


def by_samples(estimators: tuple[str, ...], samples: tuple[int, ...]) -> Iterator[Arm]:
    for estimator in estimators:
        for M in samples:
            yield Arm(experiment="draws", line=estimator, x=M, method=learned(estimator, M))


def fixed_scales() -> Iterator[Arm]:
    yield Arm(experiment="fixed", line="exact", x=0.0, method=EXACT)
    for M, scales in ((SAMPLES, SCALES), (4, (*SCALES[1:], 0.2, 0.3))):
        for scale in scales:
            yield Arm(experiment="fixed", line=f"iwae, M = {M}", x=scale, method=fixed(scale, M))
    jensen = fixed(0.15, SAMPLES, "jensen")
    yield Arm(experiment="fixed", line=f"jensen, M = {SAMPLES}", x=0.15, method=jensen)


def equal_flops() -> Iterator[Arm]:
    arms = [("exact", EXACT)]
    for estimator, samples in (
        ("iwae", (4, 8, 16)),
        ("jvi_clip", (4, 8, 16)),
        ("quadratic", (2, 16)),
        ("iwae + 10 quadratic", (4, 16)),
        ("mlmc", (16,)),
        ("sumo", (16,)),
        ("jensen", (16,)),
    ):
        arms += [(f"{estimator}, M = {M}", learned(estimator, M)) for M in samples]
    arms.append((f"fixed 0.1, M = {SAMPLES}", fixed(0.1, SAMPLES)))
    for line, method in arms:
        batch = round(BATCH * SAMPLES / method.expected_samples)
        setting = Setting(batch=batch)
        yield Arm(experiment="flops", line=line, x=batch, method=method, setting=setting)


def latent_dims() -> Iterator[Arm]:
    yield Arm(experiment="latent", line="exact", x=0, method=EXACT)
    for R in (1, 2, 4, 8, 16):
        method = learned("jvi_clip", 8, latent_dim=R)
        yield Arm(experiment="latent", line="jvi_clip, M = 8", x=R, method=method)


def noise() -> Iterator[Arm]:
    methods = {
        "exact": EXACT,
        "jvi_clip, M = 8": learned("jvi_clip", 8),
    }
    for sd in NOISE:
        for line, method in methods.items():
            setting = Setting(noise_sd=sd)
            yield Arm(experiment="noise", line=line, x=sd, method=method, setting=setting)


def sizes() -> Iterator[Arm]:
    methods = {
        "exact": EXACT,
        "learned": learned("jvi_clip", 8),
        "fixed 0.1": fixed(0.1, 8, "jvi_clip"),
    }
    for line, method in methods.items():
        for pairs in SIZES:
            setting = Setting(pairs=pairs)
            yield Arm(experiment="size", line=line, x=pairs, method=method, setting=setting)


def held_samples() -> Iterator[Arm]:
    for estimator, samples in (
        ("iwae", (2, 4, 8, 16, 64)),
        ("jvi_clip", (2, 4, 8)),
        ("quadratic", (2, 4)),
        ("mlmc", (16,)),
    ):
        for M in samples:
            arm = held("held_draws", estimator, M, LARGEST)
            yield replace(arm, line=estimator, x=M)


def held_noise() -> Iterator[Arm]:
    for sd in NOISE:
        for estimator, M in (("iwae", 16), ("jvi_clip", 8), ("quadratic", 2)):
            yield replace(held("held_noise", estimator, M, LARGEST, noise_sd=sd), x=sd)


def held_sizes() -> Iterator[Arm]:
    for pairs in SIZES:
        for estimator, M in (("jvi_clip", 8), ("quadratic", 2)):
            yield held("held_size", estimator, M, pairs)


def held(experiment: str, estimator: str, M: int, pairs: int | None, **truth: float) -> Arm:
    """Return an arm whose trunk is held at the truth."""
    return Arm(
        experiment=experiment,
        line=f"{estimator}, M = {M}",
        x=pairs,
        method=learned(estimator, M),
        steps=HELD_STEPS,
        setting=Setting(pairs=pairs, true_trunk=True, **truth),
    )
