"""The study's tables in Markdown, from what results.json holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastperturb.demo.language import NOISE_SD, REGIONS

HEADINGS = {
    "draws": ("Draws and equations", "M (telescopes: at most)"),
    "flops": ("All equations at equal flops", "batch"),
    "fixed": ("Fixed noise", "scale"),
    "latent": ("Latent dimension", "R"),
    "size": ("Training pairs", "pairs"),
    "noise": ("The truth's noise, free trunk", "true sd"),
    "held_draws": ("Trunk held at the truth: draws and equations", "M"),
    "held_noise": ("Trunk held at the truth: the truth's noise", "true sd"),
    "held_size": ("Trunk held at the truth: training pairs", "pairs"),
}
TITLES = {"in_support": "in support", "band1": "band 1", "band2": "band 2"}


def render(results: dict[str, Any]) -> str:
    """All of it."""
    parts = [
        "# The synthetic study",
        f"{len(results['seeds'])} seeds; ± is half of a 95% t-interval of the mean over seeds. "
        "KL: KL(truth \\|\\| model); nll: KL and the truth's entropy. Movement: sd of the noise "
        f"along the noisy and the precise axis (truth {NOISE_SD:g} / 0 unless said). "
        f"{results['device']}; commit {results['commit']}.",
    ]
    for experiment, (title, x) in HEADINGS.items():
        chosen = [row for row in results["rows"] if row["experiment"] == experiment]
        if chosen:
            parts += [f"## {title}", trained(chosen, results["baselines"], x)]
    for title, pairs in results["comparisons"].items():
        parts += [f"## KL ratios: {title}", compared(pairs)]
    parts += ["## Bias, by finite sums", bias(results["bias"])]
    parts += ["## Coverage of 95% intervals", coverage(results["coverage"])]
    return "\n\n".join(parts) + "\n"


def trained(rows: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]], x: str) -> str:
    """One experiment: its arms, and below them what stands beside their truths and samples."""
    header = ["method", x, "draws"]
    header += [f"KL {TITLES[name]}" for name in REGIONS]
    header += [f"nll {TITLES[name]}" for name in REGIONS]
    header += ["moves noisy", "precise"]
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
    settings = {str(truth(row["setting"])) for row in rows}
    for baseline in baselines:
        if str(truth(baseline["setting"])) in settings:
            lines += beside(baseline, alone=len(settings) == 1)
    return markdown(header, lines)


def truth(setting: dict[str, Any]) -> dict[str, Any]:
    """What of a setting the baselines depend on: not the batch."""
    return {name: value for name, value in setting.items() if name != "batch"}


def beside(baseline: dict[str, Any], *, alone: bool) -> list[list[str]]:
    """Rows of the unigram, the entropy and the held trunk without noise or at its likeliest."""
    setting, lines = baseline["setting"], []
    pairs = plain(setting["pairs"])
    where = "" if alone else f" (sd {setting['noise_sd']:g}, {pairs} pairs)"
    for name, entry in (("unigram", "unigram"), ("exact prefix, true trunk", "exact")):
        if entry in baseline:
            kl, entropy = baseline[entry], baseline["entropy"]
            nll = [f"{kl[r]['mean'] + entropy[r]['mean']:.3f}" for r in REGIONS]
            cells = [spread(kl[r], 4 if r == "in_support" else 3) for r in REGIONS]
            lines.append([f"*{name}*{where}", "", "", *cells, *nll])
    entropies = [spread(baseline["entropy"][name], 3) for name in REGIONS]
    lines.append([f"*the truth (entropy)*{where}", "", "", "0", "0", "0", *entropies])
    if "most_likely_sd" in baseline:
        found = spread(baseline["most_likely_sd"], 3)
        lines.append([f"*exact likelihood's sd*{where}", *[""] * 8, found])
    return lines


def compared(pairs: Iterable[dict[str, Any]]) -> str:
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
    rows = list(rows)
    draws = sorted({row["num_samples"] for row in rows})
    header = ["equation", "of", *(f"M = {M}" for M in draws)]
    lines = []
    parts: dict[str, Callable[[float], str]] = {
        "value": lambda x: f"{x:+.4f}" if abs(x) > 1e-12 else "0",
        "gradient": lambda x: f"{x:.4f}" if x > 1e-12 else "0",
        "solution": lambda x: f"{x:.3f}",
    }
    for equation in dict.fromkeys(row["equation"] for row in rows):
        for part, shown in parts.items():
            by_draws = {r["num_samples"]: r[part] for r in rows if r["equation"] == equation}
            lines.append(
                [equation, part, *(shown(by_draws[M]) if M in by_draws else "" for M in draws)]
            )
    return markdown(header, lines)


def coverage(rows: Iterable[dict[str, Any]]) -> str:
    header = [
        "equation",
        "n",
        "solved",
        "covered, information",
        "covered, outer",
        "error / spread, information",
        "outer",
        "bias",
        "rmse sqrt(n)",
        "library's errors: replications, covered, furthest from the closed form",
    ]
    lines = []
    for row in rows:
        both = ("information", "outer")
        library = row["library"]
        covered = "/".join(f"{value:.1%}" for value in library["coverage"].values())
        furthest = max(library["largest_difference"].values())
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
                f"{library['replications']}, {covered}, {furthest:.1e}",
            ]
        )
    return markdown(header, lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    full = [[*line, *[""] * (len(header) - len(line))] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *full))


def spread(value: dict[str, float], digits: int) -> str:
    return f"{value['mean']:.{digits}f} ± {value['high'] - value['mean']:.{digits}f}"


def bracket(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def plain(value: float | None) -> str:
    return "fresh" if value is None else f"{value:,g}" if value < 1000 else f"{value:,.0f}"
