"""Metrics of a run: as if it was never interrupted, in a file, on screen and in trackers."""

import io
import json
import math
import sys
import types

import pytest

from fastperturb.train import report
from fastperturb.train.report import MetricsFile, Report, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


def values_at(step):
    return {
        "loss": 3 / step,
        "nll": 3 / step,
        "perplexity": math.exp(3 / step),
        "ess": 4.25,
        "shift": 0.2,
        "gradient_norm": 1.0,
        "learning_rate_base": 1e-3,
        "learning_rate_transform": 5e-3,
        "tokens_per_second": 12345.6,
    }


def run(folder, steps, *, start_step=0, total_steps=20, **options):
    """Steps of a run that evaluates every fifth one, as the training loop reports them."""
    options = {"config": {"seed": 0}, **options}
    with Report(folder, total_steps=total_steps, start_step=start_step, **options) as log:
        if start_step == 0:
            log.evaluation(0, {"nll": 4.0, "perplexity": math.exp(4.0)})
        for step in steps:
            log.train(step, values_at(step))
            if step % 5 == 0:
                log.evaluation(step, {"nll": 2.0, "perplexity": math.exp(2.0)})
    return log


# The file


def test_a_line_holds_a_step_its_phase_and_its_values(tmp_path):
    run(tmp_path, range(1, 6))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["what"]) for line in lines] == [
        (0, "eval"),
        *[(step, "train") for step in range(1, 6)],
        (5, "eval"),
    ]
    assert lines[3] == {"step": 3, "what": "train", **values_at(3)}


def test_each_line_is_in_the_file_before_the_next_step(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log(1, "train", {"loss": 1.0})
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0]


