"""Independent pieces of work on all cores: a process a core, of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes: this one ends at once, instead of taking another task.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, workers: int
) -> Iterator[tuple[int, Future[Any]]]:
    """`function(*task)` of every task, as they end: the task's index, and its result or error.

    They start in the order given: long ones last would leave cores idle.
    """
    with ProcessPoolExecutor(
        min(workers, len(tasks)),
        # Spawned, not forked: a fork copies locks that torch's own threads may hold.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
    ) as pool:
        futures = {pool.submit(function, *task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
