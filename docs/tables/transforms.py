"""Transforms: what a context learned, where it wins, and the cost of R and T."""

from __future__ import annotations

from collections.abc import Callable

from docs.tables.cells import interval, ratio, read, spread, table
from docs.tables.speed import median
from docs.tables.synthetic import REGIONS

_SHIFT, _SYNTHETIC = "context_shift/results.json", "synthetic_context/results.json"
_COST, _STUDY = "perturb_embed_cpu.json", "studies/context/results.json"
FILES = (_SHIFT, _SYNTHETIC, _COST, _STUDY)
_TRUTHS = {
    "context": "by context, batch 256",
    "context_large": "by context, batch 1,024",
    "context_seen": "by context, seen by the net",
    "no_context": "the same for all, batch 256",
}
_SHOWN = [(what, "as_trained") for what in ("method", "deterministic", "equal_compute")]
_GROWTH = ((16, 512), (64, 512), (256, 512), (16, 8192))


def shift() -> str:
    """Return the shifts of a trained context transform, over tokens and within one token."""
    results = read(_SHIFT)
    names = ("mean", "sd", "sd_within_a_token")
    cells = [f"{results['tokens']:,}", *(f"{results[name]:.3f}" for name in names)]
    header = ["tokens", "mean shift", "sd", "sd among places of the same token"]
    return table(header, [cells], _SHIFT)


def synthetic() -> str:
    """Return KL by the truth's noise and transform, and context's ratio to the others."""
    results, rows = read(_SYNTHETIC), []
    for row in results["rows"]:
        cells = []
        for region, (_, form) in REGIONS.items():
            kl = row["kl"][region]
            cells.append(spread(kl["mean"], kl["high"] - kl["mean"], form))
        rows.append([_TRUTHS[row["experiment"]], row["line"], *cells])
    [blind] = {
        tuple(f"{baseline['blind'][name]['mean']:{form}}" for name, (_, form) in REGIONS.items())
        for baseline in results["baselines"]
        if "blind" in baseline and baseline["setting"]["seen"] == 2
    }
    rows.append(["by context", "*the best that is blind to the first token*", *blind])
    header = ["the truth's noise", "transform", *(f"KL {title}" for title, _ in REGIONS.values())]
    return table(header, rows, _SYNTHETIC)


def ratios() -> str:
    """Return the ratios of KL of context over the others on the same seeds."""
    rows = []
    for title, pairs in read(_SYNTHETIC)["comparisons"].items():
        for pair in pairs:
            if pair["ours"].startswith("context"):
                other = pair["theirs"].partition(",")[0].replace("learned", "lowrank")
                cells = [interval(pair["ratio"][name], ".2f", middle="mean") for name in REGIONS]
                rows.append([title, other, *cells])
    header = ["truth", "KL of context over", *(title for title, _ in REGIONS.values())]
    return table(header, rows, _SYNTHETIC)


def study() -> str:
    """Return the change of the nll from tempered plain LoRA on real text, by method."""
    rows = []
    for row in read(_STUDY)["summary"]["rows"]:
        if not row["tuned"] or (row["what"], row["view"]) not in _SHOWN:
            continue
        changes = (row["difference"][where] for where in ("in_domain", "out_of_domain"))
        cells = [spread(change["mean"], change["spread"], "+.3f") for change in changes]
        rows.append([row["method"], *cells])
    return table(["method", "in domain", "out of domain"], rows, _STUDY)


def growth() -> str:
    """Return the time of a forward and backward by R and T, over that of the first row."""
    results, rows = read(_COST), []

    def time(family: str, R: int, T: int) -> float:
        where = {"family": family, "R": R, "T": T, "M": 8, "B": 1, "D": 1024}
        return median(results, "cpp", "milliseconds", **where)

    least = time("lowrank", *_GROWTH[0])
    for R, T in _GROWTH:
        lowrank, context = (time(family, R, T) for family in ("lowrank", "context"))
        rows.append(
            [str(R), f"{T:,}", *map(ratio, (lowrank / least, context / least, context / lowrank))]
        )
    header = ["R", "T", "`lowrank`", "`context`, with its state", "context / lowrank"]
    return table(header, rows, _COST)


TABLES: dict[str, Callable[[], str]] = {
    "context-shift": shift,
    "context-synthetic": synthetic,
    "context-ratios": ratios,
    "context-study": study,
    "perturb-embed-growth": growth,
}
