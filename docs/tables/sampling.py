"""Samplings and estimators at few samples: on real text, and trained on the synthetic language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs.tables.cells import interval, read, spread, table
from docs.tables.synthetic import REGIONS

FILES = _TEXT, _SYNTHETIC = "sampling/results.json", "synthetic_sampling/results.json"
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
    "sampling_batch": "batch 4,096 / M",
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
    """Return the estimators at 8 and 16 samples: bias, and gradient variance over the signal."""
    rows = []
    for row in _rows(scope="token", text="wikipedia"):
        if row["num_samples"] not in (8, 16) or row["sampling"] == "antithetic":
            continue
        if row["equation"] == "jensen":
            continue
        rows.append(
            [
                row["transform"],
                f"`{row['equation']}`",
                f"{row['sampling']}, {row['num_samples']}",
                interval(row["bias"], "+.4f"),
                *(f"{row['gradient_noise'][part]['estimate']:.2g}" for part in ("U", "W")),
            ]
        )
    header = ["transform", "estimator", "samples", "bias of the value"]
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
                    for region, (_, form) in REGIONS.items()
                ),
            ]
        )
    header = ["training", "samples", "M", *(f"KL {title}" for title, _ in REGIONS.values())]
    return table(header, rows, _SYNTHETIC)


def ratios() -> str:
    """Return the ratios of KL on the same seeds: stratified samples over others."""
    rows = []
    for title, pairs in read(_SYNTHETIC)["comparisons"].items():
        for pair in pairs:
            if "stratified" in pair["ours"]:
                cells = [interval(pair["ratio"][name], ".2f", middle="mean") for name in REGIONS]
                names = (pair[side].removeprefix("learned, ") for side in ("ours", "theirs"))
                rows.append([title.partition(", ")[2], *names, *cells])
    header = ["training", "KL of", "over KL of", *(title for title, _ in REGIONS.values())]
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
