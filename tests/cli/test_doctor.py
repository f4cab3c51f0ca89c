"""`fastperturb doctor` reports what runs here, and fails when an op is wrong."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastperturb import ops
from fastperturb.cli import doctor
from fastperturb.cli import main as cli
from fastperturb.ops import dispatch, reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", doctor.TOLERANCES, ids=str)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_agrees_with_the_reference_here(op: str, dtype: torch.dtype) -> None:
    entry = doctor.check(op, CPU, dtype)
    assert entry["ok"], entry
    assert 0 < entry["gradient_error"] < doctor.TOLERANCES[dtype]


def test_json_is_one_object_that_covers_every_op_on_every_device(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = [(str(device), op) for device in doctor.present_devices() for op in dispatch.OPS]
    assert [(entry["device"], entry["op"]) for entry in report["ops"]] == expected
    dtypes = ["float32", "bfloat16", "float16"]
    checked = [(entry["device"], entry["op"], entry["dtype"]) for entry in report["checks"]]
    assert checked == [(*place, dtype) for place in expected for dtype in dtypes]
    assert report["versions"]["torch"] == torch.__version__
    assert report["ok"]


def test_the_first_usable_candidate_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [
        dispatch.Candidate("triton", False, "no GPU"),
        dispatch.Candidate("cpp", True, "compiled"),
        dispatch.Candidate("torch", True, "always"),
    ]
    monkeypatch.setattr(dispatch, "explain", lambda op, device: candidates)
    chosen = doctor.choice("linear_logprob", CPU)
    assert chosen["runs"] == "cpp"
    assert [candidate["reason"] for candidate in chosen["candidates"]] == [
        "no GPU",
        "compiled",
        "always",
    ]


def wrong_value(*arguments: Any, **options: Any) -> torch.Tensor:
    return reference.linear_logprob(*arguments, **options) * 1.02


def wrong_gradient(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    halved = hidden.detach() + (hidden - hidden.detach()) / 2
    return reference.linear_logprob(halved, *arguments, **options)


def not_a_number(*arguments: Any, **options: Any) -> torch.Tensor:
    return reference.linear_logprob(*arguments, **options) * torch.nan


def broken(*arguments: Any, **options: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image for this device")


@pytest.mark.parametrize("implementation", [wrong_value, wrong_gradient, not_a_number, broken])
def test_a_wrong_op_fails_the_check_and_the_status(
    implementation: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "linear_logprob", implementation)
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    for entry in report["checks"]:
        assert entry["ok"] == (entry["op"] != "linear_logprob"), entry


def test_the_tables_show_the_error_and_why_other_implementations_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "linear_logprob", broken)
    console = Console(width=400, record=True, file=io.StringIO())
    report = doctor.examine()
    doctor.show(report, console)
    text = console.export_text()
    assert "FAIL RuntimeError: no kernel image for this device" in text
    for entry in report["ops"]:
        for candidate in entry["candidates"]:
            if candidate["name"] != entry["runs"]:
                first = f"{entry['runs']} comes first"
                reason = first if candidate["usable"] else candidate["reason"]
                assert f"{candidate['name']}: {reason}" in text


def test_the_report_is_written_to_a_folder_and_overwrites_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["doctor", "--json", "--output-dir", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert cli.main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_missing_compiler_is_none_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.compiler()["c++"] is None
