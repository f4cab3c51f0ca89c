"""The picture of a run: its likelihood step by step, and diagnostics below."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.report.figures import INK, PALETTE, plain
from fastperturb.train.report import read_metrics

TRAIN, EVAL = PALETTE[:2]

Series = tuple[list[int], list[float]]  # steps and values

# The small panels: prefixes of the metrics that each shows, and its title.
PANELS = {
    "ess": "effective samples",
    "shift": "shift |T(e) - e| / |e|",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}


def draw(metrics_path: Path, png_path: Path) -> None:
    """Draw the curves of a metrics file into a PNG."""
    lines = read_metrics(metrics_path)
    panels = {
        title: curves for prefix, title in PANELS.items() if (curves := _curves(lines, prefix))
    }
    figure = Figure(figsize=(11, 7 if panels else 4.6), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12, hspace=0.06)
    grid = figure.add_gridspec(
        2 if panels else 1, max(1, len(panels)), height_ratios=(2.1, 1)[: 2 if panels else 1]
    )
    draw_likelihood(figure.add_subplot(grid[0, :]), lines)
    for column, (title, curves) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(grid[1, column]), title, curves)
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


def draw_panel(axes: Axes, title: str, curves: dict[str, Series]) -> None:
    for (name, points), colour in zip(curves.items(), (TRAIN, EVAL, INK)):
        _line(axes, points, colour, name)
    _title(axes, title, size=10)
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    _plain(axes)


def series(lines: list[dict[str, Any]], name: str, phase: str) -> Series:
    """Return the steps and values of a metric, without those that were not finite."""
    points = [
        (line["step"], line[name])
        for line in lines
        if line["what"] == phase and line.get(name) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> list[float]:
    """Return running means over a sixtieth of the run to either side, less at the ends."""
    width = len(values) // 60
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - width), min(len(values), i + width + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _curves(lines: list[dict[str, Any]], prefix: str) -> dict[str, Series]:
    """Return the training metrics with this prefix, by the rest of their names."""
    names = sorted({name for line in lines for name in line if name.startswith(prefix)})
    curves = {name.removeprefix(prefix).strip("_"): series(lines, name, "train") for name in names}
    return {name: points for name, points in curves.items() if points[0]}


def _line(axes: Axes, points: Series, colour: str, label: str) -> None:
    """Draw every value faintly, and a smoothed line."""
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
