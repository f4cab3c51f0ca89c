"""The picture of a run, drawn from its metrics."""

import json

import matplotlib.image
import pytest

from fastperturb.train import curves


def values_at(step):
    return {
        "nll": 3 / step,
        "ess": 4.25,
        "shift": 0.2,
        "gradient_norm": 1.0,
        "learning_rate_base": 1e-3,
        "learning_rate_transform": 5e-3,
    }


def write_metrics(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_picture_shows_both_curves_and_a_panel_for_each_diagnostic(tmp_path, monkeypatch):
    lines = [{"step": step, "what": "train", **values_at(step)} for step in range(1, 21)]
    lines += [{"step": step, "what": "eval", "nll": 2.0} for step in (0, 5, 10, 15, 20)]
    write_metrics(tmp_path, lines)
    figures = []
    save = curves.Figure.savefig
    monkeypatch.setattr(
        curves.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))
    )
    curves.draw(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    main, *panels = figures[0].axes
    lines = {line.get_label(): line for line in main.lines}
    assert list(lines["held-out text"].get_xdata()) == [0, 5, 10, 15, 20]
    assert list(lines["training batches"].get_ydata()) == pytest.approx(
        [values_at(step)["nll"] for step in range(1, 21)]
    )
    titles = ["effective samples", "shift |T(e) - e| / |e|", "gradient norm", "learning rate"]
    assert [panel.get_title(loc="left") for panel in panels] == titles
    rates = {line.get_label(): line.get_ydata()[0] for line in panels[-1].lines}
    assert (rates["base"], rates["transform"]) == pytest.approx((1e-3, 5e-3))
    height, width = matplotlib.image.imread(tmp_path / "curves.png").shape[:2]
    assert (width, height) == (1650, 1050)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "what": "train", "nll": None}],
        [{"step": 0, "what": "eval", "nll": 2.0}],
        [{"step": 1, "what": "train", "nll": 2.0, "ess": 1.0, "shift": 0.0}],
    ],
    ids=["nothing", "not_finite", "no_step", "one_step"],
)
def test_a_run_of_one_step_or_none_can_be_drawn(tmp_path, lines):
    write_metrics(tmp_path, lines)
    curves.draw(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0


def test_smoothing_is_a_mean_over_neighbours_and_keeps_a_line():
    line = [0.5 * step for step in range(300)]
    assert curves.smooth(line)[5:-5] == pytest.approx(line[5:-5])
    bump = curves.smooth([0.0] * 150 + [11.0] + [0.0] * 149)
    assert bump[145:156] == pytest.approx([1.0] * 11) and sum(bump) == pytest.approx(11.0)
    assert curves.smooth([3.0, 1.0]) == [3.0, 1.0]
