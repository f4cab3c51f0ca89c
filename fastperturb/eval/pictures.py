"""An evaluation's picture: whether there were enough draws, and who differs from the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.report.figures import FAINT, INK, MARKERS, PALETTE, plain

ACROSS = 5  # panels in a row

Results = Mapping[str, Any]


def draw(results: Results, path: Path) -> bool:
    """The picture of what results.json holds, as a PNG; False where there is nothing to see."""
    domains = [each["name"] for each in results["domains"]]
    parts: list[tuple[float, Callable[[Any, Results, Sequence[str]], None]]] = []
    if _has_draws(results):
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
    inner: Any = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
    for (_, draw_part), part in zip(parts, inner[:, 0]):
        draw_part(part, results, domains)
    figure.savefig(path)
    return True


def draw_curves(figure: Any, results: Results, domains: Sequence[str]) -> None:
    """For each domain the nll against draws; what has one draw is a line across."""
    panels = _panels(figure, len(domains))
    measurements = results["measurements"]
    handles = {}
    for axes, name in zip(panels, domains):
        most = max(each["domains"][name]["num_samples"] for each in measurements)
        for number, each in enumerate(measurements):
            found, style = each["domains"][name], _style(number)
            if found["num_samples"] == 1:
                x, y = [1, most], [found["nll"]] * 2
                style = {"color": style["color"], "linestyle": "--"}
            else:
                x, y = found["curve"]["num_samples"], found["curve"]["nll"]
            [handles[_label(each)]] = axes.plot(x, y, markersize=4, linewidth=1.6, **style)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
        plain(axes, grid="y")
    figure.supylabel("nll of a token", color=INK, fontsize=10)
    figure.supxlabel("draws (dashed: models that have one)", color=INK, fontsize=10)
    look = {"frameon": False, "labelcolor": INK, "fontsize": 9}
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=5, **look)


def draw_differences(figure: Any, results: Results, domains: Sequence[str]) -> None:
    """For each domain the changes of the nll, with their intervals over documents."""
    with_mean = len(domains) > 1
    panels = _panels(figure, len(domains) + with_mean, sharey=True)
    numbers = {_label(each): n for n, each in enumerate(results["measurements"])}
    rows = results["differences"]
    labels = [_label(each) for each in rows]
    for axes, name in zip(panels, [*domains, None]):
        axes.axvline(0, color=FAINT, linewidth=1)
        for height, (label, each) in enumerate(zip(labels, rows)):
            found = each["mean"] if name is None else each["domains"][name]
            style = _style(numbers[label])
            # A line of its own: an interval between percentiles need not hold the estimate.
            ends = (found["low"], found["high"])
            axes.plot(ends, [height, height], linewidth=1.6, color=style["color"])
            axes.plot(found["estimate"], height, markersize=5, **style)
        title = "mean of the domains" if name is None else name
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.15)
        plain(axes, grid="x")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
    about = f"change of the nll against {_label(results['reference'])}: left is better"
    figure.supxlabel(about, color=INK, fontsize=10)


def _panels(figure: Any, count: int, **options: Any) -> Sequence[Axes]:
    """So many panels, a few in a row."""
    shape = (_rows(count), min(ACROSS, count))
    panels: Sequence[Axes] = figure.subplots(*shape, squeeze=False, **options).flatten()
    for axes in panels[count:]:
        axes.set_visible(False)
    return panels


def _rows(panels: int) -> int:
    return -(-panels // ACROSS)


def _has_draws(results: Results) -> bool:
    """Whether any model has draws."""
    return any(
        found["num_samples"] > 1
        for each in results["measurements"]
        for found in each["domains"].values()
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
