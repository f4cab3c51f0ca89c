"""The house look of pictures, for all that draw."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes

INK = "#333333"
FAINT = "#8a8a8a"
# Okabe and Ito's palette, which colour-blind readers can tell apart, and again in other markers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = ("o", "s", "^", "D")


def plain(axes: Axes, *, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Axes without a box, and with faint lines along the ticks of `grid`."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")
    if grid is not None:
        axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.tick_params(colors=INK, which="both", length=3, color="#bbbbbb")


def spread_out(heights: list[float], *, gap: float) -> list[float]:
    """Rising heights at least `gap` apart, each group of neighbours kept around its own middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _top(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + gap * rank for group in groups for rank in range(len(group))]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
