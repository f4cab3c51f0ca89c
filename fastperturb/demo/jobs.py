"""Every method for every seed, on all cores: one job a process, one thread a job."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from fastperturb.demo.methods import Method
from fastperturb.demo.training import Outcome, run_job


def run_all(
    methods: Sequence[Method], seeds: Sequence[int], *, steps: int, workers: int
) -> dict[Method, list[Outcome]]:
    """Outcomes of each method in the order of the seeds, whatever order the jobs end in."""
    jobs = [(seed, method) for method in methods for seed in seeds]
    jobs.sort(key=lambda job: cost(job[1]), reverse=True)  # long ones last would leave cores idle
    found: dict[tuple[int, Method], Outcome] = {}
    total = sum(cost(method) for _, method in jobs)
    with tqdm(total=total, desc="training", bar_format=_BAR) as bar:
        for (seed, method), outcome in _finished(jobs, steps=steps, workers=workers):
            found[seed, method] = outcome
            bar.set_postfix_str(f"{len(found)} of {len(jobs)} models")
            bar.update(cost(method))
    return {method: [found[seed, method] for seed in seeds] for method in methods}


_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}"


def cost(method: Method) -> int:
    """About what a step takes: its draws, and what it takes without any."""
    return 3 + (2 if method.estimator == "mlmc" else method.num_samples)


def _finished(
    jobs: Sequence[tuple[int, Method]], *, steps: int, workers: int
) -> Iterator[tuple[tuple[int, Method], Outcome]]:
    # Spawned, not forked: a fork copies locks that torch's own threads may hold.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        futures = {pool.submit(run_job, *job, steps): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
