"""Pictures of the logit matrices of several models: spectra, KL by rank, angles and sizes.

Everything is drawn from plain results, {name of a model: {
    "spectrum": Spectrum.to_dict(),
    "exponent": Exponent.to_dict(),
    "kl": [KLByRank.to_dict(), ...],
    "angles": {the two subspaces: Angles.to_dict(), ...},
    "sizes": [SubmatrixFit.to_dict(), ...],
    "generation": Comparison.to_dict(),
}}, where a model may lack any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.report.figures import FAINT, INK, MARKERS, PALETTE, plain

LINES = ("-", "--", ":", "-.")
# In nats; smaller values are as good as 0 and would squeeze the rest of the axis.
LEAST_KL, LEAST_WRITTEN = 1e-6, 1e-3

Models = Mapping[str, Mapping[str, Any]]


def draw(models: Models, path: Path) -> bool:
    """Draw these models into a PNG; return False, without a file, if there is nothing to draw."""
    panels: dict[str, Callable[[Axes, Models], None]] = {
        "spectrum": draw_spectra,
        "kl": draw_kl,
        "angles": draw_angles,
        "sizes": draw_sizes,
    }
    if len(models) > len(PALETTE):  # these have a line or more a model, in too few colours
        del panels["angles"], panels["sizes"]
    shown = [name for name in panels if any(model.get(name) for model in models.values())]
    if not shown:
        return False
    rows, columns = -(-len(shown) // 2), min(2, len(shown))
    figure = Figure(figsize=(6.5 * columns, 4.6 * rows + 0.5), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, hspace=0.05, wspace=0.05)
    subplots = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(subplots, shown):
        panels[name](axes, models)
    for axes in subplots[len(shown) :]:
        axes.set_visible(False)
    names = [axes.plot([], [], color=_colour(models, name), linewidth=3)[0] for name in models]
    figure.legend(names, list(models), loc="outside upper left", ncols=5, **_LEGEND)
    figure.savefig(path)
    return True


def draw_spectra(axes: Axes, models: Models) -> None:
    """Draw singular values as shares of the matrix's norm, and the fitted power laws."""
    for name, model in models.items():
        if not (spectrum := model.get("spectrum")):
            continue
        colour, norm = _colour(models, name), spectrum["frobenius"]
        shares = np.array(spectrum["singular_values"]) / norm
        index = np.arange(1, len(shares) + 1)
        axes.plot(index, shares, color=colour, linewidth=4, alpha=0.3, marker=".", markersize=3)
        if fit := model.get("exponent"):
            ends = np.array([fit["first"], fit["last"]])
            line = fit["scale"] / norm * ends ** -fit["estimate"]
            label = f"$i^{{-{fit['estimate']:.2f}}}$  [{fit['low']:.2f}, {fit['high']:.2f}]"
            shown = label if len(models) <= len(PALETTE) else None
            axes.plot(ends, line, "--", color=colour, linewidth=1.6, label=shown)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, "singular values", "number i (dashed: fitted)", "share of the Frobenius norm")


def draw_kl(axes: Axes, models: Models) -> None:
    """Draw the average KL against rank, in sample and held out."""
    for name, model in models.items():
        for curve in model.get("kl") or ():
            points = [(r, kl) for r, kl in zip(curve["ranks"], curve["kl"]) if kl >= LEAST_KL]
            axes.plot(
                *zip(*points),
                linestyle="--" if curve["held_out"] else "-",
                color=_colour(models, name),
                marker="o",
                markersize=3.5,
                linewidth=1.6,
            )
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator([0, *(4**n for n in range(9))]))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
    axes.set_xlim(left=0)
    _finish(
        axes, "average KL of the matrix cut to rank r", "r (dashed: held-out histories)", "nats"
    )


