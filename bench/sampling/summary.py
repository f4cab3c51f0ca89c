"""Means over units, with bootstrap intervals, and how many times less than 8 independent samples.

A ratio divides the sums over the same units, and its interval resamples units: pairs of ours and
the baseline's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastperturb.report.bootstrap import mean_ratio

MEANS = ("bias", "mse_token", "mse_piece", "variance_piece")
RATIOS = ("mse_token", "mse_piece", "variance_piece", "variance_U", "variance_W")
BASELINE = ("independent", 8)


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for every setting, equation, sampling and number of samples."""
    summarised = []
    for setting in dict.fromkeys(setting_of(unit) for unit in results):
        chosen = [unit for unit in results if setting_of(unit) == setting]
        for place in dict.fromkeys(place_of(row) for unit in chosen for row in unit["rows"]):
            units = [unit for unit in chosen if any(place_of(r) == place for r in unit["rows"])]
            baseline = (place[0], *BASELINE)
            ours, theirs = ([pick(u, key) for u in units] for key in (place, baseline))
            summarised.append(
                dict(zip(("text", "scope", "transform"), setting))
                | dict(zip(("equation", "sampling", "num_samples"), place))
                | {
                    "units": len(units),
                    "tokens": sum(unit["tokens"] for unit in units),
                    **{name: mean([row[name] for row in ours]) for name in MEANS},
                    "times_less": {
                        name: ratio([r[name] for r in theirs], [r[name] for r in ours])
                        for name in RATIOS
                    },
                    "gradient_noise": {part: noise(ours, part) for part in ("U", "W")},
                    "gradient_bias": {part: share(units, ours, part) for part in ("U", "W")},
                }
            )
    return summarised


def setting_of(unit: dict[str, Any]) -> tuple[str, str, str]:
    return unit["unit"]["text"], unit["unit"]["scope"], unit["unit"]["transform"]


def place_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["equation"], row["sampling"], row["num_samples"]


def pick(unit: dict[str, Any], place: tuple[str, str, int]) -> dict[str, Any]:
    return next(row for row in unit["rows"] if place_of(row) == place)


def mean(values: Sequence[float]) -> dict[str, float]:
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the ratio of two sums over the units, and its 95% interval."""
    interval = mean_ratio([numerators], [denominators])
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def noise(ours: Sequence[dict[str, Any]], part: str) -> dict[str, float]:
    """Return the gradient's variance relative to the squared length of its expectation."""
    return ratio([row[f"variance_{part}"] for row in ours], [row[f"signal_{part}"] for row in ours])


def share(units: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], part: str) -> float:
    """Return the gradient's bias relative to the reference's gradient, as root mean squares."""
    squares = sum(row[f"squared_bias_{part}"] for row in ours)
    size = sum(unit[f"squared_gradient_{part}"] for unit in units)
    return math.sqrt(max(squares, 0.0) / size)
