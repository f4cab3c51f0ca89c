"""Exponents, effective ranks and KL by rank over seeds, and their change from plain training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.ranks.training import METHODS, SEEDS
from fastperturb.report.figures import INK, PALETTE, plain
from fastperturb.report.table import aligned

# Ranks to which the matrix is truncated, on held-out histories.
CUTS = (8, 32, 128)
WITHOUT = ", without noise"

Models = Mapping[str, Mapping[str, Any]]


def over_seeds(models: Models) -> dict[str, Any]:
    """Return a row for each method, with noise and without; changes are from `exact`, by seed."""
    rows = [{"name": "base", "seeds": 1, **_row([models["base"]], None)}]
    exact = [models[f"exact_{seed}"] for seed in SEEDS]
    for method in METHODS:
        for form in ("", WITHOUT):
            names = [f"{method}_{seed}{form}" for seed in SEEDS]
            if all(name in models for name in names):
                by_seed = [models[name] for name in names]
                row = _row(by_seed, None if method == "exact" else exact)
                rows.append({"name": f"{method}{form}", "seeds": len(by_seed), **row})
    return {"rows": rows, "cuts": list(CUTS)}


def _row(
    by_seed: list[Mapping[str, Any]], baseline: list[Mapping[str, Any]] | None
) -> dict[str, Any]:
    exponents = [model["exponent"] for model in by_seed]
    numbers = [_numbers(model) for model in by_seed]
    row: dict[str, Any] = {
        "spectrum": np.mean([_shares(model) for model in by_seed], axis=0).tolist(),
        "intervals": [[exponent["low"], exponent["high"]] for exponent in exponents],
    }
    for key in numbers[0]:
        values = [of_seed[key] for of_seed in numbers]
        row[key] = {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}
        if baseline is not None:
            changes = [a - _numbers(b)[key] for a, b in zip(values, baseline, strict=True)]
            row[key]["change"] = fmean(changes)
            row[key]["change_sd"] = stdev(changes)
    return row


def _numbers(model: Mapping[str, Any]) -> dict[str, float]:
    held_out = next(curve for curve in model["kl"] if curve["held_out"])
    kl = dict(zip(held_out["ranks"], held_out["kl"], strict=True))
    return {
        "exponent": model["exponent"]["estimate"],
        "effective_rank": model["spectrum"]["effective_rank"],
        **{f"kl_{rank}": kl[rank] for rank in CUTS},
    }


def _shares(model: Mapping[str, Any]) -> Any:
    spectrum = model["spectrum"]
    return np.array(spectrum["singular_values"]) / spectrum["frobenius"]


def table(results: Mapping[str, Any]) -> str:
    header = ["model", "exponent", "change", "effective rank", "change"]
    header += [text for rank in CUTS for text in (f"KL at rank {rank}", "change")]
    keys = ("exponent", "effective_rank", *(f"kl_{rank}" for rank in CUTS))
    rows = []
    for row in results["rows"]:
        cells = [row["name"]]
        for key in keys:
            form = ".1f" if key == "effective_rank" else ".3f"
            value = row[key]
            cells.append(_with_sd(value["mean"], value["sd"], form))
            change = (
                ""
                if "change" not in value
                else _with_sd(value["change"], value["change_sd"], f"+{form}")
            )
            cells.append(change)
        rows.append(cells)
    return aligned([header, *rows]) + (
        "\n\nMeans ± sd over seeds; changes are from exact of the same seed. The KL is that of "
        "every second history, projected on the leading directions of the others.\n"
    )


def _with_sd(mean: float, sd: float | None, form: str) -> str:
    return f"{mean:{form}}" + ("" if sd is None else f" ± {sd:{form.lstrip('+')}}")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw spectra on the left, and exponents of every seed with intervals on the right."""
    figure = Figure(figsize=(12, 4.8), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1)
    left, right = figure.subplots(1, 2)
    rows = results["rows"]
    for number, row in enumerate(rows):
        name, without = row["name"].removesuffix(WITHOUT), row["name"].endswith(WITHOUT)
        colour = PALETTE[["base", *METHODS].index(name) % len(PALETTE)]
        shares = row["spectrum"]
        style = "--" if without else "-"
        left.plot(range(1, len(shares) + 1), shares, style, color=colour, label=row["name"])
        for seed, (low, high) in enumerate(row["intervals"]):
            height = len(rows) - number + 0.18 * (seed - (len(row["intervals"]) - 1) / 2)
            middle = (low + high) / 2
            right.errorbar(
                middle,
                height,
                xerr=(high - low) / 2,
                fmt="s" if without else "o",
                color=colour,
                markersize=4,
                linewidth=1.2,
            )
    left.set_xscale("log")
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    left.set_title("singular values", loc="left", fontsize=11, color=INK)
    left.set_xlabel("number i (dashed: without noise)", color=INK)
    left.set_ylabel("share of the Frobenius norm", color=INK)
    right.set_yticks([len(rows) - n for n in range(len(rows))], [row["name"] for row in rows])
    right.set_title("exponents, each seed", loc="left", fontsize=11, color=INK)
    right.set_xlabel("a of i^-a, with 95% intervals over histories", color=INK)
    plain(left, grid="y")
    plain(right, grid="x")
    figure.savefig(path)
