"""`make gpu` ends what it starts, keeps what a log holds, and adds stages to an earlier call's."""

import json
import os
import sys
import time
from types import SimpleNamespace

import conftest
import pytest
import torch

from bench import gpu

# Starts a child that ignores SIGTERM and tells its number; then waits, as the child does.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
print("child", subprocess.Popen([sys.executable, "-c", child]).pid)
if "ignore" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "leave" not in sys.argv:
    time.sleep(600)
"""


def is_running(process):
    """Tell whether a process exists and has not ended (a dead child of nobody may linger)."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def run(folder, *words, limit=2.0):
    return gpu.side_by_side(
        {"program": [sys.executable, "-c", STUBBORN, *words]}, folder, limit=limit
    )["program"]


def child_of(result):
    return int(result["output"][0].split()[1])


@pytest.mark.parametrize("words", [[], ["ignore"]], ids=["", "ignores SIGTERM"])
def test_a_program_that_takes_too_long_ends_with_its_children_and_its_log_is_kept(
    words, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    result = run(tmp_path, *words)
    assert not result["ok"] and result["error"] == "took longer than 2 s"
    assert f"child {child_of(result)}" in (tmp_path / "program.log").read_text()
    assert_ends(child_of(result))


def test_a_program_that_ends_leaves_no_children(tmp_path):
    result = run(tmp_path, "leave", limit=60.0)
    assert result["ok"]
    assert_ends(child_of(result))


def test_children_end_when_the_stage_is_interrupted(tmp_path, monkeypatch):
    started = []
    start = gpu._start

    def interrupted(arguments, log):
        started.append(start(arguments, log))
        if len(started) == 2:
            raise KeyboardInterrupt
        return started[-1]

    monkeypatch.setattr(gpu, "_start", interrupted)
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(KeyboardInterrupt):
        gpu.side_by_side({"a": sleeping, "b": sleeping}, tmp_path, limit=60.0)
    assert started[0].returncode is not None
    os.kill(started[1].pid, 9)  # the test's own: it was never handed over
    started[1].wait()


def assert_ends(process):
    deadline = time.monotonic() + 10  # the system takes a moment
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(process)


def test_programs_run_side_by_side_and_one_that_is_missing_fails_alone(tmp_path):
    results = gpu.side_by_side(
        {
            "ok": [sys.executable, "-c", "print('fine')"],
            "wrong": [sys.executable, "-c", "raise SystemExit(3)"],
            "missing": ["no-such-program"],
        },
        tmp_path,
        limit=60.0,
    )
    assert {name: result["ok"] for name, result in results.items()} == {
        "ok": True,
        "wrong": False,
        "missing": False,
    }
    assert results["ok"]["output"] == ["fine"]
    assert results["missing"]["error"] == "no-such-program is not on the PATH"


@pytest.fixture
def stages(monkeypatch):
    """Three stages without a device; the second fails in its first call."""
    calls = []

    def stage(name):
        def run(folder, keep):
            calls.append(name)
            if name == "b" and calls.count("b") == 1:
                keep({"ok": False, "rows": [1]})
                raise torch.OutOfMemoryError("too large")
            return {"ok": True, "calls": calls.count(name)}

        return run

    monkeypatch.setattr(gpu, "STAGES", {name: stage(name) for name in "abc"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.runs, "provenance", lambda: {"commit": "1", "device": "a card"})
    return calls


def stages_in(folder):
    results = json.loads((folder / "results.json").read_text())["stages"]
    return {name: result["ok"] for name, result in results.items()}


def test_calls_with_some_stages_each_make_one_complete_file(stages, tmp_path):
    folder = tmp_path / "new" / "run"
    assert gpu.run(folder, overwrite=False, stages=["c"]) == 0
    assert gpu.run(folder, overwrite=False, stages=["a", "b"]) == 1
    results = json.loads((folder / "results.json").read_text())["stages"]
    assert results["b"]["error"] == "OutOfMemoryError: too large" and results["b"]["rows"] == [1]
    assert stages_in(folder) == {"c": True, "a": True, "b": False}
    assert gpu.run(folder, overwrite=False, stages=None) == 0  # what has not succeeded
    assert stages == ["c", "a", "b", "b"]
    assert all(stages_in(folder).values())
    assert gpu.run(folder, overwrite=False, stages=None) == 0
    assert len(stages) == 4
    assert gpu.run(folder, overwrite=True, stages=["a"]) == 0
    assert stages_in(folder) == {"a": True}


def test_results_of_another_commit_or_command_are_not_mixed_in(stages, tmp_path, monkeypatch):
    assert gpu.run(tmp_path / "run", overwrite=False, stages=["a"]) == 0
    monkeypatch.setattr(gpu.runs, "provenance", lambda: {"commit": "2", "device": "a card"})
    with pytest.raises(FileExistsError, match="another commit: name another, or pass --overwrite"):
        gpu.run(tmp_path / "run", overwrite=False, stages=["b"])
    (tmp_path / "results.json").write_text('{"commit": "2", "device": "a card"}')
    with pytest.raises(FileExistsError, match="another command"):
        gpu.run(tmp_path, overwrite=False, stages=["b"])


def test_the_shards_make_all_tests():
    names = []
    for shard in range(3):
        items = [SimpleNamespace(keywords=(), name=name) for name in range(7)]
        config = SimpleNamespace(getoption=lambda *_, shard=shard: f"{shard}/3")
        conftest.pytest_collection_modifyitems(config, items)
        assert len(items) == (3, 2, 2)[shard]
        names += [item.name for item in items]
    assert sorted(names) == list(range(7))
