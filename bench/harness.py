"""The measuring of benchmarks: variants interleaved in one run, percentiles, rows with the device.

A machine's speed drifts, so every repetition times each variant once, and only ratios of
medians within one run mean anything.

On a GPU a call is timed by events, behind a sleep of the device that is longer than the CPU takes
to enqueue the call: the number has no launch latency in it, as in a training step, whose CPU runs
ahead. `milliseconds_idle`, the same call on an idle device, and `milliseconds_replayed`, a CUDA
graph of it, stand beside the number where a variant asks for them. A graph's should agree with it.
Before each timing the L2 cache is filled by reads, which leave nothing to write back: inputs come
from memory, as they do in a step that touches more than the cache holds.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastperturb import runs
from fastperturb.ops import dispatch

# Providers that are naive code, and those whose work no implementation can leave out.
NAIVE = ("naive", "loop", "checkpointed")
FLOOR = ("floor", "trunk")


@dataclass(frozen=True)
class Variant:
    """One way to do the work: who provides it, which part it does, and a call that does it."""

    provider: str
    mode: str  # forward, backward or full
    run: Callable[[], Any]
    opaque: bool = False  # whether it runs as one call whose inner traffic nobody sees
    replay: bool = False  # whether a GPU times it in two more ways, to check the first


@dataclass(frozen=True)
class Row:
    """One measurement, with everything needed to read it later."""

    op: str
    provider: str
    mode: str
    # milliseconds (and _idle, _replayed: see above); extra_mib: the peak above what was allocated
    # before; bytes_ratio: bytes that go in and out of all its calls, over the least possible;
    # fits: 0, where the memory did not do; captures: 0, where no CUDA graph could be made of it
    metric: str
    x: dict[str, Any]
    p20: float
    p50: float
    p80: float
    device: str
    versions: dict[str, str]
    commit: str | None


def measure(
    op: str,
    variants: Sequence[Variant],
    *,
    x: dict[str, Any],
    least_bytes: dict[str, int],
    device: torch.device,
    repeats: int,
    warmup: int = 3,
) -> list[Row]:
    """Time every variant `repeats` times, interleaved; its memory and its traffic once.

    least_bytes: by mode, what any implementation must read and write. A variant for which the
    device has too little memory is left out, and its row says so.
    """
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    timed = Timing(device)
    gc.disable()  # a collection in the middle of a timing would be charged to that variant
    for repeat in range(-warmup, repeats):
        for variant in list(times):
            elapsed = None
            with contextlib.suppress(torch.OutOfMemoryError):
                elapsed = timed.milliseconds(variant.run)
            if elapsed is None:
                del times[variant]
                gc.collect()  # what the failed call held is not given back by itself
                torch.cuda.empty_cache()
            elif repeat >= 0:
                times[variant].append(elapsed)
    gc.enable()
    where = runs.provenance()
    rows = []
    for variant in variants:
        label = {"op": op, "provider": variant.provider, "mode": variant.mode, "x": x, **where}
        if variant not in times:
            rows.append(Row(metric="fits", p20=0.0, p50=0.0, p80=0.0, **label))
            continue
        taken = times[variant]
        p20, _, _, p80 = statistics.quantiles(taken, n=5, method="inclusive")
        rows.append(
            Row(metric="milliseconds", p20=p20, p50=statistics.median(taken), p80=p80, **label)
        )
        if variant.replay and device.type == "cuda":
            for metric, value in timed.other_ways(variant.run, repeats).items():
                rows.append(Row(metric=metric, p20=value, p50=value, p80=value, **label))
        extra = _extra_mib(variant.run, device)
        rows.append(Row(metric="extra_mib", p20=extra, p50=extra, p80=extra, **label))
        if not variant.opaque:
            ratio = _traffic_bytes(variant.run) / least_bytes[variant.mode]
            rows.append(Row(metric="bytes_ratio", p20=ratio, p50=ratio, p80=ratio, **label))
    return rows


def by(implementation: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Wraps a call so that every op in it, forward and backward, runs by this implementation."""

    def wrap(run: Callable[[], Any]) -> Callable[[], Any]:
        def chosen() -> Any:
            with dispatch.only(implementation):
                return run()

        return chosen

    return wrap


