"""The pictures of made-up results."""

import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from study_cases import LEVELS, cell, study_results

from fastperturb.study import pictures, summary


@pytest.fixture
def figures(monkeypatch):
    """Figures that are saved, by the name of their file."""
    saved = {}
    save = pictures.Figure.savefig

    def keep(self, path):
        saved[path.name] = self
        save(self, path)

    monkeypatch.setattr(pictures.Figure, "savefig", keep)
    return saved


def summarised_results(**options):
    results = study_results(**options)
    for entry in results["cells"]:
        if entry["method"] == "learned":
            most = [["▁the", 0.4], ["$x$", 0.35], ["中", 0.3]]
            entry["token_scales"] = {"most": most, "least": [["▁a", 0.01], ["_", 0.02]]}
    return results | {"summary": summary.summarise(results)}


def texts_of(axes):
    return {text.get_text() for text in axes.texts}


def test_pictures_show_every_method_where_it_was_measured(tmp_path, figures):
    more = [cell("fixed", seed, levels=LEVELS["learned"], draws=8) for seed in (0, 1, 2)]
    pictures.draw(summarised_results(more=more, wobble=1.0), tmp_path)
    assert sorted(figures) == ["changes.png", "draws.png", "shift.png", "token_scales.png"]
    for name in figures:
        pixels = matplotlib.image.imread(tmp_path / name)
        assert 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5, name
    tempered = figures["changes.png"].axes[1]
    assert {"learned", "fixed", "exact, noise added", "exact, compute x 8"} < texts_of(tempered)
    marks = {tuple(np.round([*line.get_xdata(), *line.get_ydata()], 6)) for line in tempered.lines}
    assert {(-0.01, -0.1), (0.0, 0.0)} < marks
    assert {"learned", "fixed", "exact, tempered"} < texts_of(figures["draws.png"].axes[1])


def test_curves_by_samples_are_means_over_domains_and_seeds(tmp_path, figures):
    pictures.draw(summarised_results(), tmp_path)
    outside = figures["draws.png"].axes[1]
    [line] = [line for line in outside.lines if line.get_color() == pictures.CHOSEN]
    assert list(line.get_xdata()) == [1, 2, 4, 8, 16, 32]
    wanted = [3.92 + 0.1 + 0.1 / n - 0.1 / 32 for n in (1, 2, 4, 8, 16, 32)]
    assert list(line.get_ydata()) == pytest.approx(wanted)


def test_the_shift_and_token_scales_of_the_learned_method_are_drawn(tmp_path, figures):
    pictures.draw(summarised_results(), tmp_path)
    *seeds, mean = figures["shift.png"].axes[0].lines
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([1, 10], pytest.approx([0.2, 0.1]))
    assert len(seeds) == 3
    [panel] = figures["token_scales.png"].axes
    # A character that the font lacks is shown as its code point, and dollars are no formula.
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["▁the", "\\$x\\$", "\\u4e2d", "_", "▁a"]
    assert list(panel.lines[0].get_xdata()) == [0.4, 0.35, 0.3, 0.02, 0.01]


def test_without_a_learned_method_there_is_no_picture_of_shift_or_token_scales(tmp_path, figures):
    pictures.draw(summarised_results(methods=["exact"], seeds=[0]), tmp_path)
    assert sorted(figures) == ["changes.png", "draws.png"]


def test_names_of_crowded_marks_do_not_overlap(tmp_path, figures):
    more = [
        cell(f"method {n}", seed, levels=LEVELS["learned"], draws=8)
        for n in range(12)
        for seed in (0, 1)
    ]
    pictures.draw(summarised_results(more=more, seeds=[0, 1]), tmp_path)
    for figure in figures.values():
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            names = [text for text in axes.texts if hasattr(text, "arrow_patch")]
            # An annotation's own extent would count the line that leads to it.
            places = [matplotlib.text.Text.get_window_extent(name) for name in names]
            for n, one in enumerate(places):
                assert not any(one.overlaps(other) for other in places[n + 1 :])
                assert min(one.x0, one.y0) >= 0
                assert one.x1 <= width and one.y1 <= height
