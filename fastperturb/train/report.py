"""Metrics of a run while it goes: a JSON line a step, a progress bar, and trackers.

Every place that metrics go to is a sink. All are opened before the first step, so that a missing
package is an error then. A resumed run continues in the same places: metrics of steps that it takes
again are replaced, or stay and are the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from fastperturb.checkpoint.atomic import explaining

METRICS_NAME = "metrics.jsonl"
PROJECT = "fastperturb"

_LINES_OF_LOG = 50
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}{postfix}"
# The metrics in a line of progress, where the run has them.
_FORMATS = {
    "loss": "loss {:.3f}",
    "perplexity": "perplexity {:.4g}",
    "ess": "ess {:.2f}",
    "shift": "shift {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class Sink(ABC):
    """A place that metrics go to."""

    @abstractmethod
    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Record the metrics of a step; phase is "train" or "eval"."""

    def close(self) -> None:  # noqa: B027
        """Close the files and connections of the sink, if it has any."""


class Report:
    """Sends the metrics of one run to all its sinks; only the main process has any.

    folder: the folder of the run, for metrics.jsonl and the trackers' files.
    report_to: names of TRACKERS.
    config: the run's options as JSON, for the trackers.
    start_step: the number of steps already taken; the sinks of a resumed run have their metrics.
    run_id: the run's name at wandb and trackio; a resumed run passes the one that it had.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        report_to: Collection[str] = (),
        config: dict[str, Any],
        start_step: int = 0,
        is_main: bool = True,
        run_id: str | None = None,
    ) -> None:
        for name in report_to:
            if name not in TRACKERS:
                raise ValueError(
                    f"report_to must be one or more of {', '.join(TRACKERS)}, got {name!r}"
                )
        self.run_id = run_id or _new_id(folder)
        self._sinks: list[Sink] = []
        with ExitStack() as opened:
            if is_main:
                for name in report_to:
                    self._add(opened, _open_tracker(name, folder, config, start_step, self.run_id))
                self._add(opened, MetricsFile(folder / METRICS_NAME, start_step=start_step))
                progress = ProgressBar if sys.stderr.isatty() else ProgressLines
                self._add(opened, progress(total_steps, start_step))
            self._opened = opened.pop_all()

    def _add(self, opened: ExitStack, sink: Sink) -> None:
        opened.callback(sink.close)
        self._sinks.append(sink)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, "train", values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, "eval", values)

    def _log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, phase, values)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _new_id(folder: Path) -> str:
    """Return the folder's name, in letters that trackers allow, with a random ending."""
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII)
    return f"{name[:80]}-{secrets.token_hex(4)}"


# The file


class MetricsFile(Sink):
    """A line of JSON for each step, after those that an interrupted run wrote up to start_step."""

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        self._path = path
        # A run that starts at step 0 evaluates there again, so no line is kept.
        lines = [] if start_step == 0 else read_metrics(path)
        _replace(path, [line for line in lines if line["step"] <= start_step])

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = _line({"step": step, "what": phase, **finite})
        # Opened for each line, so that a failed write leaves nothing to fail again later.
        with (
            explaining(f"could not write to {self._path}"),
            open(self._path, "a", encoding="utf-8") as file,
        ):
            file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, without one that was cut off while it was written."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if text.endswith("\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a metrics file whole or not at all, so that a killed run loses no line."""
    temporary = path.with_name(f".{path.name}.kept")
    with explaining(f"could not write to {path}"):
        temporary.write_text("".join(map(_line, lines)), encoding="utf-8")
        os.replace(temporary, path)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


# The screen


class ProgressBar(Sink):
    """A progress bar, for a terminal."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._bar = tqdm(
            total=total_steps, initial=start_step, desc="step", bar_format=_BAR, dynamic_ncols=True
        )

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        if phase == "eval":
            self._bar.write(_format_evaluation(step, values), file=sys.stderr)
            return
        self._bar.set_postfix_str(_format(values), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class ProgressLines(Sink):
    """About fifty lines of progress in a run, and one for every evaluation, for a log file."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total, self._start, self._last = total_steps, start_step, start_step
        self._every = max(1, total_steps // _LINES_OF_LOG)
        self._started = time.monotonic()

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        if phase == "eval":
            print(_format_evaluation(step, values), file=sys.stderr, flush=True)
            return
        is_due = step // self._every > self._last // self._every or step >= self._total
        if not is_due:
            return
        seconds = (time.monotonic() - self._started) / (step - self._start)
        left = tqdm.format_interval(seconds * (self._total - step))
        text = f"step {step}/{self._total}  {_format(values)}  {left} left"
        print(text, file=sys.stderr, flush=True)
        self._last = step


def _format(values: Mapping[str, float]) -> str:
    return "  ".join(text.format(values[name]) for name, text in _FORMATS.items() if name in values)


def _format_evaluation(step: int, values: Mapping[str, float]) -> str:
    return f"step {step}, held out:  {_format(values)}"


# Trackers


class TensorBoard(Sink):
    """Event files in the run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides the later steps that an interrupted run wrote.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", start_step)

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb(Sink):
    """Weights & Biases, with its own environment variables: WANDB_PROJECT, WANDB_MODE, ..."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_id,
            id=run_id,
            resume="allow",
            dir=folder,
            config=config,
        )

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        # wandb ignores steps that it has, which are the same in a resumed run.
        self._run.log({f"{phase}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Sink):
    """Trackio's local database, or the Space that its environment variables name."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int, run_id: str) -> None:
        import trackio

        self._run = trackio.init(project=PROJECT, name=run_id, resume="allow", config=config)

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{phase}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int, str], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _open_tracker(
    name: str, folder: Path, config: dict[str, Any], start_step: int, run_id: str
) -> Sink:
    try:
        return TRACKERS[name](folder, config, start_step, run_id)
    except ImportError as error:
        raise ImportError(f"report_to {name} needs a package: pip install {name}") from error
