"""Results of `fastperturb rank` as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from fastperturb.report.table import Table, markdown, show

__all__ = ["markdown", "show", "tables"]

Results = Mapping[str, Any]

_KL_RANKS = (8, 32, 128)


def tables(results: Results) -> list[Table]:
    """Return the tables of results.json that have rows."""
    written_by = {
        name: model["generation"]
        for name, model in results["models"].items()
        if "generation" in model
    }
    parts = [
        spectra(results),
        kl(results),
        angles(results),
        sizes(results),
        *(generation(name, comparison) for name, comparison in written_by.items()),
        *(written(name, comparison["written"]) for name, comparison in written_by.items()),
    ]
    return [table for table in parts if table.rows]


def spectra(results: Results) -> Table:
    rows = []
    for name, model in results["models"].items():
        fit, difference = model["exponent"], results["differences"].get(name)
        rows.append(
            [
                name,
                f"{fit['estimate']:.3f} {_interval(fit, '.3f')}",
                "" if difference is None else _signed(difference, "+.3f"),
                f"{fit['first']} to {fit['last']}",
                f"{fit['r_squared']:.4f}",
                _number(model["rank"]["rank"], "d"),
                _number(model["spectrum"]["effective_rank"], ".1f"),
                f"{model['queries']['of the matrix']:,}",
            ]
        )
    first = next(iter(results["models"].values()))
    histories, futures, tokens = first["spectrum"]["shape"]
    return Table(
        "Logit rank",
        ["model", "exponent", "difference", "of values", "R²", "rank", "effective", "queries"],
        rows,
        f"The matrix holds the logits of {tokens} tokens after {histories} histories x {futures} "
        "futures. Singular values fall as i^-a with the exponent a; its 95% intervals come from "
        "leaving out groups of histories. The difference is from the first model, paired. Rank "
        f"counts singular values above {first['rank']['tolerance']:g} times the first; the "
        "effective rank is exp of the entropy of their shares.",
    )


def kl(results: Results) -> Table:
    rows = []
    for name, model in results["models"].items():
        own, held_out = (
            dict(zip(curve["ranks"], curve["kl"], strict=True)) for curve in model["kl"]
        )
        shown = [_number(curve.get(rank), ".3g") for curve in (own, held_out) for rank in _KL_RANKS]
        rows.append([name, *shown])
    header = [f"{kind}rank {rank}" for kind in ("", "held out, ") for rank in _KL_RANKS]
    return Table(
        "KL of the matrix cut to a rank",
        ["model", *header],
        rows,
        "Mean KL in nats a token from the model to the distribution of the truncated logits. Held "
        "out: every second history, projected on the directions of the others.",
    )


def angles(results: Results) -> Table:
    rows = []
    for name, model in results["models"].items():
        for pair, measured in model["angles"].items():
            degrees = [math.degrees(median(measured[key])) for key in ("angles", "random")]
            directions = str(len(measured["angles"]))
            rows.append([name, pair, directions, *(f"{value:.1f}" for value in degrees)])
    return Table(
        "Principal angles",
        ["model", "between", "directions", "median", "random"],
        rows,
        "Degrees between the leading singular subspaces; random is the median between random "
        "subspaces of as many dimensions.",
        words=("model", "between"),
    )


def sizes(results: Results) -> Table:
    rows = [
        [
            name,
            str(size["histories"]),
            str(size["futures"]),
            f"{size['exponent']['estimate']:.3f} {_interval(size['exponent'], '.3f')}",
            _number(size["rank"], "d"),
            _number(size["effective_rank"], ".1f"),
        ]
        for name, model in results["models"].items()
        for size in model["sizes"]
    ]
    return Table(
        "Over sizes",
        ["model", "histories", "futures", "exponent", "rank", "effective"],
        rows,
        "Each row is a sub-matrix of the first histories and futures.",
    )


def generation(model: str, comparison: Results) -> Table:
    ways = comparison["ways"]
    steps = len(ways[0]["kl_by_step"])
    shown = sorted({0, steps // 2, steps - 1})
    rows = []
    for number, way in enumerate(ways):
        total = way["cumulative"]
        more = _signed(way["more"], "+.2f") if number else ""
        by_step = [f"{way['kl_by_step'][step]:.3f}" for step in shown]
        rows.append(
            [way["name"], f"{total['estimate']:.2f} {_interval(total, '.2f')}", more, *by_step]
        )
    fits = "; ".join(
        f"{fit['name']}: {fit['histories']} histories, ridge {fit['ridge']:g}, relative error "
        f"{fit['error']:.3f}" + (f", on held-out futures {fit['held_out_error']:.3f}")
        for fit in comparison["fits"]
    )
    return Table(
        f"Written by other prompts: {model}",
        ["predictor", f"KL over {steps} steps", "more", *(f"at step {step + 1}" for step in shown)],
        rows,
        "KL in nats from the model to each predictor of the next token, the mean over "
        f"{comparison['targets']} target prompts, with 95% intervals over them. {fits}. At steps 1 "
        f"to 4, {', '.join(f'{share:.0%}' for share in comparison['asked'][:4])} of the contexts "
        "judged were query futures too.",
        words=("predictor",),
    )


def written(model: str, examples: list[Results]) -> Table:
    rows = [
        [" ".join(example[key].split()) for key in ("target", "model", "combination")]
        for example in examples
    ]
    header = ["after this prompt", "the model writes", "the linear combination writes"]
    note = "The likeliest token at every step; the combination reads other prompts only."
    return Table(f"Written text: {model}", header, rows, note, words=tuple(header))


def _interval(estimate: Results, form: str) -> str:
    return f"[{estimate['low']:{form}}, {estimate['high']:{form}}]"


def _signed(estimate: Results, form: str) -> str:
    return f"{estimate['estimate']:{form}} {_interval(estimate, form)}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
