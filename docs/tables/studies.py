"""Studies on real text: changes from plain LoRA, and the controls that a gain must beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs.tables.cells import read, spread, table

STUDIES = {
    "stories": "stories",
    "wikipedia": "wikipedia",
    "stories_20k": "stories, 20\u00a0k",
    "wikipedia_20k": "wikipedia, 20\u00a0k",
}
# (what a row shows, its method, what it is there for, how it is judged, whether tempered)
_ROWS = (
    ("plain LoRA, not tempered", "exact", "baseline", "as_trained", False),
    ("plain LoRA at the methods' rate", "exact", "learning_rate", "as_trained", True),
    ("noise added at evaluation", "exact", "baseline", "noise_added", True),
    (
        "plain LoRA, eight times the steps",
        "exact, compute x 8",
        "equal_compute",
        "as_trained",
        True,
    ),
    ("NEFTune", "neftune", "method", "as_trained", True),
    ("fixed noise", "fixed", "method", "as_trained", True),
    ("token edits", "discrete", "method", "as_trained", True),
    ("learned, `lowrank`", "lowrank", "method", "as_trained", True),
    ("its deterministic twin", "lowrank, deterministic", "deterministic", "as_trained", True),
    ("learned, `mlp`", "mlp", "method", "as_trained", True),
    ("its deterministic twin", "mlp, deterministic", "deterministic", "as_trained", True),
)
_CONTROLS = (
    ("the tempered baseline", "out_of_domain"),
    ("the tempered baseline", "in_domain"),
    ("noise added to the baseline at evaluation", "out_of_domain"),
    ("the baseline at its rate", "out_of_domain"),
    ("itself without noise", "out_of_domain"),
    ("its deterministic twin", "out_of_domain"),
    ("the baseline at equal compute", "out_of_domain"),
    ("the baseline at equal compute", "in_domain"),
)
_PLACES = {"in_domain": "in domain", "out_of_domain": "out of domain"}


def _file(study: str) -> str:
    return f"studies/{study}/results.json"


FILES = tuple(map(_file, STUDIES))


def _summary(study: str) -> dict[str, Any]:
    return read(_file(study))["summary"]


def gains() -> int:
    """Return in how many studies any method is a gain by the rule."""
    return sum(
        any(verdict["outcome"] == "gain" for verdict in _summary(study)["verdicts"])
        for study in STUDIES
    )


def changes(where: str) -> str:
    """Return each row's change of the nll from tempered plain LoRA, study by study."""
    summaries = [_summary(study) for study in STUDIES]
    rows = []
    for title, method, what, view, tuned in _ROWS:
        cells = []
        for summary in summaries:
            [row] = [
                row
                for row in summary["rows"]
                if (row["method"], row["what"], row["view"], row["tuned"])
                == (method, what, view, tuned)
            ]
            change = row["difference"][where]
            cells.append(spread(change["mean"], change["spread"], "+.3f"))
        rows.append([title, *cells])
    header = [f"change {_PLACES[where]}", *STUDIES.values()]
    return table(header, rows, *FILES)


def controls(method: str) -> str:
    """Return a method's difference from every control, study by study."""
    verdicts = [
        next(row for row in _summary(study)["verdicts"] if row["method"] == method)
        for study in STUDIES
    ]
    rows = []
    for control, where in _CONTROLS:
        cells = []
        for verdict in verdicts:
            differences = [
                spread(comparison["difference"], comparison["spread"], "+.3f")
                for comparison in verdict["comparisons"]
                if (comparison["control"], comparison["where"]) == (control, where)
            ]
            cells += differences or [""]
        rows.append([f"{control}, {_PLACES[where]}", *cells])
    rows.append(["verdict", *(verdict["outcome"] for verdict in verdicts)])
    return table([f"`{method}` beside", *STUDIES.values()], rows, *FILES)


def seeds() -> str:
    rows = []
    for study, title in STUDIES.items():
        results = read(_file(study))
        chosen = results["summary"]["chosen"]
        others = ", ".join(results["summary"]["out_of_domain"])
        rows.append([title, f"{len(results['seeds'])}", f"`{chosen}`", others])
    header = ["trained on", "seeds", "learned method that validation chose", "judged on"]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "studies-out-of-domain": lambda: changes("out_of_domain"),
    "studies-in-domain": lambda: changes("in_domain"),
    "studies-controls-mlp": lambda: controls("mlp"),
    "studies-controls-lowrank": lambda: controls("lowrank"),
    "studies-settings": seeds,
}
