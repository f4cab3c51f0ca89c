"""The error of a row's log marginal, by proposal and number of samples."""

from __future__ import annotations

from docs.tables.cells import read, table

FILES = (_FILE,) = ("proposal/results.json",)


def errors() -> str:
    """Return the root mean square error in nats, and the effective samples."""
    rows = []
    for row in read(_FILE)["rows"]:
        proposal = row["proposal"]
        if row["steps"]:
            proposal += f", {row['steps']} step" + "s" * (row["steps"] > 1)
        rows.append(
            [
                proposal,
                str(row["samples"]),
                f"{row['root_mean_square_error']:.1f}",
                f"{row['mean_error']:+.1f}",
                f"{row['effective_samples']:.1f}",
            ]
        )
    header = ["proposal", "M", "root mean square error, nats", "mean error", "effective samples"]
    return table(header, rows, _FILE)


TABLES = {"proposal": errors}
