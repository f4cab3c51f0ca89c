"""The picture of an evaluation."""

from eval_cases import results_of

from fastperturb.eval import pictures


def test_the_picture_has_a_panel_for_each_domain_and_one_for_their_mean(
    evaluated, tmp_path, monkeypatch
):
    kept = []
    draw_part = pictures._panels
    monkeypatch.setattr(
        pictures, "_panels", lambda *args, **more: kept.append(draw_part(*args, **more)) or kept[-1]
    )
    pictures.draw(results_of(evaluated), tmp_path / "p.png")
    curves, changes = kept
    assert [axes.get_title(loc="left") for axes in curves] == ["near", "far"]
    assert len(curves[0].lines) == 12
    titles = [axes.get_title(loc="left") for axes in changes]
    assert titles == ["near", "far", "mean of the domains"]
    assert changes[0].get_yticklabels()[0].get_text() == "learned"
