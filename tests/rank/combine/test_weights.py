"""Weights by which the logits of other histories combine into those of a target."""

import numpy as np
import pytest

from fastperturb.rank import fit
from fastperturb.rank.combine.weights import shares_by_length
from fastperturb.rank.texts import with_prefixes


def test_weights_are_those_of_ridge_regression():
    random = np.random.default_rng(0)
    values, targets = random.standard_normal((7, 5, 4)), random.standard_normal((3, 5, 4))
    fitted = fit(values, targets, ridges=[0.02])
    rows, target_rows = values.reshape(7, -1), targets.reshape(3, -1)
    penalty = 0.02 * np.square(rows).sum(1).mean()
    expected = np.linalg.lstsq(
        np.vstack([rows.T, np.sqrt(penalty) * np.eye(7)]),
        np.vstack([target_rows.T, np.zeros((7, 3))]),
        rcond=None,
    )[0].T
    np.testing.assert_allclose(fitted.weights, expected, rtol=1e-9)
    error = np.linalg.norm(target_rows - expected @ rows) / np.linalg.norm(target_rows)
    assert fitted.error == pytest.approx(error, rel=1e-9)


def test_a_future_with_twice_the_share_counts_as_two_futures():
    random = np.random.default_rng(0)
    values, targets = random.standard_normal((7, 5, 4)), random.standard_normal((3, 5, 4))
    twice = [0, 1, 1, 2, 3, 3, 4]
    expected = fit(values[:, twice], targets[:, twice], ridges=[0.02])
    fitted = fit(values, targets, shares=np.array([1.0, 2, 1, 2, 1]), ridges=[0.02])
    np.testing.assert_allclose(fitted.weights, expected.weights, rtol=1e-9)
    assert fitted.error == pytest.approx(expected.error, rel=1e-9)


def test_shares_by_length_give_every_length_of_futures_the_same_total():
    futures = with_prefixes([(1, 2, 3), (1, 4), (5,)])
    shares = shares_by_length(futures)
    by_length = {n: sum(s for s, f in zip(shares, futures) if len(f) == n) for n in range(4)}
    assert by_length == pytest.approx(dict.fromkeys(range(4), 1.0))


def test_without_a_penalty_weights_are_the_shortest_that_fit():
    values = np.random.default_rng(0).standard_normal((2, 3, 4))
    doubled = np.concatenate([values, values])
    fitted = fit(doubled, values, ridges=[0.0])
    np.testing.assert_allclose(fitted.weights, 0.5 * np.hstack([np.eye(2), np.eye(2)]), atol=1e-9)


def test_the_chosen_ridge_is_the_one_that_predicts_held_out_futures_best():
    random = np.random.default_rng(0)
    truth = random.standard_normal((2, 40))
    columns = random.standard_normal((40, 30, 4))
    targets = np.einsum("tn,nfk->tfk", truth, columns) + 5.0 * random.standard_normal((2, 30, 4))
    ridges = (1e-8, 1e-2, 1.0, 100.0)
    fitted = fit(columns, targets, ridges=ridges)
    errors = []
    for ridge in ridges:
        seen = fit(columns[:, :22], targets[:, :22], ridges=[ridge]).weights  # three quarters
        rest = targets[:, 22:] - np.einsum("tn,nfk->tfk", seen, columns[:, 22:])
        errors.append(np.linalg.norm(rest) / np.linalg.norm(targets[:, 22:]))
    assert fitted.ridge == ridges[int(np.argmin(errors))] not in (ridges[0], ridges[-1])
    assert fitted.held_out_error == pytest.approx(min(errors), rel=1e-9)
    everything = fit(columns, targets, ridges=[fitted.ridge])
    np.testing.assert_allclose(fitted.weights, everything.weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": np.ones((1, 3, 3))}, "targets must have the futures and tokens of values"),
        ({"shares": np.ones(2)}, "shares must be positive, one for each of the 3 futures"),
        ({"shares": np.zeros(3)}, "shares must be positive, one for each of the 3 futures"),
        ({"ridges": []}, "ridges must be one or more numbers from 0 up"),
        ({"ridges": [-1.0]}, "ridges must be one or more numbers from 0 up"),
        ({"held_out": 1.0}, "held_out must be a share between 0 and 1"),
        ({"values": np.ones((2, 1, 4)), "targets": np.ones((1, 1, 4))}, "1 futures cannot be"),
    ],
)
def test_arguments_that_cannot_be_fitted_are_rejected(arguments, message):
    arguments = {"values": np.ones((2, 3, 4)), "targets": np.ones((1, 3, 4)), **arguments}
    with pytest.raises(ValueError, match=message):
        fit(arguments.pop("values"), arguments.pop("targets"), **arguments)
