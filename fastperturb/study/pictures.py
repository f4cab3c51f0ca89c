"""A study's pictures.

changes.png        change in domain against change out of domain, each with its interval
draws.png          nll against the number of samples
shift.png          size of the learned shift over training
token_scales.png   the tokens that learned transforms shift most and least
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastperturb.report.figures import (
    BLUE,
    FAINT,
    INK,
    MORE_COLOURS,
    PALETTE,
    LineEnd,
    drawable,
    label_ends,
    lettering,
    plain,
    title,
)
from fastperturb.study.arms import AS_TRAINED, TEMPERED, Arm, Arms, SeedLikelihoods, read

GAINS = "#e8f2ea"
CHOSEN = BLUE
OTHERS = (*PALETTE[1:6], *MORE_COLOURS)


class Style(NamedTuple):
    """The look of a method, the same in every picture."""

    colour: str
    chosen: bool = False

    @property
    def width(self) -> float:
        return 3.0 if self.chosen else 1.6

    def end(self, x: float, y: float, name: str) -> LineEnd:
        """Return the end of a line of this style, for `label_ends`."""
        return LineEnd(x, y, name, self.colour, bold=self.chosen)


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write every picture that has something to show; the results must hold their summary."""
    arms = read(results)
    styles = styles_of(arms)
    figures = {
        "changes.png": changes(results["summary"], styles),
        "draws.png": curves(arms, styles),
    }
    learned = [arm for arm in arms.methods if arm.learned]
    if learned:
        figures["shift.png"] = shifts(learned, styles)
    scales = {arm.method: scale for arm in learned if (scale := _token_scales(arm))}
    if scales:
        figures["token_scales.png"] = token_scales(scales, styles)
    for name, figure in figures.items():
        figure.savefig(folder / name)


def styles_of(arms: Arms) -> dict[str, Style]:
    """Return the style of each method."""
    chosen = arms.chosen
    others = [arm.method for arm in arms.methods if arm is not chosen]
    styles = {name: Style(OTHERS[n % len(OTHERS)]) for n, name in enumerate(others)}
    if chosen is not None:
        styles[chosen.method] = Style(CHOSEN, chosen=True)
    return styles


def changes(summary: Mapping[str, Any], styles: Mapping[str, Style]) -> Figure:
    """Draw the changes in and out of domain, at temperature 1 and tempered."""
    names = [_name_of_mark(row) for row in summary["rows"] if row["what"] != "deterministic"]
    figure, (left, right) = _figure(2, names=names)
    draw_changes(left, summary, styles, tempered=False)
    draw_changes(right, summary, styles, tempered=True)
    baseline = summary["baseline"]["method"]
    title(left, "At temperature 1", f"change of the nll from {baseline}, tempered (the origin)")
    title(right, "Tempered", "hollow: controls; those without a name are deterministic twins")
    return figure


def draw_changes(
    axes: Axes, summary: Mapping[str, Any], styles: Mapping[str, Style], *, tempered: bool
) -> None:
    ends: list[LineEnd] = []
    spans_x, spans_y = [0.0], [0.0]
    for row in summary["rows"]:
        if not _is_marked(row, summary, tempered):
            continue
        style = styles.get(row["of"] or row["method"], Style(FAINT))
        x, y = row["difference"]["in_domain"], row["difference"]["out_of_domain"]
        is_control = row["what"] != "method" or row["view"] != "as_trained"
        # Not error bars: an interval of few documents need not contain its estimate.
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
        if row["what"] != "deterministic":  # its colour is that of its method
            ends.append(style.end(x["mean"], y["mean"], _name_of_mark(row)))
        spans_x += [x["low"], x["high"]]
        spans_y += [y["low"], y["high"]]
    axes.plot(0, 0, "o", ms=7, color=INK, zorder=5)
    axes.set_xlabel(f"change in domain{_limits(axes, 'x', spans_x)}", color=INK)
    axes.set_ylabel(f"change out of domain{_limits(axes, 'y', spans_y)}", color=INK)
    low_x, low_y = axes.get_xlim()[0], axes.get_ylim()[0]
    axes.fill_between([low_x, 0], low_y, 0, color=GAINS, zorder=0, linewidth=0)
    for line in (axes.axhline, axes.axvline):
        line(0, color=FAINT, linewidth=0.8, zorder=1)
    plain(axes)
    label_ends(axes, ends)