class Timing:
    """The duration of a call on a device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._enqueue: dict[Callable[[], Any], float] = {}  # the CPU's milliseconds for a call
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._cold = torch.zeros(2 * size // 4, device=device)  # twice the cache, in fp32
            self._cycles = self._cycles_of_a_millisecond()

    def milliseconds(self, run: Callable[[], Any]) -> float:
        if self._device.type == "cuda":
            return self._on_gpu(run)
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)

    def other_ways(self, run: Callable[[], Any], repeats: int) -> dict[str, float]:
        """Return the medians of a call on an idle device, and of a CUDA graph's replay."""

        def median(call: Callable[[], Any], sleep: bool) -> float:
            return statistics.median(self._on_gpu(call, sleep=sleep) for _ in range(repeats))

        medians = {"milliseconds_idle": median(run, False)}
        try:
            medians["milliseconds_replayed"] = median(_captured(run).replay, True)
        except RuntimeError:  # of the device, or of a call that waits for it
            medians["captures"] = 0.0
        return medians

    def _on_gpu(self, run: Callable[[], Any], *, sleep: bool = True) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cold.sum()
        torch.cuda.synchronize()
        # Twice the time, against a busy CPU. Whoever takes longer than this waits for the device.
        cover = min(2 * self._enqueue.get(run, 0.0) + 0.1, 50.0)
        if sleep:
            torch.cuda._sleep(int(cover * self._cycles))
        start.record()
        begin = time.perf_counter()
        run()
        enqueue = 1e3 * (time.perf_counter() - begin)
        end.record()
        end.synchronize()
        # The least seen: the first call compiles, and a full queue makes the CPU wait.
        self._enqueue[run] = min(enqueue, self._enqueue.get(run, math.inf))
        return start.elapsed_time(end)

    def _cycles_of_a_millisecond(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 10_000_000
        torch.cuda._sleep(1000)  # the first launch loads the kernel
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / start.elapsed_time(end)


def _captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of a call, which has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces for a stream
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def _extra_mib(run: Callable[[], Any], device: torch.device) -> float:
    """The most memory held at once during the call, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # events() folds these into their ops
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that go in and out of every call but views.

    A fused op is one call; its docstring bounds the bytes that it reads and writes inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            tensors = [
                x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)
            ]
            distinct = {(x.data_ptr(), x.numel()): x for x in tensors}
            self.bytes += sum(
                min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                for x in distinct.values()
            )
        return result


def _traffic_bytes(run: Callable[[], Any]) -> int:
    with _Traffic() as traffic:
        run()
    return traffic.bytes


def show(
    rows: Sequence[Row], *, naive: Sequence[str] = NAIVE, floor: Sequence[str] = FLOOR
) -> None:
    """One x's medians, their ratio to the fastest naive code and to the physical limit."""
    first = rows[0]
    medians = {(row.provider, row.mode, row.metric): row.p50 for row in rows}

    def fastest(providers: Sequence[str], mode: str) -> float:
        keys = [(provider, mode, "milliseconds") for provider in providers]
        return min((medians[key] for key in keys if key in medians), default=math.nan)

    def times(ratio: float, unit: str = "") -> str:
        return "" if math.isnan(ratio) else f"{ratio:.2f}{unit}"

    width = max(14, *(len(row.provider) + 1 for row in rows))
    print(f"\n{first.op}  " + "  ".join(f"{name}={value}" for name, value in first.x.items()))
    header = f"{'ms [p20, p80]':28}{'speed-up':>10}{'/ floor':>10}{'MiB':>10}"
    print(f"{'mode':10}{'provider':{width}}{header}")
    for row in rows:
        if row.metric == "fits":
            print(f"{row.mode:10}{row.provider:{width}}does not fit")
        if row.metric == "milliseconds":
            extra = medians[row.provider, row.mode, "extra_mib"]
            spread = f"{row.p50:.3f} [{row.p20:.3f}, {row.p80:.3f}]"
            speed_up = times(fastest(naive, row.mode) / row.p50, "x")
            over_floor = times(row.p50 / fastest(floor, row.mode))
            traffic = medians.get((row.provider, row.mode, "bytes_ratio"))
            bytes_ratio = "" if traffic is None else f"{traffic:>8.1f}"
            ratios = f"{speed_up:>10}{over_floor:>10}{extra:>10.1f}{bytes_ratio}"
            print(f"{row.mode:10}{row.provider:{width}}{spread:28}{ratios}")
        if row.metric in ("milliseconds_idle", "milliseconds_replayed"):
            other_way = row.metric.removeprefix("milliseconds_")
            print(f"{'':{10 + width}}{other_way}: {row.p50:.3f} ms")


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
