"""Outcomes of trainings in a file, one JSON line each: a stopped study continues from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bench.synthetic.arms import Arm
from fastperturb.demo import jobs
from fastperturb.demo.jobs import Job
from fastperturb.demo.training import Outcome


def train(arms: Iterable[Arm], seeds: Iterable[int], path: Path, *, workers: int) -> None:
    """Train what `path` does not hold yet, in the order of the arms, and append each outcome."""
    done = {key(job) for job, _ in _lines(path)}
    wanted = {key(job): job for arm in arms for job in map(arm.job, seeds)}
    missing = [job for name, job in wanted.items() if name not in done]
    if not missing:
        return
    with path.open("a", encoding="utf-8") as file:
        for job, outcome in tqdm(jobs.finished(missing, workers=workers), total=len(missing)):
            line = {"job": asdict(job), "outcome": asdict(outcome)}
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()


def read(path: Path) -> dict[str, Outcome]:
    """Read outcomes by the `key` of their jobs."""
    return {key(job): Outcome(**outcome) for job, outcome in _lines(path)}


def key(job: Job | dict[str, object]) -> str:
    """Return a string that is the same for the same training."""
    values = asdict(job) if isinstance(job, Job) else job
    return json.dumps(values, sort_keys=True)


def _lines(path: Path) -> list[tuple[dict[str, object], dict[str, object]]]:
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["job"], line["outcome"]) for line in lines]
