"""The synthetic language: the demo, and the study of all estimators on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs.tables.cells import bold, interval, read, spread, table

FILES = _DEMO, _STUDY = "demo/results.json", "synthetic/results.json"
REGIONS = {
    "in_support": ("in support", ".3f"),
    "band1": ("band 1", ".2f"),
    "band2": ("band 2", ".2f"),
}
_DEMO_NAMES = {
    "exact": "exact prefix",
    "jensen": "fixed noise, `jensen`",
    "fixed": "fixed noise, best scale, `iwae`",
    "learned": "learned, `iwae`",
    "learned_iwae_m4": "learned, `iwae`, too few samples",
    "learned_stratified_m4": "learned, `iwae`, stratified samples",
    "learned_jvi_clip_m4": "learned, `jvi_clip`",
    "learned_quadratic_m2": "learned, `quadratic`",
    "learned_mlmc": "learned, `mlmc`",
}


def demo() -> str:
    rows = []
    for row in read(_DEMO)["rows"]:
        cells = [_DEMO_NAMES[row["method"]], f"{row['samples']:.2g}"]
        cells += [
            spread(row["kl"][region], row["kl_std"][region], form)
            for region, (_, form) in REGIONS.items()
        ]
        rows.append(bold(cells) if row["method"] == "learned" else cells)
    header = ["method", "samples", *(title for title, _ in REGIONS.values())]
    return table(header, rows, _DEMO)


def out_of_support() -> dict[str, float]:
    """Return the demo's KL in the far band, by method."""
    return {row["method"]: row["kl"]["band2"] for row in read(_DEMO)["rows"]}


def samples() -> str:
    return _trained("draws", "M")


def equal_flops() -> str:
    return _trained("flops", "batch")


def fixed() -> str:
    return _trained("fixed", "scale")


def size() -> str:
    return _trained("size", "training pairs")


def held_samples() -> str:
    """Return the scale found with the trunk held at the truth, by estimator and M."""
    rows = [row for row in _rows("held_draws") if "movement" in row]
    return _pivot(rows, "estimator", "M = {}", lambda row: row["method"]["num_samples"])


def held_noise() -> str:
    """Return the scale found with the trunk held at the truth, by estimator and true scale."""
    rows = [row for row in _rows("held_noise") if "movement" in row]
    return _pivot(rows, "estimator", "truth {:g}", lambda row: row["setting"]["noise_sd"])


def _pivot(
    rows: list[dict[str, Any]], first: str, title: str, key: Callable[[dict[str, Any]], float]
) -> str:
    columns = sorted({key(row) for row in rows})
    lines = []
    for name in dict.fromkeys(row["line"] for row in rows):
        means = {
            key(row): _mean(row["movement"]["noisy"], ".3f") for row in rows if row["line"] == name
        }
        lines.append([name, *(means.get(column, "") for column in columns)])
    return table([first, *map(title.format, columns)], lines, _STUDY)


def ratios() -> str:
    rows = []
    for claim, pairs in read(_STUDY)["comparisons"].items():
        if claim == "equal flops":
            continue
        for pair in pairs:
            cells = [interval(pair["ratio"][region], ".2f", middle="mean") for region in REGIONS]
            rows.append([f"{pair['ours']}", f"{pair['theirs']}", *cells])
    return table(["KL of", "over KL of", *(title for title, _ in REGIONS.values())], rows, _STUDY)


def bias() -> str:
    values = read(_STUDY)["bias"]
    counts = sorted({row["num_samples"] for row in values})
    rows = []
    for name in dict.fromkeys(row["equation"] for row in values):
        by_count = {row["num_samples"]: row["value"] for row in values if row["equation"] == name}
        cells = [_signed(by_count[M]) if M in by_count else "" for M in counts]
        rows.append([f"`{name}`", *cells])
    return table(["bias of the value", *(f"M = {M}" for M in counts)], rows, _STUDY)


def coverage() -> str:
    rows = [
        [
            row["name"],
            f"{row['examples']:,}",
            f"{row['replications']:,}",
            *(
                f"{row['coverage'][bread]:.1%}" if bread in row["coverage"] else ""
                for bread in ("information", "outer")
            ),
        ]
        for row in read(_STUDY)["coverage"]
    ]
    header = ["estimator", "examples", "replications", "`information`", "`outer`"]
    return table(header, rows, _STUDY)


def _rows(experiment: str) -> list[dict[str, Any]]:
    return [row for row in read(_STUDY)["rows"] if row["experiment"] == experiment]


def _trained(experiment: str, x: str) -> str:
    rows = []
    for row in _rows(experiment):
        movement = row.get("movement")
        rows.append(
            [
                row["line"],
                "fresh" if row["x"] is None else f"{row['x']:,g}",
                f"{row['draws']:.3g}",
                *(_mean(row["kl"][region], form) for region, (_, form) in REGIONS.items()),
                *(
                    _mean(movement[axis], ".2f") if movement else ""
                    for axis in ("noisy", "precise")
                ),
            ]
        )
    header = ["method", x, "samples", *(f"KL {title}" for title, _ in REGIONS.values())]
    return table([*header, "shift, noisy axis", "precise axis"], rows, _STUDY)


def _mean(value: dict[str, float], form: str) -> str:
    return spread(value["mean"], value["high"] - value["mean"], form)


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.4f}"


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "synthetic-samples": samples,
    "synthetic-flops": equal_flops,
    "synthetic-fixed": fixed,
    "synthetic-size": size,
    "synthetic-held-samples": held_samples,
    "synthetic-held-noise": held_noise,
    "synthetic-ratios": ratios,
    "synthetic-bias": bias,
    "synthetic-coverage": coverage,
}