def _is_marked(row: Mapping[str, Any], summary: Mapping[str, Any], tempered: bool) -> bool:
    """Tell if a row has a mark: methods in both panels, controls in the tempered one only."""
    change = row["difference"]
    if change is None or change["out_of_domain"] is None or row["tuned"] != tempered:
        return False
    if row["view"] == "noise_added":
        return row["what"] == "baseline"
    if row["view"] == "without_noise":
        return tempered and row["method"] == summary["chosen"]
    if row["what"] == "baseline":
        return not tempered  # the tempered baseline is the origin
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
    """Set the limits and the scale of one axis, and return a remark for its label.

    The scale is linear; if some values lie far out, it is logarithmic beyond the median size.
    """
    low, high = min(values), max(values)
    sizes = sorted(abs(value) for value in values if value) or [0.01]
    median = sizes[len(sizes) // 2]
    if sizes[-1] <= 6 * median:
        margin = 0.08 * (high - low) or 0.01
        axes.set(**{f"{which}lim": (low - margin, high + margin)})
        return ""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("symlog", linthresh=median)
    axes.set(**{f"{which}lim": (1.4 * min(low, -median / 3), 1.4 * max(high, median / 3))})
    ticks = [n * 10**k for k in range(-6, 3) for n in (1, 3) if n * 10**k > median / 2]
    axis.set_major_locator(ticker.FixedLocator([0.0, *ticks, *(-tick for tick in ticks)]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    return f" (logarithmic beyond ±{median:.1g})"


def curves(arms: Arms, styles: Mapping[str, Style]) -> Figure:
    """Draw the nll against the number of samples, in and out of domain."""
    names = [*styles, f"{arms.baseline.method}, noise added"]
    figure, panels = _figure(2, names=names)
    places = {
        f"In domain: {arms.in_domain}": [arms.in_domain],
        f"Out of domain: mean of {len(arms.out_of_domain)}": arms.out_of_domain,
    }
    for axes, (text, domains) in zip(panels, places.items()):
        draw_curves(axes, arms, domains, styles)
        title(axes, text, "nll of a token by the samples of a prediction; not tempered")
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
    nlls = {name: curve(likelihoods, domains) for name, (likelihoods, _) in shown.items()}
    most = max(sizes[-1] for sizes, _ in nlls.values())
    ends: list[LineEnd] = []
    for name, (sizes, values) in nlls.items():
        style = shown[name][1]
        # A model without randomness has one sample and the same nll for any number of them.
        is_exact = len(sizes) == 1
        x, y = ([1, most], values * 2) if is_exact else (sizes, values)
        axes.plot(x, y, "--" if is_exact else "o-", ms=3, color=style.colour, lw=style.width)
        ends.append(style.end(most, y[-1], name))
    axes.set_xscale("log", base=2)
    # Single samples of strong noise are far off; the limits are set for where the curves end.
    top = max(max(values[2:], default=values[-1]) for _, values in nlls.values())
    bottom = min(values[-1] for _, values in nlls.values())
    margin = 0.06 * (top - bottom) or 0.01
    axes.set_ylim(bottom - margin, top + margin)
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("samples", color=INK)
    plain(axes, grid="y")
    label_ends(axes, ends)


def curve(likelihoods: SeedLikelihoods, domains: Sequence[str]) -> tuple[list[int], list[float]]:
    """Return numbers of samples and the nll at each, the mean over domains and seeds."""
    curves = [
        by_domain[name].curve for by_domain in likelihoods.by_seed.values() for name in domains
    ]
    nlls = zip(*(curve["nll"] for curve in curves), strict=True)
    return curves[0]["num_samples"], [statistics.fmean(values) for values in nlls]


def shifts(learned: Sequence[Arm], styles: Mapping[str, Style]) -> Figure:
    """Draw the relative size of the learned shift over training."""
    figure, (axes,) = _figure(1, names=[arm.method for arm in learned])
    ends: list[LineEnd] = []
    for arm in learned:
        style = styles[arm.method]
        by_step = [dict(cell["shift"]) for cell in arm.cells.values() if cell["shift"]]
        for shift in by_step:
            axes.plot([*shift], [*shift.values()], color=style.colour, lw=0.7, alpha=0.35)
        steps = sorted(set.intersection(*map(set, by_step)))
        mean = [statistics.fmean(shift[step] for shift in by_step) for step in steps]
        axes.plot(steps, mean, color=style.colour, lw=style.width)
        ends.append(style.end(steps[-1], mean[-1], arm.method))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=INK)
    plain(axes, grid="y")
    title(axes, "Shift of the learned transforms", "E |T(e) - e| / |e|; thin lines are seeds")
    label_ends(axes, ends)
    return figure


def token_scales(scales: Mapping[str, Mapping[str, Any]], styles: Mapping[str, Style]) -> Figure:
    """Draw the tokens that each method shifts most and least."""
    columns = min(4, len(scales))
    rows = -(-len(scales) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 5.6 * rows + 0.6), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    figure.suptitle(
        "E |T(e) - e| / |e| of the tokens that are shifted most and least",
        color=INK,
        fontsize=14,
        fontweight="bold",
    )
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (method, method_scales) in zip(panels, scales.items()):
        draw_scales(axes, method, method_scales, styles[method])
    for axes in panels[len(scales) :]:
        axes.set_axis_off()
    return figure


def draw_scales(axes: Axes, method: str, scales: Mapping[str, Any], style: Style) -> None:
    """Draw tokens from the most to the least shifted, with a gap in the middle."""
    most, least = scales["most"], scales["least"][::-1]
    heights = [*range(len(most)), *range(len(most) + 1, len(most) + 1 + len(least))]
    values = [scale for _, scale in (*most, *least)]
    axes.hlines(heights, 0, values, color=style.colour, linewidth=1.4, alpha=0.5)
    axes.plot(values, heights, "o", ms=5, color=style.colour)
    axes.set_yticks(heights, [drawable(token) for token, _ in (*most, *least)], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.set_title(drawable(method), loc="left", **lettering(style.colour, bold=style.chosen))
    plain(axes)


def _token_scales(arm: Arm) -> Mapping[str, Any] | None:
    """Return the scales of the first seed: other seeds name other tokens."""
    scales: Mapping[str, Any] | None = next(iter(arm.cells.values()))["token_scales"]
    return scales


def _figure(panels: int, *, names: Iterable[str]) -> tuple[Figure, Sequence[Axes]]:
    """Make panels side by side, each with room for the longest of these names to its right."""
    left, width, right = 0.8, 5.0, 0.4 + 0.082 * max(map(len, names))
    panel_width, height = left + width + right, 6.6
    total_width = panels * panel_width
    figure = Figure(figsize=(total_width, height), dpi=150, facecolor="white")
    for number in range(panels):
        start = (number * panel_width + left) / total_width
        figure.add_axes((start, 0.11, width / total_width, 0.74))
    return figure, figure.axes
