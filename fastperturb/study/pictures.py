"""A study's pictures: who gains where, what draws bring, and what the transforms learned to do.

changes.png        change in domain against change out of domain, each with its interval
draws.png          the nll that fewer draws give
shift.png          how far learned transforms move embeddings, over training
token_scales.png   which tokens they move most and least
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from fastperturb.report.figures import FAINT, INK, plain, spread_out
from fastperturb.study.arms import AS_TRAINED, TEMPERED, Arm, Arms, Measured, read

GAINS = "#e8f2ea"
CHOSEN = "#0072B2"
# Okabe and Ito's palette, which colour-blind readers can tell apart, darkened for lettering, and
# more for studies of many methods, whose names stand beside them.
OTHERS = (
    "#D55E00",
    "#009E73",
    "#C060A0",
    "#D18F00",
    "#3FA0DC",
    "#7A5195",
    "#8C5A2B",
    "#5B8C00",
    "#00868B",
    "#B03060",
    "#6A7FDB",
)


class Style(NamedTuple):
    colour: str
    chosen: bool = False

    @property
    def width(self) -> float:
        return 3.0 if self.chosen else 1.6


class End(NamedTuple):
    """Where a line or a mark ends, and what is said of it at the right of the axes."""

    x: float
    y: float
    name: str
    style: Style


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """All that there is something to see of, from a study's results with their summary."""
    arms = read(results)
    styles = styles_of(arms)
    figures = {
        "changes.png": changes(results["summary"], styles),
        "draws.png": curves(arms, styles),
    }
    learned = [arm for arm in arms.methods if arm.learned]
    if learned:
        figures["shift.png"] = shifts(learned, styles)
    scales = {arm.method: found for arm in learned if (found := _token_scales(arm))}
    if scales:
        figures["token_scales.png"] = token_scales(scales, styles)
    for name, figure in figures.items():
        figure.savefig(folder / name)


def styles_of(arms: Arms) -> dict[str, Style]:
    """A colour for each method, and the same one in every picture."""
    chosen = arms.chosen
    others = [arm.method for arm in arms.methods if arm is not chosen]
    styles = {name: Style(OTHERS[n % len(OTHERS)]) for n, name in enumerate(others)}
    if chosen is not None:
        styles[chosen.method] = Style(CHOSEN, chosen=True)
    return styles


# Who gains where


def changes(summary: Mapping[str, Any], styles: Mapping[str, Style]) -> Figure:
    names = [_name_of_mark(row) for row in summary["rows"] if row["what"] != "deterministic"]
    figure, (left, right) = _figure(2, names=names)
    draw_changes(left, summary, styles, tempered=False)
    draw_changes(right, summary, styles, tempered=True)
    baseline = summary["baseline"]["method"]
    _title(left, "At temperature 1", f"change of the nll from {baseline}, tempered (the origin)")
    _title(right, "Tempered", "hollow: controls, those without a name deterministic twins")
    return figure


def draw_changes(
    axes: Axes, summary: Mapping[str, Any], styles: Mapping[str, Style], *, tempered: bool
) -> None:
    ends, spans_x, spans_y = [], [0.0], [0.0]
    for row in summary["rows"]:
        if not _is_marked(row, summary, tempered):
            continue
        style = styles.get(row["of"] or row["method"], Style(FAINT))
        x, y = row["difference"]["in_domain"], row["difference"]["out_of_domain"]
        is_control = row["what"] != "method" or row["view"] != "as_trained"
        # Lines and no error bars: an interval of few documents may be beside its estimate.
        width = 0.7 if is_control else style.width / 1.6
        axes.hlines(y["mean"], x["low"], x["high"], color=style.colour, linewidth=width)
        axes.vlines(x["mean"], y["low"], y["high"], color=style.colour, linewidth=width)
        axes.plot(
            x["mean"],
            y["mean"],
            "D" if is_control else "o",
            markersize=5 if is_control else 10 if style.chosen else 7,
            markerfacecolor="white" if is_control else style.colour,
            color=style.colour,
            zorder=3 if is_control else 5 if style.chosen else 4,
        )
        if row["what"] != "deterministic":  # whose colour says of which method it is
            ends.append(End(x["mean"], y["mean"], _name_of_mark(row), style))
        spans_x += [x["low"], x["high"]]
        spans_y += [y["low"], y["high"]]
    axes.plot(0, 0, "o", ms=7, color=INK, zorder=5)
    axes.set_xlabel(f"change in domain{_limits(axes, 'x', spans_x)}", color=INK)
    axes.set_ylabel(f"change out of domain{_limits(axes, 'y', spans_y)}", color=INK)
    low_x, low_y = axes.get_xlim()[0], axes.get_ylim()[0]
    axes.fill_between([low_x, 0], low_y, 0, color=GAINS, zorder=0, linewidth=0)
    for line in (axes.axhline, axes.axvline):
        line(0, color=FAINT, linewidth=0.8, zorder=1)
    _label_ends(axes, ends)


