"""The demo's picture: who extrapolates, and what the transforms learned to move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.demo import language
from fastperturb.report.figures import FAINT, INK, plain, spread_out

# Okabe and Ito's palette, which colour-blind readers can tell apart; the pale ones are darkened,
# because names are lettered in them.
COLOURS = {
    "exact": "#222222",
    "jensen": "#8C8C8C",
    "fixed": "#D55E00",
    "learned": "#0072B2",
    "learned_iwae_m4": "#3FA0DC",
    "learned_jvi_clip_m4": "#C060A0",
    "learned_quadratic_m2": "#009E73",
    "learned_mlmc": "#D18F00",
}
NAMES = {
    "exact": "exact prefix",
    "jensen": "fixed noise, Jensen loss",
    "fixed": "fixed noise, best scale",
    "learned": "learned, iwae",
    "learned_iwae_m4": "learned, iwae",
    "learned_jvi_clip_m4": "learned, jvi_clip",
    "learned_quadratic_m2": "learned, quadratic",
    "learned_mlmc": "learned, mlmc",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Both panels, from what results.json holds, as a PNG."""
    figure = Figure(figsize=(13, 5.8), dpi=150, facecolor="white")
    left, right = figure.subplots(
        1, 2, width_ratios=(1.55, 1), gridspec_kw={"wspace": 0.54, "left": 0.05, "right": 0.985}
    )
    figure.subplots_adjust(bottom=0.12, top=0.82)
    draw_extrapolation(left, results)
    draw_movement(right, results)
    figure.savefig(path)


def draw_extrapolation(axes: Axes, results: dict[str, Any]) -> None:
    positions, rows = results["positions"], results["rows"]
    title(
        axes,
        "How far from the truth, in and out of support",
        "KL(truth || model) for prefixes whose tokens both lie at a; log scale",
    )
    low, high = language.SUPPORT
    axes.axvspan(low - 0.05, high, color="#eef1f4", zorder=0, linewidth=0)
    remark(axes, (low + high) / 2, "training support")
    for number in (1, 2):
        ends = language.REGIONS[f"band{number}"]
        axes.axvline(ends[0], color="#dddddd", linewidth=0.8, zorder=0)
        axes.axvline(ends[1], color="#dddddd", linewidth=0.8, zorder=0)
        remark(axes, sum(ends) / 2, f"band {number}")
    for row in rows:
        main = row["method"] in ("exact", "fixed", "learned")
        axes.plot(
            positions,
            row["curve"],
            color=COLOURS[row["method"]],
            linewidth=3.2 if row["method"] == "learned" else 2.2 if main else 1.4,
            zorder=4 if main else 3,
            solid_capstyle="round",
        )
    axes.set_yscale("log")
    axes.set_xlim(low - 0.05, 1.0)
    axes.xaxis.set_major_locator(ticker.MultipleLocator(0.5))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("prefix position a along the noisy axis", color=INK)
    plain(axes)
    label_ends(axes, rows)


def label_ends(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Each line's name at its right end, moved apart where ends are close."""
    to_height = axes.transData + axes.transAxes.inverted()
    ends = sorted((to_height.transform((1.0, row["curve"][-1]))[1], row["method"]) for row in rows)
    heights = spread_out([height for height, _ in ends], gap=0.058)
    by_method = {row["method"]: row for row in rows}
    for (end, method), height in zip(ends, heights):
        axes.annotate(
            described(by_method[method]),
            xy=(1.0, end),
            xytext=(1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            **lettering(method),
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[method],
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkB": 0,
            },
            annotation_clip=False,
        )


def draw_movement(axes: Axes, results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if "movement" in row][::-1]
    title(
        axes,
        "What the noise moves",
        "sd along the noisy axis (disc) and the precise one (ring)",
    )
    for truth, name in ((0.0, "truth, precise"), (language.NOISE_SD, "truth, noisy")):
        axes.axvline(truth, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        remark(axes, truth, name)
    for height, row in enumerate(rows):
        colour = COLOURS[row["method"]]
        noisy, precise = row["movement"]["noisy"], row["movement"]["precise"]
        axes.plot([precise, noisy], [height, height], color=colour, linewidth=2.2, zorder=2)
        axes.plot(precise, height, "o", ms=10, mec=colour, mfc="white", mew=2.2, zorder=3)
        # A disc as large as the ring would hide it where noise is isotropic.
        axes.plot(noisy, height, "o", ms=10 if noisy > 1.1 * precise else 4, color=colour, zorder=4)
        axes.text(0.008, height + 0.3, described(row), va="center", **lettering(row["method"]))
    axes.set_yticks([])
    axes.set_ylim(-0.5, len(rows) - 0.35)
    largest = max([language.NOISE_SD, *(row["movement"]["noisy"] for row in rows)])
    axes.set_xlim(-0.025, largest + 0.035)
    axes.set_xlabel("shift, in grid units", color=INK)
    plain(axes)
    axes.spines["left"].set_visible(False)


def lettering(method: str) -> dict[str, Any]:
    weight = "bold" if method == "learned" else "normal"
    return {"fontsize": 10, "color": COLOURS[method], "fontweight": weight}


def described(row: dict[str, Any]) -> str:
    """A method's name and, where there is noise, its draws."""
    name = NAMES[row["method"]]
    if "scale" in row:
        name = f"{name} ({row['scale']:g})"
    if row["method"].startswith("learned"):
        name = f"{name}, {row['samples']:.2g} draws"
    return name


def title(axes: Axes, text: str, below: str) -> None:
    axes.text(0, 1.135, text, transform=axes.transAxes, fontsize=14, fontweight="bold", color=INK)
    axes.text(0, 1.075, below, transform=axes.transAxes, fontsize=10, color=FAINT)


def remark(axes: Axes, position: float, text: str) -> None:
    axes.text(
        position,
        1.012,
        text,
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=9,
        color=FAINT,
    )
