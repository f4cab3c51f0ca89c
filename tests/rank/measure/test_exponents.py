"""Exponents of singular values: exact power laws, the jackknife by brute force, coverage."""

import json
import math

import numpy as np
import pytest
from rank_cases import matrix_of_random_rows, matrix_with_spectrum
from scipy.stats import t as student

from fastperturb.rank.measure import exponent_difference, power_law, spectrum, submatrix_fits


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("shape", [(200, 20, 30), (600, 12, 15)])
def test_an_exact_power_law_is_recovered_whatever_its_scale(power, shape):
    singular_values = 7.0 * np.arange(1, min(shape[0], shape[1] * shape[2]) + 1) ** -power
    fitted = power_law(spectrum(matrix_with_spectrum(singular_values, shape)))
    assert fitted.estimate == pytest.approx(power, abs=1e-9)
    assert fitted.scale == pytest.approx(7.0)
    assert fitted.r_squared == pytest.approx(1.0)
    assert fitted.low < power < fitted.high


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_sketch_gives_the_exponent_to_a_thousandth(power):
    singular_values = np.arange(1, 801) ** -power
    sketch = spectrum(
        matrix_with_spectrum(singular_values, (800, 30, 40)), method="sketch", count=100
    )
    assert power_law(sketch).estimate == pytest.approx(power, abs=1e-3)


def test_the_first_singular_values_and_the_last_three_quarters_do_not_count():
    exact = np.arange(1, 201) ** -0.8
    bent = exact.copy()
    bent[:9] *= 5
    bent[50:] *= 0.7
    fitted = power_law(spectrum(matrix_with_spectrum(bent, (200, 20, 30))))
    assert (fitted.first, fitted.last) == (10, 50)
    assert fitted.estimate == pytest.approx(0.8, abs=1e-9)
    small = power_law(spectrum(matrix_with_spectrum(exact[:60], (60, 20, 30))))
    assert (small.first, small.last) == (3, 15)


def test_the_line_weighs_every_octave_alike():
    values = np.r_[np.arange(1.0, 5) ** -1.0, np.arange(5.0, 41) ** -0.5]
    fitted = power_law(spectrum(matrix_with_spectrum(values, (60, 20, 30))), first=1, last=40)
    # Least squares of polyfit take weights of residuals, not of their squares.
    index, kept = np.arange(1, 41), np.sort(values)[::-1]
    slope = np.polyfit(np.log(index), np.log(kept), 1, w=index**-0.5)[0]
    assert fitted.estimate == pytest.approx(-slope)
    assert 0 < fitted.r_squared < 1


@pytest.mark.parametrize("columns", [40, 150])  # less and more than the 60 histories
def test_the_interval_is_the_jackknife_over_sub_matrices_of_the_data(columns):
    values, groups = matrix_of_random_rows(np.random.default_rng(0), 60, 0.7, columns), 7
    window = {"first": 2, "last": 15}
    fitted = power_law(spectrum(values), **window, groups=groups, level=0.9, seed=3)
    group = np.random.default_rng(3).permutation(60) % groups
    without = np.array(
        [power_law(spectrum(values[group != g]), **window).estimate for g in range(groups)]
    )
    squares = ((without - without.mean()) ** 2).sum()
    error = math.sqrt((groups - 1) / groups * squares)
    assert fitted.standard_error == pytest.approx(error)
    half = student.ppf(0.95, groups - 1) * error
    assert fitted.high - fitted.estimate == pytest.approx(half)
    assert fitted.estimate - fitted.low == pytest.approx(half)


