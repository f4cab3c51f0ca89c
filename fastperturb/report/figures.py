"""The look that all pictures share: colours, axes, titles and labels at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.font_manager import findfont, get_font

INK = "#333333"
FAINT = "#8a8a8a"
GRID = "#e6e6e6"
# Okabe and Ito's palette, which colour-blind readers can tell apart. The pale colours are darkened,
# because names are lettered in them.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PINK = "#C060A0"
ORANGE = "#D18F00"
SKY = "#3FA0DC"
BLACK = "#222222"
PALETTE = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK)
# For pictures of many lines whose names stand beside them.
PURPLE, BROWN = "#7A5195", "#8C5A2B"
MORE_COLOURS = (PURPLE, BROWN, "#5B8C00", "#00868B", "#B03060", "#6A7FDB")
MARKERS = ("o", "s", "^", "D")


class LineEnd(NamedTuple):
    """The data point where a line or a mark ends, and the name to write to the right of it."""

    x: float
    y: float
    name: str
    colour: str
    bold: bool = False


def plain(axes: Axes, *, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Remove the box around the axes, and draw faint lines along the ticks of `grid`."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, which="both", length=3, color="#bbbbbb")


def title(axes: Axes, text: str, below: str, *, height: float = 1.02) -> None:
    """Write a title and a line below it above the axes, from this height (axes fraction) on."""
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
    top = height + 0.055
    axes.text(0, top, drawable(text), fontsize=14, fontweight="bold", color=INK, **place)
    axes.text(0, height, drawable(below), fontsize=10, color=FAINT, **place)


def lettering(colour: str, *, bold: bool = False, size: float = 9) -> dict[str, Any]:
    """Return the text options for a name in the colour of its line."""
    return {"fontsize": size, "color": colour, "fontweight": "bold" if bold else "normal"}


def label_ends(axes: Axes, ends: Sequence[LineEnd], *, gap: float = 0.047, size: float = 9) -> None:
    """Write the name of each line to the right of the axes, with a thin line to its end.

    Names whose ends are close are spread out to at least `gap` (axes fraction), or less where
    there are too many names for that. Call it after the limits and scales of the axes are set.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    ordered = sorted(ends, key=lambda end: (end.y, end.name))
    heights = [float(to_axes.transform((end.x, end.y))[1]) for end in ordered]
    gap = min(gap, 1 / max(1, len(ends)))
    for end, height in zip(ordered, _within_axes(spread_out(heights, gap=gap), gap=gap)):
        axes.annotate(
            drawable(end.name),
            xy=(end.x, end.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            **lettering(end.colour, bold=end.bold, size=size),
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def spread_out(heights: list[float], *, gap: float) -> list[float]:
    """Spread sorted heights to at least `gap` apart, each group of neighbours around its middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _top(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + gap * rank for group in groups for rank in range(len(group))]


def drawable(text: str) -> str:
    """Replace characters that matplotlib cannot draw as they are.

    Characters that the font lacks become their code points, and a dollar sign starts no formula.
    """
    glyphs = get_font(findfont("DejaVu Sans"))
    known = (c if glyphs.get_char_index(ord(c)) else f"\\u{ord(c):04x}" for c in text)
    return "".join(known).replace("$", "\\$")


def _within_axes(heights: list[float], *, gap: float) -> list[float]:
    """Push rising heights up from below 0 and down from above 1."""
    lifted = [max(height, n * gap) for n, height in enumerate(heights)]
    return [min(height, 1 - n * gap) for n, height in enumerate(reversed(lifted))][::-1]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
