"""`fastperturb eval`: models and texts in; how likely, how sure, and who differs from whom out.

    OUTPUT/results.json           every number, of each document too, and options, versions, commit
    OUTPUT/table.md               the same to be read
    OUTPUT/evaluation.png         the nll against draws, and the differences with their intervals
    OUTPUT/continuations.jsonl    what the models wrote, where they were asked to

All models are judged on the same blocks under the same noise, token by token: `domains` reads the
texts, `models` finds and loads, `likelihood` measures, `bootstrap` makes intervals over documents,
`continuations` lets the models write.
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
    from fastperturb.eval import pictures, table
    from fastperturb.eval.writing import Writing

    folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    places = [models.find(*each, options.base) for each in named("models", options.models).items()]
    tokenizer = models.common_tokenizer(places, trust_remote_code=options.trust_remote_code)
    where = named("domains", options.domains)
    texts = [read(name, each, options, tokenizer) for name, each in where.items()]
    validation = None
    if options.tune_on is not None:
        validation = read("tune_on", options.tune_on, options, tokenizer)
    writing = Writing(options, texts, tokenizer) if options.continuations else None

    told: list[dict[str, Any]] = []
    measured: list[Measured] = []
    for place in places:
        lm = models.load(place, options)
        told.append(_told(place, lm))
        with models.autocast(lm, options.precision):
            measured += measure(place.name, lm, texts, validation, options)
            if likelihood.moves(lm) and not lm.has_one_draw:
                with lm.exact():
                    still = f"{place.name}, without noise"
                    measured += measure(still, lm, texts, validation, options)
            if writing is not None:
                writing.add(place.name, lm)
        del lm  # before the next one is loaded

    reference = reference_of(measured, options.baseline or places[0].name)
    results = {
        "models": told,
        "domains": [_counted(text, where[text.name], reference) for text in texts],
        "unigram": {text.name: own_unigram(text, len(tokenizer)).to_dict() for text in texts},
        "measurements": [each.to_dict() for each in measured],
        "reference": reference.heading(),
        "differences": [
            difference(each, reference, options.seed) for each in measured if each is not reference
        ],
        "continuations": [] if writing is None else writing.judged(),
        "config": options.to_dict(),
        **runs.provenance(),
    }
    runs.write_json(folder / "results.json", results)
    found = table.tables(results)
    (folder / "table.md").write_text(table.markdown(found), encoding="utf-8")
    written = ["results.json", "table.md"]
    if pictures.draw(results, folder / "evaluation.png"):
        written.append("evaluation.png")
    if writing is not None:
        writing.save(folder / "continuations.jsonl")
        written.append("continuations.jsonl")
    table.show(found)
    print(f"in {folder}: {', '.join(written)}")
    return 0


@dataclass(frozen=True)
class Measured:
    """A model at a temperature, on every domain."""

    model: str
    temperature: float
    tuned: bool
    domains: Mapping[str, Likelihood]

    def heading(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "tuned": self.tuned}

    def to_dict(self) -> dict[str, Any]:
        found = {name: each.to_dict() for name, each in self.domains.items()}
        return {**self.heading(), "domains": found}


def measure(
    name: str,
    lm: PerturbedLM,
    texts: Sequence[Domain],
    validation: Domain | None,
    options: EvalOptions,
) -> list[Measured]:
    """A model at every temperature that was asked for, and at its own if there is a validation."""
    how: dict[str, Any] = {
        "num_samples": options.num_samples,
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    wanted = [(temperature, False) for temperature in options.temperatures]
    if validation is not None:
        wanted.append((likelihood.tuned_temperature(lm, validation, **how), True))
    found = []
    for temperature, tuned in wanted:
        by_domain = {}
        for text in texts:
            by_domain[text.name] = each = likelihood.measure(
                lm, text, **how, temperature=temperature
            )
            reached = f"{text.name}: perplexity {each.perplexity:.4g}"
            print(f"{name}, T = {temperature:.3g}, {reached}", flush=True)
        found.append(Measured(name, temperature, tuned, by_domain))
    return found


def reference_of(measured: Sequence[Measured], baseline: str) -> Measured:
    """What others are compared with: the baseline at its own temperature, if that was tuned."""
    its = [each for each in measured if each.model == baseline]
    return next((each for each in its if each.tuned), its[0])


def difference(ours: Measured, reference: Measured, seed: int) -> dict[str, Any]:
    """Of the nll of every domain, and of their mean where there are several."""
    pairs = {name: (each, reference.domains[name]) for name, each in ours.domains.items()}
    mean = None
    if len(pairs) > 1:
        mean = bootstrap.mean_paired_difference(list(pairs.values()), seed=seed).to_dict()
    by_domain = {
        name: bootstrap.paired_difference(*pair, seed=seed).to_dict()
        for name, pair in pairs.items()
    }
    return {**ours.heading(), "domains": by_domain, "mean": mean}


def own_unigram(text: Domain, vocab_size: int) -> Likelihood:
    """What the token frequencies of the text itself say of it: the entropy without context."""
    counts = likelihood.label_counts(text.blocks, vocab_size)
    return likelihood.unigram(text, counts, smoothing=0.0)


def _told(place: Place, lm: PerturbedLM) -> dict[str, Any]:
    perturbed = place.checkpoint is not None
    return {
        "name": place.name,
        "checkpoint": str(place.checkpoint) if perturbed else None,
        "base": place.base,
        "perturbation": lm.config.to_dict() if perturbed else None,
    }


def _counted(text: Domain, where: str, measured: Measured) -> dict[str, Any]:
    labels = sum(measured.domains[text.name].counts)
    documents = text.document_count
    return {"name": text.name, "where": where, "documents": documents, "labels": labels}
