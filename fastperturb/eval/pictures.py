"""An evaluation's picture: nll against the number of samples, and differences from the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.report.figures import FAINT, INK, MARKERS, PALETTE, plain

COLUMNS = 5  # most panels in a row

Results = Mapping[str, Any]


def draw(results: Results, path: Path) -> bool:
    """Draw the content of results.json as a PNG; return False where there is nothing to draw."""
    domains = [domain["name"] for domain in results["domains"]]
    parts: list[tuple[float, Callable[[Any, Results, Sequence[str]], None]]] = []
    if _has_samples(results):
        parts.append((0.9 + 2.6 * _rows(len(domains)), draw_curves))
    if results["differences"]:
        panels = len(domains) + (len(domains) > 1)
        parts.append(
            (0.5 + (0.8 + 0.26 * len(results["differences"])) * _rows(panels), draw_differences)
        )
    if not parts:
        return False
    heights = [height for height, _ in parts]
    figure = Figure(figsize=(13, sum(heights)), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, hspace=0.06)
    subfigures: Any = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
    for (_, draw_part), subfigure in zip(parts, subfigures[:, 0]):
        draw_part(subfigure, results, domains)
    figure.savefig(path)
    return True


def draw_curves(figure: Any, results: Results, domains: Sequence[str]) -> None:
    """Draw the nll of each domain against the number of samples; one sample is a line across."""
    panels = _panels(figure, len(domains))
    measurements = results["measurements"]
    handles = {}
    for axes, name in zip(panels, domains):
        most = max(measurement["domains"][name]["num_samples"] for measurement in measurements)
        for number, measurement in enumerate(measurements):
            likelihood, style = measurement["domains"][name], _style(number)
            if likelihood["num_samples"] == 1:
                x, y = [1, most], [likelihood["nll"]] * 2
                style = {"color": style["color"], "linestyle": "--"}
            else:
                x, y = likelihood["curve"]["num_samples"], likelihood["curve"]["nll"]
            [handles[_label(measurement)]] = axes.plot(x, y, markersize=4, linewidth=1.6, **style)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
        plain(axes, grid="y")
    figure.supylabel("nll of a token", color=INK, fontsize=10)
    figure.supxlabel("samples (dashed: models with one sample)", color=INK, fontsize=10)
    legend = {"frameon": False, "labelcolor": INK, "fontsize": 9}
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=5, **legend)


def draw_differences(figure: Any, results: Results, domains: Sequence[str]) -> None:
    """Draw the changes of the nll in each domain, with their intervals over documents."""
    with_mean = len(domains) > 1
    panels = _panels(figure, len(domains) + with_mean, sharey=True)
    numbers = {_label(measured): n for n, measured in enumerate(results["measurements"])}
    rows = results["differences"]
    labels = [_label(row) for row in rows]
    for axes, name in zip(panels, [*domains, None]):
        axes.axvline(0, color=FAINT, linewidth=1)
        for height, (label, row) in enumerate(zip(labels, rows)):
            change = row["mean"] if name is None else row["domains"][name]
            style = _style(numbers[label])
            # Not error bars: an interval between percentiles need not contain the estimate.
            ends = (change["low"], change["high"])
            axes.plot(ends, [height, height], linewidth=1.6, color=style["color"])
            axes.plot(change["estimate"], height, markersize=5, **style)
        heading = "mean of the domains" if name is None else name
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.15)
        plain(axes, grid="x")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
    caption = f"change of the nll against {_label(results['reference'])}: left is better"
    figure.supxlabel(caption, color=INK, fontsize=10)


def _panels(figure: Any, count: int, **options: Any) -> Sequence[Axes]:
    """Return `count` panels, at most COLUMNS in a row."""
    shape = (_rows(count), min(COLUMNS, count))
    panels: Sequence[Axes] = figure.subplots(*shape, squeeze=False, **options).flatten()
    for axes in panels[count:]:
        axes.set_visible(False)
    return panels


def _rows(panels: int) -> int:
    return -(-panels // COLUMNS)


def _has_samples(results: Results) -> bool:
    """Tell if any model has more than one sample."""
    return any(
        likelihood["num_samples"] > 1
        for measurement in results["measurements"]
        for likelihood in measurement["domains"].values()
    )


def _label(measurement: Mapping[str, Any]) -> str:
    if measurement["temperature"] == 1.0 and not measurement["tuned"]:
        return str(measurement["model"])
    tuned = ", tuned" if measurement["tuned"] else ""
    return f"{measurement['model']} (T = {measurement['temperature']:.3g}{tuned})"


def _style(number: int) -> dict[str, Any]:
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number // len(PALETTE) % len(MARKERS)],
    }
