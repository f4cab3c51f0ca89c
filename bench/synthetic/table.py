"""The study's tables in Markdown, from the content of results.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.synthetic import context, sampling
from bench.synthetic.summary import TITLES
from fastperturb.demo.language import NOISE_SD, REGIONS

# For each experiment: the title of its table, and the heading of x.
HEADINGS = {
    "draws": ("Samples and estimators", "M (telescopes: at most)"),
    "flops": ("All estimators at equal flops", "batch"),
    "fixed": ("Fixed noise", "scale"),
    "latent": ("Latent dimension", "R"),
    "size": ("Training pairs", "pairs"),
    "noise": ("The truth's noise, free trunk", "true sd"),
    "held_draws": ("Trunk held at the truth: samples and estimators", "M"),
    "held_noise": ("Trunk held at the truth: the truth's noise", "true sd"),
    "held_size": ("Trunk held at the truth: training pairs", "pairs"),
    **sampling.HEADINGS,
    **context.HEADINGS,
}
_BASELINES = (
    ("unigram", "unigram"),
    ("exact prefix, true trunk", "exact"),
    ("the best that is blind to the first token", "blind"),
)
COMPARISONS = {"few draws": "few samples"}  # keys of results, where the title says it otherwise


def render(results: dict[str, Any]) -> str:
    """Return the whole of table.md."""
    parts = [
        "# The synthetic study",
        f"{len(results['seeds'])} seeds; ± is half of a 95% t-interval of the mean over seeds. "
        "KL: KL(truth \\|\\| model); nll: KL plus the truth's entropy. Shift: standard deviation "
        f"along the noisy and the precise axis (truth {NOISE_SD:g} / 0 unless stated). "
        f"{results['device']}; commit {results['commit']}.",
    ]
    for experiment, (title, x) in HEADINGS.items():
        chosen = [row for row in results["rows"] if row["experiment"] == experiment]
        if chosen:
            parts += [f"## {title}", trained(chosen, results["baselines"], x)]
    for title, pairs in results["comparisons"].items():
        parts += [f"## KL ratios: {COMPARISONS.get(title, title)}", compared(pairs)]
    if "bias" in results:
        parts += ["## Bias, by finite sums", bias(results["bias"])]
    if "coverage" in results:
        parts += ["## Coverage of 95% intervals", coverage(results["coverage"])]
    return "\n\n".join(parts) + "\n"


def trained(rows: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]], x: str) -> str:
    """Return the table of one experiment: its arms, and below them the baselines."""
    header = ["method", x, "samples"]
    header += [f"KL {TITLES[name]}" for name in REGIONS]
    header += [f"nll {TITLES[name]}" for name in REGIONS]
    header += ["shift, noisy", "shift, precise"]
    lines = [
        [
            row["line"],
            plain(row["x"]),
            f"{row['draws']:.3g}",
            *(spread(row["kl"][name], 4 if name == "in_support" else 3) for name in REGIONS),
            *(spread(row["nll"][name], 3) for name in REGIONS),
            *(spread(row["movement"][axis], 3) for axis in row.get("movement", ())),
        ]
        for row in rows
    ]
    settings = {str(without_batch(row["setting"])) for row in rows}
    for baseline in baselines:
        if str(without_batch(baseline["setting"])) in settings:
            lines += baseline_lines(baseline, alone=len(settings) == 1)
    return markdown(header, lines)


def without_batch(setting: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a setting that baselines depend on."""
    return {name: value for name, value in setting.items() if name != "batch"}


def baseline_lines(baseline: dict[str, Any], *, alone: bool) -> list[list[str]]:
    """Return the lines of the unigram, the truth and the held trunk.

    alone: True where the table has one setting only, which the lines then need not name.
    """
    setting, lines = baseline["setting"], []
    pairs = plain(setting["pairs"])
    where = "" if alone else f" (sd {setting['noise_sd']:g}, {pairs} pairs)"
    for name, entry in _BASELINES:
        if entry in baseline:
            kl, entropy = baseline[entry], baseline["entropy"]
            nll = [f"{kl[r]['mean'] + entropy[r]['mean']:.3f}" for r in REGIONS]
            cells = [spread(kl[r], 4 if r == "in_support" else 3) for r in REGIONS]
            lines.append([f"*{name}*{where}", "", "", *cells, *nll])
    entropies = [spread(baseline["entropy"][name], 3) for name in REGIONS]
    lines.append([f"*the truth (entropy)*{where}", "", "", "0", "0", "0", *entropies])
    if "most_likely_sd" in baseline:
        most_likely = spread(baseline["most_likely_sd"], 3)
        lines.append([f"*exact likelihood's sd*{where}", *[""] * 8, most_likely])
    return lines


def compared(pairs: Iterable[dict[str, Any]]) -> str:
    """Return the table of one list of comparisons."""
    header = ["ours", "over", *TITLES.values(), "intervals apart"]
    return markdown(
        header,
        [
            [
                pair["ours"],
                pair["theirs"],
                *(bracket(pair["ratio"][name]) for name in REGIONS),
                ", ".join(
                    f"{where} {TITLES[name]}" for name, where in pair["apart"].items() if where
                )
                or "nowhere",
            ]
            for pair in pairs
        ],
    )


def bias(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table of biases."""
    rows = list(rows)
    samples = sorted({row["num_samples"] for row in rows})
    header = ["estimator", "of", *(f"M = {M}" for M in samples)]
    lines = []
    parts: dict[str, Callable[[float], str]] = {
        "value": lambda x: f"{x:+.4f}" if abs(x) > 1e-12 else "0",
        "gradient": lambda x: f"{x:.4f}" if x > 1e-12 else "0",
        "solution": lambda x: f"{x:.3f}",
    }
    for estimator in dict.fromkeys(row["equation"] for row in rows):
        for part, shown in parts.items():
            by_M = {r["num_samples"]: r[part] for r in rows if r["equation"] == estimator}
            lines.append([estimator, part, *(shown(by_M[M]) if M in by_M else "" for M in samples)])
    return markdown(header, lines)


def coverage(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table of the coverage of intervals."""
    header = [
        "estimator",
        "n",
        "solved",
        "covered, information",
        "covered, outer",
        "error / spread, information",
        "outer",
        "bias",
        "rmse sqrt(n)",
        "library's errors: replications, covered, largest difference from closed form",
    ]
    lines = []
    for row in rows:
        both = ("information", "outer")
        library = row["library"]
        covered = "/".join(f"{value:.1%}" for value in library["coverage"].values())
        largest = max(library["largest_difference"].values())
        lines.append(
            [
                row["name"],
                plain(row["examples"]),
                plain(row["replications"]),
                *(f"{row['coverage'][b]:.1%}" if b in row["coverage"] else "" for b in both),
                *(
                    f"{row['error_over_spread'][b]:.2f}" if b in row["coverage"] else ""
                    for b in both
                ),
                f"{row['bias']:.3f}",
                f"{row['rmse'] * row['examples'] ** 0.5:.2f}",
                f"{library['replications']}, {covered}, {largest:.1e}",
            ]
        )
    return markdown(header, lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; lines may be shorter than the header."""
    full = [[*line, *[""] * (len(header) - len(line))] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *full))


def spread(value: dict[str, float], digits: int) -> str:
    """Return "mean ± half of the interval"."""
    return f"{value['mean']:.{digits}f} ± {value['high'] - value['mean']:.{digits}f}"


def bracket(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def plain(value: float | None) -> str:
    return "fresh" if value is None else f"{value:,g}" if value < 1000 else f"{value:,.0f}"