@pytest.mark.parametrize("torn", ["", '{"step": 13, "what": "tr', '{"step": 9}', "\n\0\0"])
def test_a_resumed_run_leaves_the_file_of_one_that_was_never_interrupted(tmp_path, torn):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run(whole, range(1, 21))
    run(cut, range(1, 13))
    with open(cut / "metrics.jsonl", "a") as file:
        file.write(torn)
    run(cut, range(11, 21), start_step=10)
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert [path.name for path in cut.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_step_0_replaces_the_file(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, range(1, 3))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_no_line_is_lost_when_replacing_the_file_is_interrupted(tmp_path, monkeypatch):
    run(tmp_path, range(1, 13))
    before = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(report.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [], start_step=10)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_value_that_is_not_finite_is_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log(1, "train", {"loss": float("nan"), "perplexity": float("inf"), "ess": 2.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [{"step": 1, "what": "train", "loss": None, "perplexity": None, "ess": 2.0}]


def test_a_write_to_a_full_disk_names_the_file(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not write to .*metrics.jsonl.*No space left"):
        metrics.log(1, "train", {"loss": 1.0})


# The screen


def test_without_a_terminal_fifty_lines_of_progress_are_printed(tmp_path, capsys):
    run(tmp_path, range(1, 501), total_steps=500)
    lines = capsys.readouterr().err.splitlines()
    progress = [line for line in lines if "held out" not in line]
    assert len(progress) == 50 and len(lines) == 50 + 101
    assert progress[0].startswith(
        "step 10/500  loss 0.300  perplexity 1.35  ess 4.25  shift 0.200  12,346 tokens/s  00:0"
    )
    assert progress[-1].startswith("step 500/500") and progress[-1].endswith("00:00 left")
    assert lines[0] == "step 0, held out:  perplexity 54.6"


def test_the_time_left_counts_only_the_steps_to_come(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 100.0 + 10 * 60])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    bar = report.ProgressLines(100, 50)
    bar.log(60, "train", {"loss": 1.0})
    assert capsys.readouterr().err == "step 60/100  loss 1.000  40:00 left\n"


def test_a_terminal_shows_a_bar_that_starts_at_the_resumed_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(tmp_path, range(11, 21), start_step=10)
    text = sys.stderr.getvalue()
    assert "step 10/20" in text and "step 20/20" in text and "step 9/20" not in text
    assert "loss 0.150  perplexity 1.162  ess 4.25  shift 0.200" in text
    assert "\rstep 15, held out:  perplexity 7.389" in text


def test_only_the_main_process_reports(tmp_path, capsys):
    run(tmp_path, range(1, 6), is_main=False, report_to=["wandb"])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# Trackers


class FakeTracker(types.ModuleType):
    """`init` of wandb and trackio, and the run that it gives."""

    def __init__(self, name):
        super().__init__(name)
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.opened.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fakes(monkeypatch):
    modules = {name: FakeTracker(name) for name in ("wandb", "trackio")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return modules


def test_trackers_get_every_metric_by_phase_and_are_finished(tmp_path, fakes):
    run(tmp_path, [5], report_to=["wandb", "trackio"], config={"seed": 3})
    for module in fakes.values():
        assert module.logged == [
            (0, {"eval/nll": 4.0, "eval/perplexity": math.exp(4.0)}),
            (5, {f"train/{name}": value for name, value in values_at(5).items()}),
            (5, {"eval/nll": 2.0, "eval/perplexity": math.exp(2.0)}),
        ]
        assert module.finished == 1
        assert module.opened[0]["config"] == {"seed": 3}
        assert module.opened[0]["project"] == "fastperturb"


def test_a_resumed_run_keeps_its_name_in_trackers_and_a_new_run_gets_another(tmp_path, fakes):
    folder = tmp_path / "my run: #1"
    folder.mkdir()
    first = run(folder, [1], report_to=["wandb", "trackio"])
    again = run(folder, [2], start_step=1, report_to=["wandb", "trackio"], run_id=first.run_id)
    other = run(folder, [1], report_to=["wandb", "trackio"])
    assert first.run_id == again.run_id != other.run_id
    assert first.run_id.startswith("my-run-1-")
    for module in fakes.values():
        assert [options["name"] for options in module.opened] == [first.run_id] * 2 + [other.run_id]
        assert {options["resume"] for options in module.opened} == {"allow"}
    assert fakes["wandb"].opened[1]["id"] == first.run_id


def test_the_project_of_wandb_comes_from_its_environment_variable(tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(tmp_path, [1], report_to=["wandb"])
    assert fakes["wandb"].opened[0]["project"] == "mine"


def test_all_trackers_are_finished_when_one_fails(tmp_path, fakes, monkeypatch):
    def fail(values, step):
        raise RuntimeError("no network")

    monkeypatch.setattr(fakes["trackio"], "log", fail)
    with pytest.raises(RuntimeError, match="no network"):
        run(tmp_path, [1], report_to=["wandb", "trackio"])
    assert (fakes["wandb"].finished, fakes["trackio"].finished) == (1, 1)


@pytest.mark.parametrize("name", report.TRACKERS)
def test_a_missing_package_raises_before_the_first_step(tmp_path, name, monkeypatch, fakes):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    others = [other for other in fakes if other != name]
    with pytest.raises(ImportError, match=f"report_to {name} needs a package: pip install {name}"):
        Report(tmp_path, total_steps=1, report_to=[*others, name], config={})
    assert all(fakes[other].finished == 1 for other in others)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_raises_and_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="of tensorboard, wandb, trackio, got 'mlflow'"):
        Report(tmp_path, total_steps=1, report_to=["mlflow"], config={})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # other people's
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(1, 13), report_to=["tensorboard"])
    run(tmp_path, range(11, 21), start_step=10, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    steps = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]
    assert steps == [(step, values_at(step)["loss"]) for step in range(1, 21)]
    assert [event.step for event in events.Scalars("eval/nll")] == [0, 5, 10, 15, 20]
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_records_a_run_and_its_continuation_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = run(tmp_path, range(1, 13), report_to=["wandb"])
    wandb.teardown()  # as the end of the process does, which sees the file written
    run(tmp_path, range(11, 21), start_step=10, report_to=["wandb"], run_id=first.run_id)
    wandb.teardown()
    files = [*(tmp_path / "wandb").glob(f"offline-run-*-{first.run_id}/*.wandb")]
    assert len(files) == 2 and all(b"train/loss" in file.read_bytes() for file in files)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trackio_continues_a_run_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="needs trackio")
    from trackio.sqlite_storage import SQLiteStorage

    first = run(tmp_path, range(1, 11), report_to=["trackio"])
    run(tmp_path, range(11, 21), start_step=10, report_to=["trackio"], run_id=first.run_id)
    logs = SQLiteStorage.get_logs("fastperturb", first.run_id)
    steps = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}
    assert steps == {step: values_at(step)["loss"] for step in range(1, 21)}
