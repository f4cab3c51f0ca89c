"""Training every method with every seed, in parallel on all cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from fastperturb.demo.methods import Method
from fastperturb.demo.training import Outcome, Setting, run_job
from fastperturb.runs.workers import finished as finished_tasks


@dataclass(frozen=True)
class Job:
    """One model to train. Field names are keys of saved results."""

    seed: int
    method: Method
    steps: int
    setting: Setting = field(default_factory=Setting)


def run_all(
    methods: Sequence[Method], seeds: Sequence[int], *, steps: int, workers: int
) -> dict[Method, list[Outcome]]:
    """Train every method with every seed; return outcomes by method, in the order of the seeds."""
    jobs = [Job(seed, method, steps) for method in methods for seed in seeds]
    # The longest jobs start first: at the end they would leave cores idle.
    jobs.sort(key=lambda job: cost(job.method), reverse=True)
    outcomes: dict[tuple[int, Method], Outcome] = {}
    total = sum(cost(job.method) for job in jobs)
    with tqdm(total=total, desc="training", bar_format=_BAR) as bar:
        for job, outcome in finished(jobs, workers=workers):
            outcomes[job.seed, job.method] = outcome
            bar.set_postfix_str(f"{len(outcomes)} of {len(jobs)} models")
            bar.update(cost(job.method))
    return {method: [outcomes[seed, method] for seed in seeds] for method in methods}


_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}"


def cost(method: Method) -> int:
    """Estimate the relative time of a step: a constant part, and one for each sample."""
    return 3 + round(method.expected_samples)


def finished(jobs: Sequence[Job], *, workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Yield each job with its outcome as it ends; jobs start in this order."""
    tasks = [(job.seed, job.method, job.steps, job.setting) for job in jobs]
    for index, future in finished_tasks(run_job, tasks, workers=workers):
        yield jobs[index], future.result()
