"""`fastperturb eval`: compare models on texts.

    OUTPUT/results.json           every number, also per document; options, versions, commit
    OUTPUT/table.md               the same numbers as tables
    OUTPUT/evaluation.png         nll against the number of samples; differences with intervals
    OUTPUT/continuations.jsonl    the texts that models wrote, if they were asked to write

All models are scored on the same blocks under the same noise by the token marginal, and models that
were trained for the sequence marginal by that one too. `data.domains` reads
the texts, `models` finds and loads the models, `likelihood` scores, `report.bootstrap` makes
intervals over documents, and `writing` lets the models continue documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastperturb import runs
from fastperturb.data.domains import Domain, read
from fastperturb.eval import likelihood, models
from fastperturb.eval.likelihood import Likelihood
from fastperturb.eval.models import Place
from fastperturb.eval.options import EvalOptions, named
from fastperturb.model import PerturbedLM
from fastperturb.report import bootstrap


def run(options: EvalOptions) -> int:
    """Evaluate, write the output folder, print the tables, and return the exit status."""
    from fastperturb.eval import pictures
    from fastperturb.eval.tables import tables
    from fastperturb.eval.writing import Writing
    from fastperturb.report import table

    folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    places = [
        models.find(name, where, options.base)
        for name, where in named("models", options.models).items()
    ]
    tokenizer = models.common_tokenizer(places, trust_remote_code=options.trust_remote_code)
    locations = named("domains", options.domains)
    texts = [read(name, where, options, tokenizer) for name, where in locations.items()]
    validation = None
    if options.tune_on is not None:
        validation = read("tune_on", options.tune_on, options, tokenizer)
    writing = Writing(options, texts, tokenizer) if options.continuations else None

    descriptions: list[dict[str, Any]] = []
    measurements: list[Measurement] = []
    for place in places:
        lm = models.load(place, options)
        descriptions.append(_description(place, lm))
        with models.autocast(lm, options.precision):
            measurements += measure(place.name, lm, texts, validation, options)
            if likelihood.perturbs(lm) and not lm.has_one_draw:
                with lm.exact():
                    name = f"{place.name}, without noise"
                    measurements += measure(name, lm, texts, validation, options)
            if writing is not None:
                writing.add(place.name, lm)
        del lm  # free its memory before the next one is loaded

    reference = reference_of(measurements, options.baseline or places[0].name)
    results = {
        "models": descriptions,
        "domains": [_domain_facts(text, locations[text.name], reference) for text in texts],
        "unigram": {text.name: own_unigram(text, len(tokenizer)).to_dict() for text in texts},
        "measurements": [measurement.to_dict() for measurement in measurements],
        "reference": reference.heading(),
        "differences": [
            difference(measurement, reference, options.seed)
            for measurement in measurements
            if measurement is not reference
        ],
        "continuations": [] if writing is None else writing.evaluated(),
        "config": options.to_dict(),
        **runs.provenance(),
    }
    runs.write_json(folder / "results.json", results)
    shown = tables(results)
    (folder / "table.md").write_text(table.markdown(shown), encoding="utf-8")
    files = ["results.json", "table.md"]
    if pictures.draw(results, folder / "evaluation.png"):
        files.append("evaluation.png")
    if writing is not None:
        writing.save(folder / "continuations.jsonl")
        files.append("continuations.jsonl")
    table.show(shown)
    print(f"in {folder}: {', '.join(files)}")
    return 0


@dataclass(frozen=True)
class Measurement:
    """The likelihood of every domain under a model at one temperature.

    domains: under the token marginal, by which models are compared.
    by_sequence: under the sequence marginal; None for models that were not trained for it.
    """

    model: str
    temperature: float
    tuned: bool
    domains: Mapping[str, Likelihood]
    by_sequence: Mapping[str, Likelihood] | None = None

    def heading(self) -> dict[str, Any]:
        """Return what tells this measurement apart, as results.json holds it."""
        return {"model": self.model, "temperature": self.temperature, "tuned": self.tuned}

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.heading(),
            "domains": _plain(self.domains),
            "sequence_marginal": None if self.by_sequence is None else _plain(self.by_sequence),
        }


def measure(
    name: str,
    lm: PerturbedLM,
    texts: Sequence[Domain],
    validation: Domain | None,
    options: EvalOptions,
) -> list[Measurement]:
    """Score the texts at every requested temperature, and at the one tuned on a validation text."""
    settings: dict[str, Any] = {
        "num_samples": options.num_samples,
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    temperatures = [(temperature, False) for temperature in options.temperatures]
    if validation is not None:
        temperatures.append((likelihood.tuned_temperature(lm, validation, **settings), True))
    measurements = []
    for temperature, tuned in temperatures:
        marginals = ("token", "sequence") if likelihood.has_own_marginal(lm) else ("token",)
        by_marginal: dict[str, dict[str, Likelihood]] = {marginal: {} for marginal in marginals}
        for text in texts:
            for marginal, by_domain in by_marginal.items():
                result = likelihood.measure(
                    lm, text, **settings, temperature=temperature, marginal=marginal
                )
                by_domain[text.name] = result
                scored = f"{text.name}: perplexity {result.perplexity:.4g}, {marginal} marginal"
                print(f"{name}, T = {temperature:.3g}, {scored}", flush=True)
        by_token, by_sequence = by_marginal["token"], by_marginal.get("sequence")
        measurements.append(Measurement(name, temperature, tuned, by_token, by_sequence))
    return measurements


def _plain(domains: Mapping[str, Likelihood]) -> dict[str, Any]:
    return {name: likelihood.to_dict() for name, likelihood in domains.items()}


def reference_of(measurements: Sequence[Measurement], baseline: str) -> Measurement:
    """Return the baseline's measurement at its tuned temperature, or else the baseline's first."""
    own = [measurement for measurement in measurements if measurement.model == baseline]
    return next((measurement for measurement in own if measurement.tuned), own[0])


def difference(ours: Measurement, reference: Measurement, seed: int) -> dict[str, Any]:
    """Return the intervals of our nll minus the reference's: in each domain, and their mean."""
    pairs = {
        name: (likelihood.document_sums, reference.domains[name].document_sums)
        for name, likelihood in ours.domains.items()
    }
    mean = None
    if len(pairs) > 1:
        mean = bootstrap.mean_paired_difference(list(pairs.values()), seed=seed).to_dict()
    by_domain = {
        name: bootstrap.paired_difference(*pair, seed=seed).to_dict()
        for name, pair in pairs.items()
    }
    return {**ours.heading(), "domains": by_domain, "mean": mean}


def own_unigram(text: Domain, vocab_size: int) -> Likelihood:
    """Return the likelihood of a text under its own token frequencies: its unigram entropy."""
    counts = likelihood.label_counts(text.blocks, vocab_size)
    return likelihood.unigram(text, counts, smoothing=0.0)


def _description(place: Place, lm: PerturbedLM) -> dict[str, Any]:
    has_checkpoint = place.checkpoint is not None
    return {
        "name": place.name,
        "checkpoint": str(place.checkpoint) if has_checkpoint else None,
        "base": place.base,
        "perturbation": lm.config.to_dict() if has_checkpoint else None,
    }


def _domain_facts(text: Domain, where: str, measurement: Measurement) -> dict[str, Any]:
    labels = sum(measurement.domains[text.name].counts)
    documents = text.document_count
    return {"name": text.name, "where": where, "documents": documents, "labels": labels}
