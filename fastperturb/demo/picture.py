"""The demo's picture: distance from the truth, and the shift that transforms learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.demo import language
from fastperturb.report.figures import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PINK,
    PURPLE,
    SKY,
    VERMILION,
    LineEnd,
    label_ends,
    lettering,
    plain,
    title,
)

COLOURS = {
    "exact": BLACK,
    "jensen": FAINT,
    "fixed": VERMILION,
    "learned": BLUE,
    "learned_iwae_m4": SKY,
    "learned_stratified_m4": PURPLE,
    "learned_jvi_clip_m4": PINK,
    "learned_quadratic_m2": GREEN,
    "learned_mlmc": ORANGE,
}
NAMES = {
    "exact": "exact prefix",
    "jensen": "fixed noise, Jensen loss",
    "fixed": "fixed noise, best scale",
    "learned": "learned, iwae",
    "learned_iwae_m4": "learned, iwae",
    "learned_stratified_m4": "learned, stratified",
    "learned_jvi_clip_m4": "learned, jvi_clip",
    "learned_quadratic_m2": "learned, quadratic",
    "learned_mlmc": "learned, mlmc",
}
_TITLE_HEIGHT = 1.075  # leaves room for remarks between the axes and the title
_NAME_SIZE = 10


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw both panels from the content of results.json as a PNG."""
    figure = Figure(figsize=(13, 5.8), dpi=150, facecolor="white")
    left, right = figure.subplots(
        1, 2, width_ratios=(1.55, 1), gridspec_kw={"wspace": 0.54, "left": 0.05, "right": 0.985}
    )
    figure.subplots_adjust(bottom=0.12, top=0.82)
    draw_extrapolation(left, results)
    draw_shifts(right, results)
    figure.savefig(path)


def draw_extrapolation(axes: Axes, results: dict[str, Any]) -> None:
    """Draw KL to the truth against the position of the prefix along the noisy axis."""
    positions, rows = results["positions"], results["rows"]
    title(
        axes,
        "How far from the truth, in and out of support",
        "KL(truth || model) for prefixes whose tokens both lie at a; log scale",
        height=_TITLE_HEIGHT,
    )
    low, high = language.SUPPORT
    axes.axvspan(low - 0.05, high, color="#eef1f4", zorder=0, linewidth=0)
    remark(axes, (low + high) / 2, "training support")
    for number in (1, 2):
        limits = language.REGIONS[f"band{number}"]
        axes.axvline(limits[0], color="#dddddd", linewidth=0.8, zorder=0)
        axes.axvline(limits[1], color="#dddddd", linewidth=0.8, zorder=0)
        remark(axes, sum(limits) / 2, f"band {number}")
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
    axes.set_xlabel("prefix position a along the noisy axis", color=INK)
    plain(axes, grid="y")
    ends = [
        LineEnd(
            1.0,
            row["curve"][-1],
            described(row),
            COLOURS[row["method"]],
            bold=row["method"] == "learned",
        )
        for row in rows
    ]
    label_ends(axes, ends, gap=0.058, size=_NAME_SIZE)


def draw_shifts(axes: Axes, results: dict[str, Any]) -> None:
    """Draw the standard deviation of each method's shift along both axes."""
    rows = [row for row in results["rows"] if "movement" in row][::-1]
    title(
        axes,
        "Shift by the noise",
        "sd along the noisy (disc) and the precise axis (ring)",
        height=_TITLE_HEIGHT,
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
        axes.text(0.008, height + 0.3, described(row), va="center", **name_style(row["method"]))
    axes.set_yticks([])
    axes.set_ylim(-0.5, len(rows) - 0.35)
    largest = max([language.NOISE_SD, *(row["movement"]["noisy"] for row in rows)])
    axes.set_xlim(-0.025, largest + 0.035)
    axes.set_xlabel("shift, in grid units", color=INK)
    plain(axes)
    axes.spines["left"].set_visible(False)


def name_style(method: str) -> dict[str, Any]:
    """Return the text options for a method's name."""
    return lettering(COLOURS[method], bold=method == "learned", size=_NAME_SIZE)


def described(row: dict[str, Any]) -> str:
    """Return a method's name, with the scale of fixed noise and the samples of learned noise."""
    name = NAMES[row["method"]]
    if "scale" in row:
        name = f"{name} ({row['scale']:g})"
    if row["method"].startswith("learned"):
        name = f"{name}, {row['samples']:.2g} samples"
    return name


def remark(axes: Axes, position: float, text: str) -> None:
    """Write a small text above the axes, at a position along x."""
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