@pytest.mark.parametrize("power", [0.6, 1.0])
def test_intervals_cover_the_mean_of_other_samples_and_err_to_the_wide_side(power):
    random, count = np.random.default_rng(0), 200
    fits = [power_law(spectrum(matrix_of_random_rows(random, 80, power))) for _ in range(count)]
    estimates = np.array([fit.estimate for fit in fits])
    mean, spread = estimates.mean(), estimates.std(ddof=1)
    covered = np.mean([fit.low <= mean <= fit.high for fit in fits])
    # 95% less three binomial standard deviations of 200 intervals.
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / count)
    # Wide, but within reason: the spread itself is known to 5%.
    errors = math.sqrt(np.mean([fit.standard_error**2 for fit in fits]))
    assert 0.95 * spread < errors < 1.5 * spread


def test_differences_cancel_what_two_models_share():
    random = np.random.default_rng(0)
    base = matrix_of_random_rows(random, 100, 0.7, 400)
    ours = spectrum(base + 1e-3 * random.standard_normal(base.shape))
    baseline, scaled = spectrum(base), spectrum(3 * base)
    difference = exponent_difference(ours, baseline)
    first, second = power_law(ours), power_law(baseline)
    assert difference.estimate == pytest.approx(first.estimate - second.estimate)
    assert difference.standard_error < 0.1 * second.standard_error
    none = exponent_difference(scaled, baseline)
    assert none.low == pytest.approx(0, abs=1e-9) and none.high == pytest.approx(0, abs=1e-9)


def test_difference_intervals_cover_the_mean_difference():
    random, count, differences = np.random.default_rng(1), 150, []
    bend = np.arange(1, 151).reshape(15, 10) ** -0.2
    for _ in range(count):
        values = matrix_of_random_rows(random, 80, 0.6)
        ours = values * bend + 0.01 * random.standard_normal(values.shape)
        differences.append(exponent_difference(spectrum(ours), spectrum(values), groups=10))
    mean = np.mean([difference.estimate for difference in differences])
    covered = np.mean([difference.low <= mean <= difference.high for difference in differences])
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / count)
    assert mean == pytest.approx(0.2, abs=0.05)


def test_submatrix_fits_are_those_of_the_first_histories_and_futures():
    values = matrix_of_random_rows(np.random.default_rng(0), 120, 0.8, 400)
    fits = submatrix_fits(values, spectrum(values), fractions=(0.5, 1.0), tolerance=0.05)
    sizes = [(fit.histories, fit.futures) for fit in fits]
    assert sizes == [(60, 20), (120, 20), (60, 40), (120, 40)]
    for fit in fits:
        own = spectrum(values[: fit.histories, : fit.futures].copy())
        assert fit.exponent == power_law(own)
        assert fit.rank == own.rank(0.05)
        assert fit.effective_rank == own.effective_rank
    fixed = submatrix_fits(values, spectrum(values), fractions=(0.5, 1.0), first=5, last=14)
    assert {(fit.exponent.first, fit.exponent.last) for fit in fixed} == {(5, 14)}
    assert json.loads(json.dumps(fits[0].to_dict()))["exponent"] == fits[0].exponent.to_dict()


def test_errors_name_what_a_fit_of_the_exponent_needs():
    exact = spectrum(matrix_with_spectrum([3, 2, 1], (40, 5, 9)))
    with pytest.raises(ValueError, match="needs 4 singular values or more out of the first 3"):
        power_law(exact)
    full = spectrum(matrix_of_random_rows(np.random.default_rng(0), 40, 0.7))
    with pytest.raises(ValueError, match="first 38, .* got first = 2 and last = 39"):
        power_law(full, first=2, last=39)
    with pytest.raises(ValueError, match="groups must be from 2 to the 40 histories, got 1"):
        power_law(full, groups=1)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        power_law(full, level=95)
    with pytest.raises(ValueError, match="over the same histories, futures and tokens"):
        exponent_difference(full, exact)
    ones = np.ones((4, 2, 3))
    with pytest.raises(ValueError, match="fractions must lie in"):
        submatrix_fits(ones, spectrum(ones), fractions=(0.5, 2.0))
    with pytest.raises(ValueError, match="whole must be the spectrum of values"):
        submatrix_fits(ones, full)
