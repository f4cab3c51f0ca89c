"""An evaluation's tables, from the content of its results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastperturb.eval.likelihood import Likelihood, at_bound
from fastperturb.report.bootstrap import FEW_DOCUMENTS
from fastperturb.report.table import Table, bracketed

Results = Mapping[str, Any]


def tables(results: Results) -> list[Table]:
    """Return every table that has rows."""
    parts = (texts, perplexities, differences, monte_carlo, sequence_marginals, continuations)
    return [table for part in parts if (table := part(results)).rows]


def texts(results: Results) -> Table:
    """Return the domains with their numbers of documents and labels."""
    rows, some_are_few = [], False
    for domain in results["domains"]:
        is_few = domain["documents"] < FEW_DOCUMENTS
        some_are_few = some_are_few or is_few
        documents = f"{domain['documents']} (few)" if is_few else str(domain["documents"])
        rows.append([domain["name"], documents, f"{domain['labels']:,}", domain["where"]])
    note = "Labels are the tokens that are predicted."
    if some_are_few:
        note += " Intervals over so few documents are too narrow to trust."
    return Table("Texts", ["domain", "documents", "labels", "read from"], rows, note)


def perplexities(results: Results) -> Table:
    """Return the perplexity of every domain under every model and temperature."""
    names = [domain["name"] for domain in results["domains"]]
    own = [f"{Likelihood.from_dict(results['unigram'][name]).perplexity:.4g}" for name in names]
    rows = [["unigram of the text itself", "", "", *own, ""]]
    for measurement in results["measurements"]:
        likelihoods = [Likelihood.from_dict(measurement["domains"][name]) for name in names]
        speeds = [likelihood.tokens_per_second or 0.0 for likelihood in likelihoods]
        rows.append(
            [
                measurement["model"],
                _temperature(measurement),
                str(likelihoods[0].num_samples),
                *(f"{likelihood.perplexity:.4g}" for likelihood in likelihoods),
                f"{sum(speeds) / len(speeds):,.0f}",
            ]
        )
    return Table(
        "Perplexity of a token",
        ["model", "T", "samples", *names, "labels/s"],
        rows,
        "T divides the logits. A tuned T marked (bound) lies at an end of the searched range: the "
        "best one may lie beyond. The unigram knows the text's own token frequencies and no "
        "context.",
    )


def differences(results: Results) -> Table:
    """Return the difference of every model from the reference, in each domain and on average."""
    names = [domain["name"] for domain in results["domains"]]
    rows = []
    for name in [*names, None] if len(names) > 1 else names:
        for difference in results["differences"]:
            change = difference["mean"] if name is None else difference["domains"][name]
            interval = bracketed(change, "+.4f")
            if change["documents"] < FEW_DOCUMENTS:
                interval += " (few)"
            estimate = f"{change['estimate']:+.4f}"
            temperature = _temperature(difference)
            rows.append([name or "mean", difference["model"], temperature, estimate, interval])
    reference = results["reference"]
    return Table(
        f"Change of the nll against {reference['model']} at T = {_temperature(reference)}",
        ["domain", "model", "T", "change", "95% interval"],
        rows,
        "In nats per token: below 0 is better. Intervals are over documents, resampled in pairs; "
        "they do not cover the variation between training seeds.",
    )


def monte_carlo(results: Results) -> Table:
    """Return the Monte-Carlo error of every model that has samples, and the jackknife."""
    rows = []
    for measurement in results["measurements"]:
        for name, values in measurement["domains"].items():
            likelihood = Likelihood.from_dict(values)
            if likelihood.standard_error is None:
                continue
            heading = [name, measurement["model"], _temperature(measurement)]
            rows.append([*heading, *_precision(likelihood)])
    return Table(
        "Were there enough samples?",
        ["domain", "model", "T", "nll ± error", "jackknife", "half the samples", "effective"],
        rows,
        "The error is the Monte-Carlo error of the samples alone. The jackknife removes the bias "
        "that too few samples add to the nll. Where half the samples give another nll, raise "
        "num_samples.",
    )


def sequence_marginals(results: Results) -> Table:
    """Return both marginals of every model that was trained for the sequence marginal."""
    rows = []
    for measurement in results["measurements"]:
        for name, values in (measurement.get("sequence_marginal") or {}).items():
            by_token = Likelihood.from_dict(measurement["domains"][name])
            by_sequence = Likelihood.from_dict(values)
            heading = [name, measurement["model"], _temperature(measurement)]
            rows.append([*heading, _nll_with_error(by_token), *_precision(by_sequence)])
    return Table(
        "Models of the sequence marginal under both marginals",
        [
            *("domain", "model", "T", "token marginal", "sequence marginal"),
            *("jackknife", "half the samples", "effective"),
        ],
        rows,
        "The nll of a token ± its Monte-Carlo error. The token marginal averages the probability "
        "of each token over the samples; the sequence marginal, for which these models were "
        "trained, that of a whole sequence: the part of a document that lies in one block. The "
        "last three columns are of the sequence marginal. With few effective samples its nll is "
        "too high and its error too small.",
    )


def continuations(results: Results) -> Table:
    """Return how the continuations of every model compare with the text itself."""
    rows = []
    with_mauve = any(row["mauve"] is not None for row in results["continuations"])
    for entry in results["continuations"]:
        overlap = ""
        if entry["rouge1"] is not None:
            overlap = f"{entry['rouge1']['estimate']:.3f} {bracketed(entry['rouge1'], '.3f')}"
        distinct = " ".join(_share(entry[f"distinct{n}"]) for n in (1, 2, 3))
        row = [f"{entry['domain']} ({entry['documents']})", entry["model"] or "the text itself"]
        row += [overlap, distinct, _share(entry["repetition"])]
        rows.append(row + ([_share(entry["mauve"])] if with_mauve else []))
    header = ["domain", "written by", "ROUGE-1", "distinct-1 -2 -3", "repetition"]
    return Table(
        "Continuations",
        [*header, *(["MAUVE"] if with_mauve else [])],
        rows,
        "In brackets after a domain: its number of documents. ROUGE-1 is the overlap in words "
        "with the true continuation, with its 95% interval over documents; distinct-n is the "
        "share of different n-grams among all continuations; repetition is the share of 4-grams "
        "that came before in the same continuation. Closer to the text itself is better.",
    )


def _nll_with_error(likelihood: Likelihood) -> str:
    if likelihood.standard_error is None:
        return f"{likelihood.nll:.4f}"
    return f"{likelihood.nll:.4f} ± {likelihood.standard_error:.4f}"


def _precision(likelihood: Likelihood) -> list[str]:
    """Return the nll with its error, its jackknife, the nll of half the samples, and their ess.

    Half the samples are the last number of samples of the curve but one: half or a little more.
    """
    half = likelihood.curve["nll"][-2:-1]
    return [
        _nll_with_error(likelihood),
        f"{likelihood.jackknife:.4f}",
        f"{half[0]:.4f}" if half else "",
        "" if likelihood.ess is None else f"{likelihood.ess:.1f}",
    ]


def _temperature(measurement: Mapping[str, Any]) -> str:
    temperature = measurement["temperature"]
    if not measurement["tuned"]:
        return f"{temperature:.3g}"
    return f"{temperature:.3g} tuned{' (bound)' if at_bound(temperature) else ''}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