def _is_marked(row: Mapping[str, Any], summary: Mapping[str, Any], tempered: bool) -> bool:
    """Methods in both panels; the controls, which count as they are tempered, in that one."""
    change = row["difference"]
    if change is None or change["out_of_domain"] is None or row["tuned"] != tempered:
        return False
    if row["view"] == "noise_added":
        return row["what"] == "baseline"
    if row["view"] == "without_noise":
        return tempered and row["method"] == summary["chosen"]
    if row["what"] == "baseline":
        return not tempered  # which is the origin
    return row["what"] == "method" or (
        tempered and row["what"] in ("equal_compute", "deterministic")
    )


def _name_of_mark(row: Mapping[str, Any]) -> str:
    if row["view"] == "without_noise":
        return "the chosen without noise"
    if row["view"] == "noise_added":
        return f"{row['method']}, noise added"
    return f"{row['method']}, not tempered" if row["what"] == "baseline" else row["method"]


def _limits(axes: Axes, which: str, values: Sequence[float]) -> str:
    """Linear, or where some lie far out logarithmic beyond what half of them lie within.

    What it gives is for the axis to say so.
    """
    low, high = min(values), max(values)
    sizes = sorted(abs(value) for value in values if value) or [0.01]
    within = sizes[len(sizes) // 2]
    if sizes[-1] <= 6 * within:
        margin = 0.08 * (high - low) or 0.01
        axes.set(**{f"{which}lim": (low - margin, high + margin)})
        return ""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("symlog", linthresh=within)
    axes.set(**{f"{which}lim": (1.4 * min(low, -within / 3), 1.4 * max(high, within / 3))})
    sides = [n * 10**k for k in range(-6, 3) for n in (1, 3) if n * 10**k > within / 2]
    axis.set_major_locator(ticker.FixedLocator([0.0, *sides, *(-side for side in sides)]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    return f" (logarithmic beyond ±{within:.1g})"


# What draws bring


def curves(arms: Arms, styles: Mapping[str, Style]) -> Figure:
    names = [*styles, f"{arms.baseline.method}, noise added"]
    figure, panels = _figure(2, names=names)
    places = {
        f"In domain: {arms.in_domain}": [arms.in_domain],
        f"Out of domain: mean of {len(arms.out_of_domain)}": arms.out_of_domain,
    }
    for axes, (text, domains) in zip(panels, places.items()):
        draw_curves(axes, arms, domains, styles)
        _title(axes, text, "nll a token by the draws that a prediction averages; not tempered")
    return figure


def draw_curves(
    axes: Axes, arms: Arms, domains: Sequence[str], styles: Mapping[str, Style]
) -> None:
    shown = {arm.method: (arm.forms[AS_TRAINED], styles[arm.method]) for arm in arms.methods}
    baseline, ink = arms.baseline, Style(INK)
    shown[baseline.method] = (baseline.forms[AS_TRAINED], ink)
    for form, name in ((TEMPERED, "tempered"), (("noise_added", False), "noise added")):
        if form in baseline.forms:
            shown[f"{baseline.method}, {name}"] = (baseline.forms[form], Style(FAINT))
    found = {name: curve(measured, domains) for name, (measured, _) in shown.items()}
    most = max(sizes[-1] for sizes, _ in found.values())
    ends = []
    for name, (sizes, values) in found.items():
        style = shown[name][1]
        # One draw is all that there is of it, whatever the number.
        alone = len(sizes) == 1
        x, y = ([1, most], values * 2) if alone else (sizes, values)
        axes.plot(x, y, "--" if alone else "o-", ms=3, color=style.colour, lw=style.width)
        ends.append(End(most, y[-1], name, style))
    axes.set_xscale("log", base=2)
    # Single draws of strong noise are far off: what matters is where the curves end.
    top = max(max(values[2:], default=values[-1]) for _, values in found.values())
    bottom = min(values[-1] for _, values in found.values())
    margin = 0.06 * (top - bottom) or 0.01
    axes.set_ylim(bottom - margin, top + margin)
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("draws", color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    _label_ends(axes, ends)


def curve(measured: Measured, domains: Sequence[str]) -> tuple[list[int], list[float]]:
    """The nll at each number of draws, the mean over domains and seeds."""
    found = [each[name].curve for each in measured.by_seed.values() for name in domains]
    values = zip(*(each["nll"] for each in found), strict=True)
    return found[0]["num_samples"], [statistics.fmean(each) for each in values]


# What the transforms learned


def shifts(learned: Sequence[Arm], styles: Mapping[str, Style]) -> Figure:
    figure, (axes,) = _figure(1, names=[arm.method for arm in learned])
    ends = []
    for arm in learned:
        style = styles[arm.method]
        runs = [dict(cell["shift"]) for cell in arm.cells.values() if cell["shift"]]
        for each in runs:
            axes.plot([*each], [*each.values()], color=style.colour, lw=0.7, alpha=0.35)
        steps = sorted(set.intersection(*map(set, runs)))
        mean = [statistics.fmean(each[step] for each in runs) for step in steps]
        axes.plot(steps, mean, color=style.colour, lw=style.width)
        ends.append(End(steps[-1], mean[-1], arm.method, style))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    _title(axes, "How far the learned transforms move", "E |T(e) - e| / |e|; thin lines are seeds")
    _label_ends(axes, ends)
    return figure


def token_scales(scales: Mapping[str, Mapping[str, Any]], styles: Mapping[str, Style]) -> Figure:
    columns = min(4, len(scales))
    rows = -(-len(scales) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 5.6 * rows + 0.6), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    figure.suptitle(
        "E |T(e) - e| / |e| of the tokens that are moved most and least",
        color=INK,
        fontsize=14,
        fontweight="bold",
    )
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (method, found) in zip(panels, scales.items()):
        draw_scales(axes, method, found, styles[method])
    for axes in panels[len(scales) :]:
        axes.set_axis_off()
    return figure


def draw_scales(axes: Axes, method: str, found: Mapping[str, Any], style: Style) -> None:
    """The most moved token on top, and below a gap the least moved ones, the least at the end."""
    most, least = found["most"], found["least"][::-1]
    heights = [*range(len(most)), *range(len(most) + 1, len(most) + 1 + len(least))]
    values = [scale for _, scale in (*most, *least)]
    axes.hlines(heights, 0, values, color=style.colour, linewidth=1.4, alpha=0.5)
    axes.plot(values, heights, "o", ms=5, color=style.colour)
    axes.set_yticks(heights, [_drawable(token) for token, _ in (*most, *least)], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.set_title(_drawable(method), loc="left", **_lettering(style))
    plain(axes)


def _token_scales(arm: Arm) -> Mapping[str, Any] | None:
    """Of the first seed: others name other tokens."""
    found: Mapping[str, Any] | None = next(iter(arm.cells.values()))["token_scales"]
    return found


# The look


def _figure(panels: int, *, names: Iterable[str]) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side, each with room for the longest of these names to its right."""
    left, width, right = 0.8, 5.0, 0.4 + 0.082 * max(map(len, names))
    each, height = left + width + right, 6.6
    figure = Figure(figsize=(panels * each, height), dpi=150, facecolor="white")
    for number in range(panels):
        start = (number * each + left) / (panels * each)
        figure.add_axes((start, 0.11, width / (panels * each), 0.74))
    return figure, figure.axes


def _title(axes: Axes, text: str, below: str) -> None:
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
    axes.text(0, 1.075, _drawable(text), fontsize=14, fontweight="bold", color=INK, **place)
    axes.text(0, 1.02, _drawable(below), fontsize=10, color=FAINT, **place)


def _label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Names to the right of the axes, moved apart where ends are close, with a line to each."""
    plain(axes)
    to_axes = axes.transData + axes.transAxes.inverted()
    ordered = sorted(ends, key=lambda end: (end.y, end.name))
    heights = [float(to_axes.transform((end.x, end.y))[1]) for end in ordered]
    gap = min(0.047, 1 / max(1, len(ends)))
    for end, height in zip(ordered, _within(spread_out(heights, gap=gap), gap=gap)):
        axes.annotate(
            _drawable(end.name),
            xy=(end.x, end.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            **_lettering(end.style),
            arrowprops={
                "arrowstyle": "-",
                "color": end.style.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def _within(heights: list[float], *, gap: float) -> list[float]:
    """Rising heights, pushed up from below 0 and down from above 1 where they are."""
    lifted = [max(height, n * gap) for n, height in enumerate(heights)]
    return [min(height, 1 - n * gap) for n, height in enumerate(reversed(lifted))][::-1]


def _lettering(style: Style) -> dict[str, Any]:
    weight = "bold" if style.chosen else "normal"
    return {"fontsize": 9, "color": style.colour, "fontweight": weight}


def _drawable(text: str) -> str:
    """With the code points that the font has no glyph for as numbers; a dollar is no formula."""
    glyphs = get_font(findfont("DejaVu Sans"))
    known = (c if glyphs.get_char_index(ord(c)) else f"\\u{ord(c):04x}" for c in text)
    return "".join(known).replace("$", "\\$")