def draw_angles(axes: Axes, models: Models) -> None:
    """Draw principal angles, and those of random subspaces in grey."""
    pairs = dict.fromkeys(pair for model in models.values() for pair in _angles(model))
    line_of = {pair: LINES[number % len(LINES)] for number, pair in enumerate(pairs)}
    for name, model in models.items():
        for pair, angles in _angles(model).items():
            index, colour = range(1, len(angles["angles"]) + 1), _colour(models, name)
            axes.plot(index, np.degrees(angles["random"]), line_of[pair], color=FAINT, linewidth=1)
            axes.plot(
                index, np.degrees(angles["angles"]), line_of[pair], color=colour, linewidth=1.6
            )
    for pair, line in line_of.items():
        axes.plot([], [], line, color=INK, label=pair)
    axes.set_ylim(0, 92)
    axes.yaxis.set_major_locator(ticker.MultipleLocator(15))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    _finish(axes, "principal angles", "number (grey: random subspaces)", "degrees")


def draw_sizes(axes: Axes, models: Models) -> None:
    """Draw the exponents of sub-matrices against histories, a curve for each number of futures."""
    rows = [(name, row) for name, model in models.items() for row in model.get("sizes") or ()]
    futures = sorted({row["futures"] for _, row in rows})
    series: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for name, row in rows:
        series.setdefault((name, row["futures"]), []).append(row)
    for number, ((name, count), curve) in enumerate(series.items()):
        curve.sort(key=lambda row: row["histories"])
        # Side by side, so that intervals do not hide each other.
        offset = 1.02 ** (number - (len(series) - 1) / 2)
        fits = [row["exponent"] for row in curve]
        estimates = np.array([fit["estimate"] for fit in fits])
        errors = [
            estimates - [fit["low"] for fit in fits],
            [fit["high"] for fit in fits] - estimates,
        ]
        axes.errorbar(
            [row["histories"] * offset for row in curve],
            estimates,
            yerr=errors,
            color=_colour(models, name),
            linewidth=1.2,
            markersize=4.5,
            fmt=MARKERS[futures.index(count) % len(MARKERS)] + LINES[0],
        )
    for count, marker in zip(futures, MARKERS * len(futures)):
        axes.plot([], [], marker, color=INK, markersize=4.5, label=f"{count} futures")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(sorted({r["histories"] for _, r in rows})))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
    _finish(axes, "exponent of nested sub-matrices", "histories", "exponent")


def draw_generation(models: Models, path: Path) -> bool:
    """Draw the KL of combinations and baselines by step; return False if nothing was written."""
    shown = {name: model["generation"] for name, model in models.items() if "generation" in model}
    if not shown:
        return False
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6 * columns + 2, 4.4 * rows), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    subplots = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    ways = {
        way["name"]: way["is_baseline"]
        for comparison in shown.values()
        for way in comparison["ways"]
    }
    looks = {
        name: {
            "linestyle": "--" if is_baseline else "-",
            "linewidth": 1.4 if is_baseline else 2.4,
            "color": PALETTE[number % len(PALETTE)],
            "marker": MARKERS[number // len(PALETTE) % len(MARKERS)],
            "markersize": 3.5,
        }
        for number, (name, is_baseline) in enumerate(ways.items())
    }
    for axes, (name, comparison) in zip(subplots, shown.items()):
        for way in comparison["ways"]:
            total = np.cumsum(way["kl_by_step"])
            steps = range(1, len(total) + 1)
            axes.plot(steps, np.maximum(total, LEAST_WRITTEN), **looks[way["name"]])
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        _finish(axes, name, "tokens written", "cumulative KL, nats")
    lines = [subplots[0].plot([], [], **look)[0] for look in looks.values()]
    figure.legend(lines, list(looks), loc="outside right upper", **_LEGEND)
    for axes in subplots[len(shown) :]:
        axes.set_visible(False)
    figure.savefig(path)
    return True


_LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9}


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK, fontsize=10)
    axes.set_ylabel(y, color=INK, fontsize=10)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(**_LEGEND)
    plain(axes, grid="y")


def _angles(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return model.get("angles") or {}


def _colour(models: Models, name: str) -> str:
    return PALETTE[list(models).index(name) % len(PALETTE)]
