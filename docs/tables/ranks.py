"""Logit rank: spectra, writing by combinations, methods, and learning from queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from docs.tables.cells import bold, interval, ratio, read, spread, table

_BASE, _LATER = "ranks/base/results.json", "ranks/later/results.json"
_WAYS = {
    "linear combination": "linear combination of other prompts",
    "of shuffled histories": "the same, their tokens in disorder",
    "empty future": "weights fitted on the next token alone",
    "last token": "the model, given the last token",
    "earlier checkpoint": "an earlier checkpoint of the model",
    "unigram": "unigram, the best in hindsight",
}
_METHODS = {
    "base": "base",
    "exact": "plain LoRA",
    "jensen": "fixed noise, `jensen`",
    "lowrank": "learned, `lowrank`",
    "mlp": "learned, `mlp`",
}


def spectrum() -> str:
    rows = [
        [
            f"{size['histories']:,}",
            f"{size['futures']:,}",
            interval(size["exponent"], ".3f"),
            f"{size['effective_rank']:.1f}",
        ]
        for size in _model(_BASE)["sizes"]
    ]
    header = ["histories", "futures", "exponent [95% interval]", "effective rank"]
    return table(header, rows, _BASE)


def cuts() -> str:
    rows = []
    for curve in _model(_BASE)["kl"]:
        by_rank = dict(zip(curve["ranks"], curve["kl"], strict=True))
        title = "on histories held out" if curve["held_out"] else "on the same histories"
        rows.append([title, *(f"{by_rank[rank]:.3f}" for rank in (8, 32, 128))])
    header = ["nats from the model to the cut", *(f"rank {rank}" for rank in (8, 32, 128))]
    return table(header, rows, _BASE)


def angles() -> str:
    rows = [
        [
            title,
            f"{math.degrees(median(pair['angles'])):.0f}°",
            f"{math.degrees(median(pair['random'])):.0f}°",
        ]
        for title, pair in _model(_BASE)["angles"].items()
    ]
    return table(["subspaces of", "median angle", "of random ones"], rows, _BASE)


def writing(file: str) -> str:
    """Return what it costs to write by combinations, beside the baselines."""
    rows: list[list[str]] = []
    for way in _model(file)["generation"]["ways"]:
        first = not rows
        more = "" if first else interval(way["more"], "+.2f")
        name = way["name"]
        title = _WAYS.get(name, f"the model, given the {name}")
        cells = [title, interval(way["cumulative"], ".2f"), more]
        rows.append(bold(cells) if first else cells)
    header = ["way to write", "KL [95% interval]", "more than the combination"]
    return table(header, rows, file)


def methods() -> str:
    rows = []
    for row in read("ranks/summary.json")["rows"]:
        name, _, form = row["name"].partition(", ")
        cells = [f"{_METHODS[name]}{', ' + form if form else ''}"]
        for key, shape in (("exponent", ".3f"), ("effective_rank", ".1f")):
            value = row[key]
            cells.append(spread(value["mean"], value["sd"], shape))
            changed = "change" in value
            cells.append(
                spread(value["change"], value["change_sd"], f"+{shape}") if changed else ""
            )
        cells.append(spread(row["kl_32"]["mean"], row["kl_32"]["sd"], ".3f"))
        rows.append(cells)
    header = ["model", "exponent", "change", "effective rank", "change", "KL at rank 32, held out"]
    return table(header, rows, "ranks/summary.json")


def speeds() -> str:
    times = read("ranks/speed.json")
    rows = [
        [title, way["way"], f"{way['seconds']:.2f}", ratio(way["ratio"])]
        for title, ways in (("the matrix", times["matrix"]), ("writing", times["decode"]))
        for way in ways
    ]
    return table(["what", "way", "seconds", "ratio"], rows, "ranks/speed.json")


def exact() -> str:
    rows = [
        [
            str(row["rank"]),
            f"{row['recovered']} of {row['targets']}",
            f"{row['most_total_variation']:.1e}",
            " / ".join(f"{count:,.0f}" for count in row["queries"]),
        ]
        for row in read("ranks/learning.json")["exact"]
    ]
    header = [
        "rank",
        "targets recovered",
        "largest total variation",
        "least / median / most queries",
    ]
    return table(header, rows, "ranks/learning.json")


def noisy() -> str:
    rows = [
        [
            f"{row['V']} tokens, length {row['T']}, rank {row['rank']}",
            f"{row['noise']:g}",
            str(max(row["ranks"])),
            f"{row['total_variation']:.4f}",
            f"{row['queries']:,}",
        ]
        for row in read("ranks/learning.json")["noisy"]
    ]
    header = ["target", "error of its logits", "rank found", "total variation", "queries"]
    return table(header, rows, "ranks/learning.json")


def parity() -> str:
    rows = [
        [str(row["bits"]), f"{row['queries']:,}", f"{row['total_variation']:.1e}"]
        for row in read("ranks/learning.json")["parity"]
    ]
    return table(["bits", "queries", "total variation"], rows, "ranks/learning.json")


def bounded() -> str:
    rows = [
        [
            str(row["length"]),
            f"{row['largest_coefficient_without']:,.0f}",
            f"{row['total_variation_without']:.2f}",
            f"{row['total_variation']:.2f}",
        ]
        for row in read("ranks/learning.json")["bounded"]
    ]
    header = ["length", "largest coefficient, unbounded", "total variation, unbounded", "bounded"]
    return table(header, rows, "ranks/learning.json")


def _model(name: str) -> dict[str, Any]:
    """Return what was measured of the one model in this file."""
    [model] = read(name)["models"].values()
    return model


TABLES: dict[str, Callable[[], str]] = {
    "ranks-spectrum": spectrum,
    "ranks-cuts": cuts,
    "ranks-angles": angles,
    "ranks-writing": lambda: writing(_BASE),
    "ranks-writing-later": lambda: writing(_LATER),
    "ranks-methods": methods,
    "ranks-speed": speeds,
    "ranks-exact": exact,
    "ranks-noisy": noisy,
    "ranks-parity": parity,
    "ranks-bounded": bounded,
}
