"""The predicted time of every kernel and call on a Hopper GPU, beside what was measured."""

from __future__ import annotations

from typing import Any

from docs.tables.cells import RESULTS, read, table

_PREDICTED = "kernels_predicted.json"
_MEASURED = "kernels_measured.json"  # of `make gpu STAGES=kernels`, once a GPU has run it


def kernels() -> str:
    results = read(_PREDICTED)
    measured = _measured()
    slow, fast = (f"ms at {bandwidth / 1e12:.1f} TB/s" for bandwidth in results["bandwidths"])
    header = ["call", "kernel", "launches", "MB", "GFLOP", "registers", "warps a multiprocessor"]
    header += [slow, fast, "limit", "measured ms"]
    rows = []
    for row in results["kernels"]:
        rows.append(
            [
                f"{row['op']}: {row['call']}",
                f"`{row['kernel'].removesuffix('_kernel')}`",
                str(row["launches"]),
                _digits(row["bytes"] / 1e6),
                _digits(row["flops"] / 1e9),
                str(row["registers"]) + (f" + {row['stack']} B" if row["stack"] else ""),
                str(row["blocks_per_sm"] * row["warps"]),
                *(_digits(milliseconds) for milliseconds in row["milliseconds"]),
                row["limit"],
                measured.get((row["op"], row["call"], row["kernel"]), ""),
            ]
        )
    return table(header, rows, *_sources())


def calls() -> str:
    results = read(_PREDICTED)
    measured = _measured()
    slow, fast = (f"ms at {bandwidth / 1e12:.1f} TB/s" for bandwidth in results["bandwidths"])
    header = ["call", "our launches", "products", "other launches"]
    header += ["ms of all products", slow, fast, "over the products", "measured ms"]
    rows = []
    for row in results["calls"]:
        parts = row["milliseconds"].values()
        totals = [sum(times) for times in zip(*parts, strict=True)]
        rows.append(
            [
                f"{row['op']}: {row['call']}",
                *(str(row[name]) for name in ("launches", "products", "other_launches")),
                _digits(row["floor"]) if row["floor"] else "",
                *map(_digits, totals),
                f"{totals[0] / row['floor']:.2f}" if row["floor"] else "",
                measured.get((row["op"], row["call"], "call"), ""),
            ]
        )
    return table(header, rows, *_sources())


def _measured() -> dict[tuple[str, str, str], str]:
    if not (RESULTS / _MEASURED).exists():
        return {}
    rows: list[dict[str, Any]] = read(_MEASURED)["rows"]
    return {(row["op"], row["x"]["call"], row["provider"]): _digits(row["p50"]) for row in rows}


def _sources() -> list[str]:
    return [_PREDICTED, *([_MEASURED] if (RESULTS / _MEASURED).exists() else [])]


def _digits(value: float) -> str:
    """Return two significant digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.2g}"


TABLES = {"kernel-predictions": kernels, "call-predictions": calls}
