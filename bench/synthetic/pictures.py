"""The study's pictures, from the content of results.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.synthetic.summary import TITLES, best_fixed, pick
from fastperturb.demo.language import NOISE_SD, REGIONS
from fastperturb.report.figures import (
    BLACK,
    BLUE,
    BROWN,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PINK,
    PURPLE,
    SKY,
    VERMILION,
    plain,
)

COLOURS = {
    "iwae": BLUE,
    "jvi_clip": PINK,
    "quadratic": GREEN,
    "mlmc": ORANGE,
    "sumo": BROWN,
    "iwae + 10 quadratic": SKY,
    "jensen": FAINT,
    "jvi": PURPLE,
    "exact": BLACK,
    "fixed": VERMILION,
    "learned": BLUE,
}
NOISY = ("movement", "noisy")


def draw_all(results: dict[str, Any], folder: Path) -> None:
    """Write every picture as a PNG."""
    for name, panels in (
        ("draws", draw_samples),
        ("flops", draw_flops),
        ("scale", draw_scale),
        ("size", draw_size),
        ("statistics", draw_statistics),
    ):
        figure = Figure(figsize=(13, 4.6), dpi=130, facecolor="white", layout="constrained")
        panels(figure, results)
        figure.savefig(folder / f"{name}.png")


def draw_samples(figure: Figure, results: dict[str, Any]) -> None:
    """Draw KL in and out of support, and the learned shift, by samples and estimator."""
    rows = results["rows"]
    panels = figure.subplots(1, 4)
    estimators = lines_of(rows, "draws")
    estimators.remove("exact")
    for axes, region in zip(panels, REGIONS):
        titled(axes, f"KL {TITLES[region]}")
        for estimator in estimators:
            line(axes, of(rows, "draws", estimator), estimator, ("kl", region))
        exact = pick(rows, "fixed", "exact", 0.0)["kl"][region]["mean"]
        axes.axhline(exact, color=INK, linewidth=1.2, linestyle="--", label="exact prefix")
        best = [best_fixed(rows, f"iwae, M = {M}") for M in (4, 16)]
        axes.plot(
            (4, 16),
            [row["kl"][region]["mean"] for row in best],
            "s--",
            color=COLOURS["fixed"],
            label="best fixed noise",
        )
        axes.set_yscale("log")
    titled(panels[3], "sd along the noisy axis")
    for estimator in estimators:
        line(panels[3], of(rows, "draws", estimator), estimator, NOISY)
    panels[3].axhline(NOISE_SD, color=INK, linewidth=1, linestyle=":")
    for axes in panels:
        samples_axis(axes, upto=16)
    legend(figure, panels[0])


def draw_flops(figure: Figure, results: dict[str, Any]) -> None:
    """Draw KL of every arm at equal flops, the best out of support on top."""
    rows = [row for row in results["rows"] if row["experiment"] == "flops"]
    rows.sort(key=lambda row: row["kl"]["band1"]["mean"] + row["kl"]["band2"]["mean"], reverse=True)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, region in zip(panels, REGIONS):
        titled(axes, f"KL {TITLES[region]}")
        for height, row in enumerate(rows):
            value = row["kl"][region]
            axes.plot([value["low"], value["high"]], [height] * 2, color=colour(row), linewidth=2)
            axes.plot(value["mean"], height, "o", color=colour(row), ms=7)
        axes.set_xscale("log")
        readable(axes.xaxis)
        plain(axes, grid="both")
    labels = [f"{row['line']}, batch {row['x']:g}" for row in rows]
    panels[0].set_yticks(range(len(rows)), labels)


def draw_scale(figure: Figure, results: dict[str, Any]) -> None:
    """Draw the learned scale against the true one, against samples and against pairs."""
    rows = results["rows"]
    panels = figure.subplots(1, 3)
    titled(panels[0], "learned sd against the truth's")
    panels[0].plot([0, 0.5], [0, 0.5], color=INK, linewidth=1, linestyle=":")
    panels[0].set_xlabel("the truth's sd along the noisy axis", color=INK)
    for experiment, where, style in (("held_noise", "trunk held", "-"), ("noise", "free", "--")):
        for name in lines_of(rows, experiment):
            chosen = of(rows, experiment, name)
            if "movement" in chosen[0]:
                line(panels[0], chosen, f"{name} ({where})", NOISY, style=style)
    panels[0].legend(fontsize=8, frameon=False)
    titled(panels[1], "trunk held: learned sd by samples")
    for estimator in lines_of(rows, "held_draws"):
        line(panels[1], of(rows, "held_draws", estimator), estimator, NOISY)
    samples_axis(panels[1], upto=64)
    panels[1].legend(fontsize=8, frameon=False)
    titled(panels[2], "trunk held: learned sd by training pairs")
    for name in lines_of(rows, "held_size"):
        line(panels[2], of(rows, "held_size", name), name, NOISY)
    panels[2].legend(fontsize=8, frameon=False)
    pairs_axis(panels[2])
    for axes in panels[1:]:
        axes.axhspan(0.95 * NOISE_SD, 1.05 * NOISE_SD, color="#eef1f4", zorder=0)
        axes.axhline(NOISE_SD, color=INK, linewidth=1, linestyle=":")
    for axes in panels:
        plain(axes)


def draw_size(figure: Figure, results: dict[str, Any]) -> None:
    """Draw KL by the number of training pairs."""
    rows = results["rows"]
    panels = figure.subplots(1, 3)
    for axes, region in zip(panels, REGIONS):
        titled(axes, f"KL {TITLES[region]}")
        for name in lines_of(rows, "size"):
            style = "--" if name == "fixed 0.2" else "-"
            chosen = of(rows, "size", name)
            line(axes, chosen, name, ("kl", region), style=style)
        axes.set_yscale("log")
        readable(axes.yaxis)
        pairs_axis(axes)
        plain(axes)
    legend(figure, panels[0])


def draw_statistics(figure: Figure, results: dict[str, Any]) -> None:
    """Draw the bias of gradients and solutions by samples, and the coverage of intervals."""
    left, middle, right = figure.subplots(1, 3)
    titled(left, "bias of the gradient, over its size")
    titled(middle, "learned |U| over the true one, unlimited data")
    for name in dict.fromkeys(row["equation"] for row in results["bias"]):
        chosen = [row for row in results["bias"] if row["equation"] == name]
        samples = [row["num_samples"] for row in chosen]
        shown = [max(row["gradient"], 1e-5) for row in chosen]
        left.plot(samples, shown, "o-", color=COLOURS[name], label=name, ms=4)
        solution = [row["solution"] for row in chosen]
        middle.plot(samples, solution, "o-", color=COLOURS[name], label=name, ms=4)
    left.set_yscale("log")
    left.set_ylabel("1e-5 stands for zero", color=FAINT)
    middle.axhline(1, color=INK, linewidth=1, linestyle=":")
    middle.legend(fontsize=8, frameon=False, loc="center right")
    for axes in (left, middle):
        samples_axis(axes)
    left.yaxis.set_major_locator(ticker.LogLocator())
    titled(right, "coverage of 95% intervals, by n")
    for name in dict.fromkeys(row["name"] for row in results["coverage"]):
        chosen = [row for row in results["coverage"] if row["name"] == name]
        n = [row["examples"] for row in chosen]
        covered = [row["coverage"]["information"] for row in chosen]
        ink = COLOURS[name.split(",")[0]] if "," in name else INK
        style = "o--" if name == "iwae, M = 4" else "o-"
        right.plot(n, covered, style, color=ink, label=name, ms=5)
    right.axhspan(0.93, 0.97, color="#eef1f4", zorder=0)
    right.set_xscale("log")
    right.set_xticks(n, [str(count) for count in n])
    right.xaxis.set_minor_locator(ticker.NullLocator())
    right.set_xlabel("n", color=INK)
    right.legend(fontsize=8, frameon=False)
    plain(right)


def lines_of(rows: Sequence[dict[str, Any]], experiment: str) -> list[str]:
    """Return the names of an experiment's lines, in their order."""
    return list(dict.fromkeys(row["line"] for row in rows if row["experiment"] == experiment))


