"""Every method for every seed, on all cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from fastperturb.demo.methods import Method
from fastperturb.demo.training import Outcome, Setting, run_job
from fastperturb.runs.workers import finished as finished_tasks


@dataclass(frozen=True)
class Job:
    """One model to train."""

    seed: int
    method: Method
    steps: int
    setting: Setting = field(default_factory=Setting)


def run_all(
    methods: Sequence[Method], seeds: Sequence[int], *, steps: int, workers: int
) -> dict[Method, list[Outcome]]:
    """Outcomes of each method in the order of the seeds, whatever order the jobs end in."""
    jobs = [Job(seed, method, steps) for method in methods for seed in seeds]
    # Long ones last would leave cores idle.
    jobs.sort(key=lambda job: cost(job.method), reverse=True)
    found: dict[tuple[int, Method], Outcome] = {}
    total = sum(cost(job.method) for job in jobs)
    with tqdm(total=total, desc="training", bar_format=_BAR) as bar:
        for job, outcome in finished(jobs, workers=workers):
            found[job.seed, job.method] = outcome
            bar.set_postfix_str(f"{len(found)} of {len(jobs)} models")
            bar.update(cost(job.method))
    return {method: [found[seed, method] for seed in seeds] for method in methods}


_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}"


def cost(method: Method) -> int:
    """About what a step takes: its draws, and what it takes without any."""
    return 3 + round(method.expected_draws)


def finished(jobs: Sequence[Job], *, workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Each job and its outcome as it ends; they start in the order given."""
    tasks = [(job.seed, job.method, job.steps, job.setting) for job in jobs]
    for index, future in finished_tasks(run_job, tasks, workers=workers):
        yield jobs[index], future.result()
