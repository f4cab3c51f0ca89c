"""Pictures of logit matrices: the contents of their panels, from results that went through JSON."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from rank_cases import matrix_of_random_rows

from fastperturb.rank import kl_by_rank, pictures, power_law, spectrum
from fastperturb.rank.measure import row_space_angles, submatrix_fits


@pytest.fixture(scope="module")
def models():
    random = np.random.default_rng(0)
    results = {}
    for name, power in (("steep", 1.0), ("flat", 0.5)):
        values = matrix_of_random_rows(random, 80, power)
        halves, whole = np.split(values, 2), spectrum(values)
        spectra = [spectrum(half) for half in halves]
        angles = row_space_angles(halves[0], spectra[0], halves[1], spectra[1], rank=6)
        kl = kl_by_rank(values, whole)
        held_out = kl_by_rank(halves[1], spectra[0], learned_from=halves[0])
        results[name] = {
            "spectrum": whole.to_dict(),
            "exponent": power_law(whole).to_dict(),
            "kl": [kl.to_dict(), held_out.to_dict()],
            "angles": {"two halves": angles.to_dict()},
            "sizes": [fit.to_dict() for fit in submatrix_fits(values, whole, fractions=(0.5, 1.0))],
        }
    return json.loads(json.dumps(results))


def panel(draw, models):
    axes = Figure().subplots()
    draw(axes, models)
    return axes


def test_the_fitted_line_runs_over_its_window_at_the_height_of_the_singular_values(models):
    lines = panel(pictures.draw_spectra, models).lines
    fitted = [line for line in lines if line.get_label()[0] == "$"]
    for line, model in zip(fitted, models.values(), strict=True):
        fit, measured = model["exponent"], model["spectrum"]
        x, y = line.get_data()
        assert list(x) == [fit["first"], fit["last"]]
        slope = np.log(y[1] / y[0]) / np.log(x[1] / x[0])
        assert slope == pytest.approx(-fit["estimate"])
        # A random matrix's singular values scatter around it.
        shares = np.array(measured["singular_values"])[x - 1] / measured["frobenius"]
        np.testing.assert_allclose(y, shares, rtol=0.15)


def test_kl_is_drawn_solid_in_sample_and_dashed_held_out_and_left_out_where_it_is_rounding(models):
    lines = panel(pictures.draw_kl, models).lines
    expected = [curve for model in models.values() for curve in model["kl"]]
    for line, curve in zip(lines, expected, strict=True):
        assert line.get_linestyle() == ("--" if curve["held_out"] else "-")
        y = line.get_ydata()
        assert list(y) == [kl for kl in curve["kl"] if kl >= pictures.LEAST_KL]
    assert min(expected[0]["kl"]) < pictures.LEAST_KL  # full rank


def test_angles_are_in_degrees_beside_the_random_ones(models):
    lines = panel(pictures.draw_angles, models).lines
    for model, (random, own) in zip(models.values(), zip(lines[::2], lines[1::2])):
        angles = model["angles"]["two halves"]
        np.testing.assert_allclose(own.get_ydata(), np.degrees(angles["angles"]))
        np.testing.assert_allclose(random.get_ydata(), np.degrees(angles["random"]))


def test_sizes_have_one_curve_of_exponents_for_each_model_and_number_of_futures(models):
    curves = panel(pictures.draw_sizes, models).containers
    assert len(curves) == 4
    for name, first in (("steep", 0), ("flat", 2)):
        rows = models[name]["sizes"]
        drawn = [list(curve[0].get_ydata()) for curve in curves[first : first + 2]]
        estimates = [row["exponent"]["estimate"] for row in rows]
        assert drawn == [estimates[:2], estimates[2:]]


def test_a_picture_has_the_panels_for_which_a_model_has_results(models, tmp_path):
    whole, part = tmp_path / "whole.png", tmp_path / "part.png"
    assert pictures.draw(models, whole)
    few = {"steep": {"spectrum": models["steep"]["spectrum"]}, "flat": {}}
    assert pictures.draw(few, part)
    heights = [int.from_bytes(path.read_bytes()[20:24]) for path in (whole, part)]
    assert heights[0] > 1.5 * heights[1]
    assert not pictures.draw({"steep": {}, "flat": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
