"""Samplings and estimators at few samples: on real text, and trained on the synthetic language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs.tables.cells import interval, ratio, read, spread, table

FILES = _TEXT, _SYNTHETIC = "sampling/results.json", "synthetic_sampling/results.json"
_REGIONS = {
    "in_support": ("in support", ".3f"),
    "band1": ("band 1", ".2f"),
    "band2": ("band 2", ".2f"),
}
# What is compared with 8 independent samples in every setting.
_PLACES = (
    ("independent", 8),
    ("antithetic", 8),
    ("stratified", 8),
    ("independent", 16),
    ("stratified", 16),
)
_EXPERIMENTS = {
    "sampling": "batch 256",
    "sampling_batch": "equal flops: batch 4,096 / M",
    "sampling_large": "batch 1,024",
}


def real_text() -> str:
    """Return iwae on wikipedia: bias, and how many times less than 8 independent samples."""
    rows = []
    for row in _rows(text="wikipedia", scope="token", transform="initial", equation="iwae"):
        less = row["times_less"]
        rows.append(
            [
                row["sampling"],
                str(row["num_samples"]),
                interval(row["bias"], "+.4f"),
                *(_times(less[name]) for name in ("mse_piece", "variance_U", "variance_W")),
            ]
        )
    header = ["samples", "M", "bias, nats a token"]
    less = [f"{name}, times less" for name in ("value MSE", "gradient variance, U", "W")]
    return table([*header, *less], rows, _TEXT)


def settings() -> str:
    """Return the same in every setting, at 8 and 16 samples."""
    rows = []
    chosen = _rows(equation="iwae")
    for setting in dict.fromkeys(_setting(row) for row in chosen):
        for place in _PLACES:
            [row] = [
                row
                for row in chosen
                if _setting(row) == setting and (row["sampling"], row["num_samples"]) == place
            ]
            less = row["times_less"]
            rows.append(
                [
                    setting,
                    f"{row['sampling']}, {row['num_samples']}",
                    f"{row['bias']['estimate']:+.4f}",
                    *(_times(less[name]) for name in ("mse_piece", "variance_U", "variance_W")),
                ]
            )
    header = ["text, scope, transform", "samples", "bias", "value MSE, times less"]
    return table([*header, "gradient variance, U", "W"], rows, _TEXT)


def equations() -> str:
    """Return the estimators at 8 and 16 samples: biases, and noise relative to the signal."""
    rows = []
    for row in _rows(text="wikipedia", scope="token", transform="initial"):
        if row["num_samples"] not in (8, 16) or row["sampling"] == "antithetic":
            continue
        exact = row["equation"] == "quadratic"
        rows.append(
            [
                f"`{row['equation']}`",
                row["sampling"],
                str(row["num_samples"]),
                interval(row["bias"], "+.4f"),
                "0" if exact else f"{row['gradient_bias']['U']:.2f}",
                ratio(row["gradient_noise"]["U"]["estimate"]),
                ratio(row["gradient_noise"]["W"]["estimate"]),
            ]
        )
    header = ["estimator", "samples", "M", "bias of the value", "bias of the gradient, U"]
    return table([*header, "gradient variance / signal, U", "W"], rows, _TEXT)


def synthetic() -> str:
    """Return KL on the synthetic language by sampling, in each experiment."""
    rows = []
    for row in read(_SYNTHETIC)["rows"]:
        rows.append(
            [
                _EXPERIMENTS[row["experiment"]],
                row["line"],
                f"{row['x']:g}",
                *(
                    spread(row["kl"][region]["mean"], _half(row["kl"][region]), form)
                    for region, (_, form) in _REGIONS.items()
                ),
            ]
        )
    header = ["training", "samples", "M", *(f"KL {title}" for title, _ in _REGIONS.values())]
    return table(header, rows, _SYNTHETIC)


def ratios() -> str:
    """Return the ratios of KL on the same seeds: stratified samples over independent ones."""
    rows = []
    for title, pairs in read(_SYNTHETIC)["comparisons"].items():
        for pair in pairs:
            if "stratified" in pair["ours"]:
                cells = [
                    interval(pair["ratio"][region], ".2f", middle="mean") for region in _REGIONS
                ]
                rows.append([title, pair["ours"], pair["theirs"], *cells])
    header = ["experiment", "KL of", "over KL of", *(title for title, _ in _REGIONS.values())]
    return table(header, rows, _SYNTHETIC)


def _rows(**wanted: str) -> list[dict[str, Any]]:
    rows = read(_TEXT)["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _setting(row: dict[str, Any]) -> str:
    return f"{row['text']}, {row['scope']}, {row['transform']}"


def _times(value: dict[str, float]) -> str:
    return interval(value, ".1f")


def _half(value: dict[str, float]) -> float:
    return value["high"] - value["mean"]


TABLES: dict[str, Callable[[], str]] = {
    "sampling-text": real_text,
    "sampling-settings": settings,
    "sampling-estimators": equations,
    "sampling-synthetic": synthetic,
    "sampling-ratios": ratios,
}
