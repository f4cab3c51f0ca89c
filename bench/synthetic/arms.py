"""What the study trains: every arm of every experiment, each once for each seed.

An arm's `line` and `x` say where it stands in its experiment's table and picture. Arms of
different experiments that are the same training are trained once.

At equal flops every arm has the demo's 1300 steps and sends 1300 x 256 x 16 (row, draw) pairs
through the net: what an equation saves in draws goes into larger batches. Steps, rate and
schedule then stay what they are for all, and a noisy equation gets the average that it needs.
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
DRAWS = 16  # the demo's, and what equal flops are equal to

EXACT = Method(name="exact", estimator="jensen", num_samples=1)
EQUATIONS = ("iwae", "jvi_clip", "quadratic", "mlmc", "sumo", "iwae + 10 quadratic", "jensen")
SCALES = (0.05, 0.07, 0.1, 0.15)
NOISE = (0.0, 0.1, 0.2, 0.3, 0.45)
SIZES = (500, 2_000, 8_000, 30_000, 120_000, None)
# Only a shift of a few numbers trains where the trunk is held.
HELD_STEPS = 800
LARGEST = 120_000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train, whose seeds make one row of a table."""

    experiment: str
    line: str
    x: float | None  # None: fresh pairs every step
    method: Method
    steps: int = STEPS
    setting: Setting = field(default_factory=Setting)

    def job(self, seed: int) -> Job:
        return Job(seed, self.method, self.steps, self.setting)


def learned(equation: str, num_samples: int, **options: Any) -> Method:
    quadratic = 0.0
    if equation == "iwae + 10 quadratic":
        equation, quadratic = "iwae", 10.0
    return Method(
        name="learned",
        transform="lowrank",
        estimator=equation,
        quadratic=quadratic,
        num_samples=num_samples,
        **options,
    )


def fixed(scale: float, num_samples: int = DRAWS, equation: str = "iwae") -> Method:
    return Method(
        name="fixed",
        transform="diagonal",
        estimator=equation,
        num_samples=num_samples,
        scale=scale,
    )


def all_arms() -> list[Arm]:
    """Every arm of the study, what matters most first."""
    return [
        Arm(experiment="draws", line="exact", x=1, method=EXACT),
        *by_draws(EQUATIONS[:5], (2, 4, 8, 16)),
        *fixed_scales(),
        *held_draws(),
        *equal_flops(),
        *held_sizes(),
        *held_noise(),
        *sizes(),
        *noise(),
        *latent_dims(),
        *by_draws(("iwae + 10 quadratic",), (4, 16)),
        *by_draws(("jensen",), (16,)),
    ]


def by_draws(equations: tuple[str, ...], draws: tuple[int, ...]) -> Iterator[Arm]:
    for equation in equations:
        for M in draws:
            yield Arm(experiment="draws", line=equation, x=M, method=learned(equation, M))


def fixed_scales() -> Iterator[Arm]:
    yield Arm(experiment="fixed", line="exact", x=0.0, method=EXACT)
    for M, scales in ((DRAWS, SCALES), (4, (*SCALES[1:], 0.2, 0.3))):
        for scale in scales:
            yield Arm(experiment="fixed", line=f"iwae, M = {M}", x=scale, method=fixed(scale, M))
    jensen = fixed(0.15, DRAWS, "jensen")
    yield Arm(experiment="fixed", line=f"jensen, M = {DRAWS}", x=0.15, method=jensen)


def equal_flops() -> Iterator[Arm]:
    arms = [("exact", EXACT)]
    for equation, draws in (
        ("iwae", (4, 8, 16)),
        ("jvi_clip", (4, 8, 16)),
        ("quadratic", (2, 16)),
        ("iwae + 10 quadratic", (4, 16)),
        ("mlmc", (16,)),
        ("sumo", (16,)),
        ("jensen", (16,)),
    ):
        arms += [(f"{equation}, M = {M}", learned(equation, M)) for M in draws]
    arms.append((f"fixed 0.1, M = {DRAWS}", fixed(0.1, DRAWS)))
    for line, method in arms:
        batch = round(BATCH * DRAWS / method.expected_draws)
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


def held_draws() -> Iterator[Arm]:
    for equation, draws in (
        ("iwae", (2, 4, 8, 16, 64)),
        ("jvi_clip", (2, 4, 8)),
        ("quadratic", (2, 4)),
        ("mlmc", (16,)),
    ):
        for M in draws:
            arm = held("held_draws", equation, M, LARGEST)
            yield replace(arm, line=equation, x=M)


def held_noise() -> Iterator[Arm]:
    for sd in NOISE:
        for equation, M in (("iwae", 16), ("jvi_clip", 8), ("quadratic", 2)):
            yield replace(held("held_noise", equation, M, LARGEST, noise_sd=sd), x=sd)


def held_sizes() -> Iterator[Arm]:
    for pairs in SIZES:
        for equation, M in (("jvi_clip", 8), ("quadratic", 2)):
            yield held("held_size", equation, M, pairs)


def held(experiment: str, equation: str, M: int, pairs: int | None, **truth: float) -> Arm:
    return Arm(
        experiment=experiment,
        line=f"{equation}, M = {M}",
        x=pairs,
        method=learned(equation, M),
        steps=HELD_STEPS,
        setting=Setting(pairs=pairs, true_trunk=True, **truth),
    )
