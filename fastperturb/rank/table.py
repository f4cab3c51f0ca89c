"""What `fastperturb rank` found, as tables."""

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
    """Of what results.json holds."""
    found = [spectra(results), kl(results), angles(results), sizes(results)]
    found += [
        generation(name, each["generation"])
        for name, each in results["models"].items()
        if "generation" in each
    ]
    found += [
        written(name, each["generation"]["written"])
        for name, each in results["models"].items()
        if "generation" in each
    ]
    return [table for table in found if table.rows]


def spectra(results: Results) -> Table:
    rows = []
    for name, each in results["models"].items():
        fit, difference = each["exponent"], results["differences"].get(name)
        rows.append(
            [
                name,
                f"{fit['estimate']:.3f} {_between(fit, '.3f')}",
                "" if difference is None else _signed(difference, "+.3f"),
                f"{fit['first']} to {fit['last']}",
                f"{fit['r_squared']:.4f}",
                _number(each["rank"]["rank"], "d"),
                _number(each["spectrum"]["effective_rank"], ".1f"),
                f"{each['queries']['of the matrix']:,}",
            ]
        )
    one = next(iter(results["models"].values()))
    histories, futures, tokens = one["spectrum"]["shape"]
    return Table(
        "Logit rank",
        ["model", "exponent", "difference", "of values", "R²", "rank", "effective", "queries"],
        rows,
        f"Of the logits of {tokens} tokens after {histories} histories x {futures} futures. "
        "Exponent a of singular values i^-a, with 95% intervals from leaving out groups of "
        "histories; the difference is from the first model, paired. Rank counts singular values "
        f"above {one['rank']['tolerance']:g} times the first; the effective one is exp of the "
        "entropy of their shares.",
    )


def kl(results: Results) -> Table:
    rows = []
    for name, each in results["models"].items():
        own, held_out = (
            dict(zip(curve["ranks"], curve["kl"], strict=True)) for curve in each["kl"]
        )
        shown = [_number(curve.get(rank), ".3g") for curve in (own, held_out) for rank in _KL_RANKS]
        rows.append([name, *shown])
    header = [f"{kind}rank {rank}" for kind in ("", "held out, ") for rank in _KL_RANKS]
    return Table(
        "KL of the matrix cut to a rank",
        ["model", *header],
        rows,
        "Mean nats a token from the model to the law of the cut logits. Held out: of every second "
        "history, on the directions of the others.",
    )


def angles(results: Results) -> Table:
    rows = []
    for name, each in results["models"].items():
        for what, found in each["angles"].items():
            degrees = [math.degrees(median(found[key])) for key in ("angles", "random")]
            rows.append([name, what, str(len(found["angles"])), *(f"{d:.1f}" for d in degrees)])
    return Table(
        "Principal angles",
        ["model", "between", "directions", "median", "random"],
        rows,
        "Degrees between the leading singular subspaces; random is the median between random ones "
        "of as many dimensions.",
        words=("model", "between"),
    )


def sizes(results: Results) -> Table:
    rows = [
        [
            name,
            str(size["histories"]),
            str(size["futures"]),
            f"{size['exponent']['estimate']:.3f} {_between(size['exponent'], '.3f')}",
            _number(size["rank"], "d"),
            _number(size["effective_rank"], ".1f"),
        ]
        for name, each in results["models"].items()
        for size in each["sizes"]
    ]
    return Table(
        "Over sizes",
        ["model", "histories", "futures", "exponent", "rank", "effective"],
        rows,
        "Of the matrix's leading parts.",
    )


def generation(model: str, found: Results) -> Table:
    steps = len(found["ways"][0]["kl_by_step"])
    shown = sorted({0, steps // 2, steps - 1})
    rows = []
    for way in found["ways"]:
        each = way["cumulative"]
        more = "" if way is found["ways"][0] else _signed(way["more"], "+.2f")
        by_step = [f"{way['kl_by_step'][step]:.3f}" for step in shown]
        rows.append(
            [way["name"], f"{each['estimate']:.2f} {_between(each, '.2f')}", more, *by_step]
        )
    fits = "; ".join(
        f"{fit['name']}: {fit['histories']} histories, ridge {fit['ridge']:g}, relative error "
        f"{fit['error']:.3f}" + (f", on held-out futures {fit['held_out_error']:.3f}")
        for fit in found["fits"]
    )
    return Table(
        f"Written by other prompts: {model}",
        ["way", f"KL over {steps} steps", "more", *(f"at step {step + 1}" for step in shown)],
        rows,
        f"Nats from the model to each way to tell its law, the mean over {found['targets']} target "
        f"prompts, with 95% intervals over them. {fits}. Of the contexts that are judged "
        f"{', '.join(f'{share:.0%}' for share in found['asked'][:4])} were query futures too, at "
        "steps 1 to 4.",
        words=("way",),
    )


def written(model: str, found: list[Results]) -> Table:
    rows = [
        [" ".join(each[key].split()) for key in ("target", "model", "combination")]
        for each in found
    ]
    header = ["after this prompt", "the model writes", "the linear combination writes"]
    note = "The likeliest token at every step; the combination reads other prompts only."
    return Table(f"What was written: {model}", header, rows, note, words=tuple(header))


def _between(found: Results, form: str) -> str:
    return f"[{found['low']:{form}}, {found['high']:{form}}]"


def _signed(found: Results, form: str) -> str:
    return f"{found['estimate']:{form}} {_between(found, form)}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
