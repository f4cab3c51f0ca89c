"""What logit matrices of several models look like: spectra, KL by rank, angles and sizes.

Everything is drawn from plain results, {name of a model: {
    "spectrum": Spectrum.to_dict(),
    "exponent": Exponent.to_dict(),
    "kl": [KLByRank.to_dict(), ...],
    "angles": {what was compared: Angles.to_dict(), ...},
    "sizes": [Size.to_dict(), ...],
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
# Nats; what is smaller is as good as nothing and would squeeze the rest.
LEAST_KL, LEAST_WRITTEN = 1e-6, 1e-3

Models = Mapping[str, Mapping[str, Any]]


def draw(models: Models, path: Path) -> bool:
    """The picture of these models as a PNG; False where there is nothing to see."""
    panels: dict[str, Callable[[Axes, Models], None]] = {
        "spectrum": draw_spectra,
        "kl": draw_kl,
        "angles": draw_angles,
        "sizes": draw_sizes,
    }
    if len(models) > len(PALETTE):  # these have a line or more a model that could not be told apart
        del panels["angles"], panels["sizes"]
    shown = [name for name in panels if any(each.get(name) for each in models.values())]
    if not shown:
        return False
    rows, across = -(-len(shown) // 2), min(2, len(shown))
    figure = Figure(figsize=(6.5 * across, 4.6 * rows + 0.5), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, hspace=0.05, wspace=0.05)
    subplots = figure.subplots(rows, across, squeeze=False).flatten()
    for axes, name in zip(subplots, shown):
        panels[name](axes, models)
    for axes in subplots[len(shown) :]:
        axes.set_visible(False)
    names = [axes.plot([], [], color=_colour(models, name), linewidth=3)[0] for name in models]
    figure.legend(names, list(models), loc="outside upper left", ncols=5, **_LEGEND)
    figure.savefig(path)
    return True


def draw_spectra(axes: Axes, models: Models) -> None:
    """Singular values as shares of the matrix's norm, and the fitted power laws."""
    for name, found in models.items():
        if not (of := found.get("spectrum")):
            continue
        colour, shares = _colour(models, name), np.array(of["singular_values"]) / of["frobenius"]
        index = np.arange(1, len(shares) + 1)
        axes.plot(index, shares, color=colour, linewidth=4, alpha=0.3, marker=".", markersize=3)
        if fit := found.get("exponent"):
            ends = np.array([fit["first"], fit["last"]])
            line = fit["scale"] / of["frobenius"] * ends ** -fit["estimate"]
            label = f"$i^{{-{fit['estimate']:.2f}}}$  [{fit['low']:.2f}, {fit['high']:.2f}]"
            shown = label if len(models) <= len(PALETTE) else None
            axes.plot(ends, line, "--", color=colour, linewidth=1.6, label=shown)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, "singular values", "number i (dashed: fitted)", "share of the Frobenius norm")


def draw_kl(axes: Axes, models: Models) -> None:
    """The average KL against rank, in sample and held out."""
    for name, found in models.items():
        for each in found.get("kl") or ():
            seen = [(r, kl) for r, kl in zip(each["ranks"], each["kl"]) if kl >= LEAST_KL]
            line, colour = "--" if each["held_out"] else "-", _colour(models, name)
            axes.plot(
                *zip(*seen), linestyle=line, color=colour, marker="o", markersize=3.5, linewidth=1.6
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
    """Principal angles, and those of random subspaces in grey."""
    compared = list(dict.fromkeys(what for found in models.values() for what in _angles(found)))
    for name, found in models.items():
        for what, each in _angles(found).items():
            line = LINES[compared.index(what) % len(LINES)]
            index = range(1, len(each["angles"]) + 1)
            colour = _colour(models, name)
            axes.plot(index, np.degrees(each["random"]), line, color=FAINT, linewidth=1)
            axes.plot(index, np.degrees(each["angles"]), line, color=colour, linewidth=1.6)
    for what in compared:
        line = LINES[compared.index(what) % len(LINES)]
        axes.plot([], [], line, color=INK, label=what)
    axes.set_ylim(0, 92)
    axes.yaxis.set_major_locator(ticker.MultipleLocator(15))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    _finish(axes, "principal angles", "number (grey: random subspaces)", "degrees")


def draw_sizes(axes: Axes, models: Models) -> None:
    """The exponent of nested sub-matrices, against histories and for numbers of futures."""
    rows = [(name, row) for name, found in models.items() for row in found.get("sizes") or ()]
    futures = sorted({row["futures"] for _, row in rows})
    series: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for name, row in rows:
        series.setdefault((name, row["futures"]), []).append(row)
    for number, ((name, count), each) in enumerate(series.items()):
        each.sort(key=lambda row: row["histories"])
        # Side by side, so that intervals do not hide each other.
        beside = 1.02 ** (number - (len(series) - 1) / 2)
        found = [row["exponent"] for row in each]
        estimates = np.array([fit["estimate"] for fit in found])
        errors = [
            estimates - [fit["low"] for fit in found],
            [fit["high"] for fit in found] - estimates,
        ]
        axes.errorbar(
            [row["histories"] * beside for row in each],
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
    """What combinations and baselines lose as they write on; False where nothing was written."""
    shown = {name: found["generation"] for name, found in models.items() if "generation" in found}
    if not shown:
        return False
    across = min(2, len(shown))
    rows = -(-len(shown) // across)
    figure = Figure(figsize=(6 * across + 2, 4.4 * rows), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    subplots = figure.subplots(rows, across, squeeze=False, sharey=True).flatten()
    ways = {way["name"]: way["is_baseline"] for each in shown.values() for way in each["ways"]}
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
    for axes, (name, found) in zip(subplots, shown.items()):
        for way in found["ways"]:
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


def _angles(found: Mapping[str, Any]) -> Mapping[str, Any]:
    return found.get("angles") or {}


def _colour(models: Models, name: str) -> str:
    return PALETTE[list(models).index(name) % len(PALETTE)]
