"""The parts that all pictures share."""

import pytest
from matplotlib.figure import Figure

from fastperturb.report import figures


def test_crowded_heights_are_spread_around_their_middle_and_others_stay() -> None:
    heights = figures.spread_out([0.1, 0.5, 0.51, 0.52, 0.9], gap=0.1)
    assert heights == pytest.approx([0.1, 0.41, 0.51, 0.61, 0.9])


def test_names_at_line_ends_keep_their_distance_within_the_axes() -> None:
    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    ends = [figures.LineEnd(1, y, f"line {y}", figures.BLUE) for y in (0.99, 0.995, 1.0, 0.2)]
    figures.label_ends(axes, ends, gap=0.1)
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["line 0.2"] == pytest.approx(0.2)
    assert [heights[f"line {y}"] for y in (0.99, 0.995, 1.0)] == pytest.approx([0.8, 0.9, 1.0])


def test_dollars_and_characters_that_the_font_lacks_are_drawn_as_text() -> None:
    assert figures.drawable("$x$ ü 中") == "\\$x\\$ ü \\u4e2d"
