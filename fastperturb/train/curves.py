"""A run's picture: how well it predicts, step by step, and below that why."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.report.figures import INK, plain
from fastperturb.train.report import read_metrics

# Okabe and Ito's palette, which colour-blind readers can tell apart.
TRAIN = "#0072B2"
EVAL = "#D55E00"

Series = tuple[list[int], list[float]]

# What the small panels show, where the run has it: names of metrics by their beginning.
PANELS = {
    "ess": "effective samples",
    "shift": "shift |T(e) - e| / |e|",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}


def draw(metrics_path: Path, png_path: Path) -> None:
    """The curves of a metrics file, as a PNG."""
    lines = read_metrics(metrics_path)
    panels = {title: found for name, title in PANELS.items() if (found := _starting(lines, name))}
    figure = Figure(figsize=(11, 7 if panels else 4.6), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12, hspace=0.06)
    grid = figure.add_gridspec(
        2 if panels else 1, max(1, len(panels)), height_ratios=(2.1, 1)[: 2 if panels else 1]
    )
    draw_likelihood(figure.add_subplot(grid[0, :]), lines)
    for column, (title, found) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(grid[1, column]), title, found)
    figure.savefig(png_path)


def draw_likelihood(axes: Axes, lines: list[dict[str, Any]]) -> None:
    train, held_out = series(lines, "nll", "train"), series(lines, "nll", "eval")
    _line(axes, train, TRAIN, "training batches")
    if held_out[0]:
        axes.plot(*held_out, "o-", color=EVAL, linewidth=2, markersize=5, label="held-out text")
        best = min(zip(held_out[1], held_out[0]))
        axes.plot(best[1], best[0], "o", ms=12, mfc="none", mec=EVAL, mew=1.5)
        axes.annotate(
            f"perplexity {math.exp(best[0]):.4g}",
            (best[1], best[0]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="center",
            color=EVAL,
        )
    _title(axes, "negative log-likelihood of a token", size=13)
    axes.set_xlabel("step", color=INK)
    if train[0] or held_out[0]:
        axes.legend(frameon=False, labelcolor=INK)
    _plain(axes)


def draw_panel(axes: Axes, title: str, found: dict[str, Series]) -> None:
    for (name, each), colour in zip(found.items(), (TRAIN, EVAL, INK)):
        _line(axes, each, colour, name)
    _title(axes, title, size=10)
    axes.set_ylim(bottom=0)
    if len(found) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    _plain(axes)


def series(lines: list[dict[str, Any]], name: str, what: str) -> Series:
    """The steps and values of a metric, without those that were not finite."""
    points = [
        (line["step"], line[name])
        for line in lines
        if line["what"] == what and line.get(name) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> list[float]:
    """The mean of a sixtieth of the run to either side, or of what there is of it."""
    reach = len(values) // 60
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _starting(lines: list[dict[str, Any]], beginning: str) -> dict[str, Series]:
    """Training metrics by what their names say beyond the beginning."""
    names = sorted({name for line in lines for name in line if name.startswith(beginning)})
    found = {name: series(lines, name, "train") for name in names}
    return {n.removeprefix(beginning).strip("_"): each for n, each in found.items() if each[0]}


def _line(axes: Axes, points: Series, colour: str, label: str) -> None:
    """Every value, faintly, and their course."""
    steps, values = points
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth(values), color=colour, linewidth=2, label=label)


def _title(axes: Axes, text: str, *, size: float) -> None:
    axes.set_title(text, loc="left", fontsize=size, color=INK)


def _plain(axes: Axes) -> None:
    plain(axes, grid="y")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