def of(rows: Sequence[dict[str, Any]], experiment: str, name: str) -> list[dict[str, Any]]:
    """Return the rows of one line."""
    return [row for row in rows if (row["experiment"], row["line"]) == (experiment, name)]


def colour(row: dict[str, Any]) -> str:
    """Return the colour of a row's estimator or method, which its line begins with."""
    return COLOURS[row["line"].split(",")[0].split(" 0.")[0]]


def line(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    label: str,
    measured: tuple[str, str],
    *,
    style: str = "-",
) -> None:
    """Draw means with their intervals; fresh pairs are drawn at half a million.

    measured: the keys of the value in a row, such as ("kl", "band1").
    """
    x = [5e5 if row["x"] is None else row["x"] for row in rows]
    quantity, where = measured
    values = [row[quantity][where] for row in rows]
    axes.errorbar(
        x,
        [value["mean"] for value in values],
        yerr=[
            [value["mean"] - value["low"] for value in values],
            [value["high"] - value["mean"] for value in values],
        ],
        fmt=f"o{style}",
        color=colour(rows[0]),
        label=label,
        ms=4,
        capsize=2,
        linewidth=1.6,
    )


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def titled(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=11, color=INK, loc="left", fontweight="bold")


def samples_axis(axes: Axes, upto: int = 32) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**power for power in range(1, upto.bit_length())])
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
    axes.set_xlabel("samples M", color=INK)
    readable(axes.yaxis)
    plain(axes)


def pairs_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xticks([500, 2000, 8000, 30000, 120000, 5e5], ["500", "2k", "8k", "30k", "120k", "∞"])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("training pairs", color=INK)


def readable(axis: Any) -> None:
    """Write plain numbers at the ticks of a logarithmic scale."""
    if axis.get_scale() == "log":
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
