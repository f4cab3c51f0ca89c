"""A GPU's calls are timed without the launches: on a device whose clocks are simulated."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import harness, rehearsal


class Device:
    """A CPU and a device that it gives work to, with clocks in milliseconds."""

    CYCLES = 1.5e6  # of a millisecond

    def __init__(self):
        self.cpu_time = self.device_time = 0.0
        self.captured = None

    def compute(self, milliseconds):
        self.cpu_time += milliseconds

    def enqueue(self, milliseconds):
        if self.captured is not None:
            self.captured.append(milliseconds)
        else:
            self.device_time = max(self.device_time, self.cpu_time) + milliseconds

    def synchronize(self):
        self.cpu_time = max(self.cpu_time, self.device_time)

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.captured = graph.work
        yield
        self.captured = None


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = max(device.device_time, device.cpu_time)

        def synchronize(self):
            device.synchronize()

        def elapsed_time(self, end):
            return end.time - self.time

    class Graph:
        def __init__(self):
            self.work = []

        def replay(self):
            device.compute(0.01)
            for milliseconds in self.work:
                device.enqueue(milliseconds)

    fakes = {
        **{name: rehearsal.FAKES[name] for name in ("Stream", "current_stream", "stream")},
        "get_device_properties": rehearsal.FAKES["get_device_properties"],
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": device.capture,
        "synchronize": device.synchronize,
        "_sleep": lambda cycles: device.enqueue(cycles / device.CYCLES),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = SimpleNamespace(perf_counter=lambda: device.cpu_time / 1e3)
    monkeypatch.setattr(harness, "time", clock)
    with rehearsal._CpuForCuda():
        yield device


@pytest.fixture
def call(device):
    """A call of three kernels of 0.5 ms, each of which takes the CPU 2 ms to launch."""

    def run():
        for _ in range(3):
            device.compute(2.0)
            device.enqueue(0.5)

    return run


def test_a_call_is_timed_without_its_launches_once_they_are_known(device, call):
    timing = harness.Timing(torch.device("cuda"))
    timing.milliseconds(call)
    assert timing.milliseconds(call) == pytest.approx(1.5)


def test_a_call_whose_first_run_compiles_needs_one_more(device, call):
    timing = harness.Timing(torch.device("cuda"))
    compiled = []

    def run():
        if not compiled:
            device.compute(30_000.0)
            compiled.append(True)
        call()

    assert [timing.milliseconds(run) for _ in range(3)][2] == pytest.approx(1.5)


def test_a_graph_agrees_and_an_idle_device_waits_for_the_launches(device, call):
    ways = harness.Timing(torch.device("cuda")).other_ways(call, repeats=3)
    assert ways["milliseconds_replayed"] == pytest.approx(1.5)
    assert ways["milliseconds_idle"] == pytest.approx(6.5)


def test_a_call_that_cannot_be_captured_is_said_to_be(device, call):
    def run():
        if device.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        call()

    ways = harness.Timing(torch.device("cuda")).other_ways(run, repeats=3)
    assert ways == {"milliseconds_idle": pytest.approx(6.5), "captures": 0.0}
