"""A study's report in Markdown: the verdicts, then the numbers, then how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastperturb.eval.likelihood import at_bound
from fastperturb.report.bootstrap import FEW_DOCUMENTS
from fastperturb.report.table import aligned, bracketed
from fastperturb.study.verdict import GAIN

Row = Mapping[str, Any]
Cells = list[str]

_HEADINGS = [
    "model",
    "T",
    "samples",
    "steps",
    "compute",
    "in domain",
    "out of domain",
    "change in domain",
    "change out of domain",
]
# Rows that are also shown at temperature 1; controls are shown tempered only.
_SHOWN_UNTEMPERED = ("unigram_own", "unigram_training", "untrained", "baseline", "method")
_NAMES = {
    "unigram_own": "unigram of the text itself",
    "unigram_training": "unigram of the training text",
    "untrained": "{method}, untrained",
    "baseline": "**{method}** (baseline)",
    "learning_rate": "· at rate {learning_rate:.3g}",
    "equal_compute": "· {method}",
    "method": "**{method}**",
    "deterministic": "· deterministic twin",
}
_VIEWS = {"noise_added": "· noise of {scale:g} added", "without_noise": "· without noise"}


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report of a study's results, which must hold their summary."""
    summary = results["summary"]
    shown = [row for row in summary["rows"] if _is_shown(row)]
    parts = [
        f"# Trained on {summary['in_domain']}, judged on {_count(summary['out_of_domain'])}",
        _headline(summary),
        "\n".join(f"- {verdict['sentence']}" for verdict in summary["verdicts"]),
        "## Negative log-likelihood of a token",
        aligned([_HEADINGS, *(_cells(row, summary) for row in shown)]),
        "## By domain, tempered",
        aligned(_by_domain(shown, summary)),
        "## How to read it",
        _reading(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(summary: Mapping[str, Any]) -> str:
    chosen = summary["chosen"]
    if chosen is None:
        return "No method with a learned perturbation was trained."
    [verdict] = [verdict for verdict in summary["verdicts"] if verdict["chosen"]]
    [row] = [row for row in summary["rows"] if row["method"] == chosen and _is_main(row)]
    inside, outside = (row["difference"][where] for where in ("in_domain", "out_of_domain"))
    uncertain = verdict["outcome"] == GAIN and verdict["uncertain"]
    outcome = verdict["outcome"].capitalize() + (", uncertain over documents," * bool(uncertain))
    text = (
        f"**{outcome}** for {chosen}, the learned method that in-domain validation prefers: "
        f"tempered, its nll out of domain is {row['out_of_domain']:.3f}"
    )
    if outside is None:
        return f"{text}."
    return (
        f"{text}, {_change(outside)} from that of {summary['baseline']['method']}, tempered and at "
        f"its best rate; in domain {_change(inside)}."
    )


def _is_main(row: Row) -> bool:
    return row["what"] == "method" and row["view"] == "as_trained" and row["tuned"]


def _is_shown(row: Row) -> bool:
    if row["view"] == "as_trained":
        return row["tuned"] or row["what"] in _SHOWN_UNTEMPERED
    # The baseline's best rate has a row of its own.
    return row["tuned"] and row["what"] != "learning_rate"


def _cells(row: Row, summary: Mapping[str, Any]) -> Cells:
    changes = row["difference"] or {"in_domain": None, "out_of_domain": None}
    inside, outside = changes["in_domain"], changes["out_of_domain"]
    return [
        _name(row, summary),
        "" if row["what"].startswith("unigram") else _temperature(row),
        f"{row['draws']:.3g}" if "draws" in row else "",
        f"{row['steps']:.0f}" if "steps" in row else "",
        f"{row['compute']:.2g}x" if "compute" in row else "",
        f"{row['in_domain']:.3f}",
        f"{row['out_of_domain']:.3f}",
        _with_spread(inside) if inside else "",
        _change(outside) if outside else "",
    ]


def _temperature(row: Row) -> str:
    ends = " (bound)" if row["tuned"] and at_bound(row["temperature"]) else ""
    return f"{row['temperature']:.3g}{ends}"


def _name(row: Row, summary: Mapping[str, Any]) -> str:
    if row["view"] in _VIEWS:
        return _VIEWS[row["view"]].format(scale=summary["judging"]["noise_scale"])
    name = _NAMES[row["what"]].format(**row)
    if row["what"] == "method" and row["method"] == summary["chosen"]:
        name += " (chosen)"
    if row["tuned"] and row["what"] in _SHOWN_UNTEMPERED:
        name += ", tempered"
    return name


def _by_domain(shown: Sequence[Row], summary: Mapping[str, Any]) -> list[Cells]:
    """Return the nll without a perturbation, and below it the changes of each method."""
    domains = [summary["in_domain"], *summary["out_of_domain"]]
    lines = [["model", *domains]]
    for row in shown:
        if row["what"] in _SHOWN_UNTEMPERED and row["what"] != "method":
            levels = [f"{row['domains'][name]:.3f}" for name in domains]
            lines.append([_name(row, summary), *levels])
    for row in shown:
        if _is_main(row):
            changes = [row["difference"]["domains"][name] for name in domains]
            marked = ["" if c is None else _with_spread(c) + _mark(c) for c in changes]
            lines.append([_name(row, summary), *marked])
    return lines


def _mark(change: Mapping[str, Any]) -> str:
    return "" if change["low"] <= 0 <= change["high"] else "*"


def _change(change: Mapping[str, Any]) -> str:
    if _is_nothing(change):
        return "0"
    return f"{_with_spread(change)} {bracketed(change, '+.4f')}"


def _with_spread(change: Mapping[str, Any]) -> str:
    if _is_nothing(change):
        return "0"
    spread = "" if change["spread"] is None else f" ± {change['spread']:.4f}"
    return f"{change['mean']:+.4f}{spread}"


def _is_nothing(change: Mapping[str, Any]) -> bool:
    """Tell if this is the difference of the tempered baseline from itself."""
    return change["low"] == change["high"] == 0 and not change["spread"]


def _reading(summary: Mapping[str, Any]) -> str:
    baseline, judging = summary["baseline"]["method"], summary["judging"]
    documents = ", ".join(
        f"{name} {count}{' (few)' if count < FEW_DOCUMENTS else ''}"
        for name, count in summary["documents"].items()
    )
    return "\n".join(
        [
            f"- nll in nats per token, lower is better; out of domain is the mean over "
            f"{_count(summary['out_of_domain'])}. Documents: {documents}.",
            f"- Changes are from {baseline}, tempered, at the rate and step that in-domain "
            "validation prefers: mean ± standard deviation over seeds [95% interval over "
            "documents; * if it excludes 0].",
            "- T divides the logits. Tempered means: at the T that in-domain validation prefers, "
            "for each model its own. Controls (·) are tempered.",
            f"- Perturbed models are evaluated with {judging['draws']} samples, which leaves an "
            f"nll a Monte-Carlo error of {judging['largest_error']:.4f} at most.",
            "- compute: samples times tokens of the training, relative to the baseline's.",
            "- A gain is below every control out of domain, all of them tempered, by more than "
            "twice the standard deviation of that difference, with no cost seen in domain, at "
            "equal steps and at equal compute. Few seeds estimate that deviation poorly: with "
            "two, one comparison in nine passes by chance.",
            "- Rates and steps are chosen at T = 1. Seeds change adapters, order and noise, not "
            "the texts.",
        ]
    )


def _count(domains: Sequence[str]) -> str:
    return f"{len(domains)} other domain{'s' if len(domains) > 1 else ''}"
