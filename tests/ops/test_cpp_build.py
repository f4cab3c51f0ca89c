"""The C++ kernels build on first use, once, and torch runs where they cannot."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastperturb.ops.cpp import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        build.compiler_command()
    except RuntimeError as error:
        pytest.skip(str(error))


# Run in another process: reports on the kernels' availability and compares them with torch.
PROBE = """
import json, warnings, torch
from fastperturb import noise
from fastperturb.ops import dispatch
from fastperturb.ops.cpp import build
from fastperturb.ops.torch import embed as torch_embed
from fastperturb.ops.calls import EmbedCall
torch.set_num_threads(1)
before = build.availability()
numbers = noise.counters(2, None, None, (1, 3), antithetic=False, device=torch.device("cpu"))
call = EmbedCall(None, torch.randn(1, 3, 8), [torch.randn(2, 8)], torch.tensor(1.0),
                 torch.tensor(5), *numbers, None, None, None, "lowrank", "gaussian", "token",
                 False, 1, 1.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        run = dispatch.implementation("perturb_embed", call.table.device, call.table.dtype)
    out = run.perturb_embed(call, False).out
by_torch = torch_embed.perturb_embed(call, False).out
print(json.dumps({
    "before": before,
    "after": build.availability(),
    "warnings": [str(warning.message) for warning in caught],
    "is_torchs": torch.equal(out, by_torch),
    "is_right": torch.allclose(out, by_torch, atol=1e-5),
}))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "FASTPERTURB_EXT", "TORCH_EXTENSIONS_DIR")
    }
    chosen = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        env=inherited | chosen | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_two_processes_at_once_build_once_and_a_damaged_library_is_built_again(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    # Without optimisation, to compile fast.
    compiler = script(tmp_path / "cxx", f'echo "$@" >> {log}\nexec c++ "$@" -O0')
    both = [start(tmp_path, CXX=compiler) for _ in range(2)]
    for status in map(report, both):
        assert status["before"] == [True, "not built yet: builds on first use"]
        assert status["after"] == [True, "built"]
        assert status["warnings"] == [] and status["is_right"]

    def links() -> int:
        return sum("-shared" in line for line in log.read_text().splitlines())

    assert links() == 1
    assert report(start(tmp_path, CXX=compiler))["before"] == [True, "built"]
    (library,) = tmp_path.glob("fastperturb/*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    status = report(start(tmp_path, CXX=compiler))
    assert status["before"] == [True, "not built yet: builds on first use"]
    assert status["after"] == [True, "built"] and status["is_right"]
    assert links() == 2
    assert [file.suffix for file in sorted((tmp_path / "fastperturb").iterdir())] == [
        ".lock",
        ".so",
    ]


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_without_a_compiler_torch_runs_with_one_warning(tmp_path: Path, how: str) -> None:
    missing = {how: "/nonexistent"}
    status = report(start(tmp_path, **missing))
    assert status["is_torchs"]
    (warning,) = status["warnings"]
    assert "no C++ compiler found" in warning
    assert status["before"][0] is status["after"][0] is False
    assert "no C++ compiler found" in status["before"][1]


def test_a_failed_build_falls_back_to_torch_and_reports_the_first_error(tmp_path: Path) -> None:
    compiler = script(
        tmp_path / "cxx",
        'case "$*" in *--version*) exit 0;; esac\necho "philox.h:1: error: too much noise"; exit 1',
    )
    status = report(start(tmp_path, CXX=compiler))
    assert status["is_torchs"]
    assert len(status["warnings"]) == 1
    assert status["after"] == [False, "build failed: philox.h:1: error: too much noise"]


def test_switched_off_kernels_are_not_built_and_give_no_warning(tmp_path: Path) -> None:
    status = report(start(tmp_path, FASTPERTURB_EXT="0"))
    assert status["is_torchs"] and status["warnings"] == []
    assert status["before"] == status["after"] == [False, "switched off by FASTPERTURB_EXT=0"]
    assert not (tmp_path / "fastperturb").exists()


def test_required_kernels_that_cannot_be_built_raise(tmp_path: Path) -> None:
    process = start(tmp_path, FASTPERTURB_EXT="require", CXX="/nonexistent")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "FASTPERTURB_EXT=require" in errors and "no C++ compiler found" in errors


def test_required_kernels_are_chosen_even_if_they_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "_load", functools.cache(lambda: "build failed: no space"))
    monkeypatch.setattr(build, "_warn", lambda failure: None)
    build._load()
    assert build.availability() == (False, "build failed: no space")
    assert not build.prepare()
    monkeypatch.setenv("FASTPERTURB_EXT", "require")
    assert build.availability() == (True, "build failed: no space")
    with pytest.raises(RuntimeError, match="build failed: no space"):
        build.prepare()


def test_an_unknown_value_of_fastperturb_ext_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPERTURB_EXT", "yes")
    with pytest.raises(ValueError, match=r"FASTPERTURB_EXT must be one of .*require.*'yes'"):
        build.availability()
