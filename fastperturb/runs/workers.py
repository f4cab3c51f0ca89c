"""Independent tasks on all cores, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes: a worker ends at once, instead of taking another task.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, workers: int
) -> Iterator[tuple[int, Future[Any]]]:
    """Call `function(*task)` on every task; yield index and future of each when it ends.

    Tasks start in the order of the list, so long ones should come first, to leave no core idle.
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
