"""`fastperturb rank`: measure the logit rank of models, and write with combinations of prompts.

    OUTPUT/results.json      every number, and options, versions, commit
    OUTPUT/table.md          the main numbers as tables
    OUTPUT/spectrum.png      singular values, KL against rank, angles, sizes
    OUTPUT/generation.png    the KL of combinations and baselines, step by step

A language model defines a matrix: rows are histories, columns are futures and the tokens that may
follow, entries are centred log-probs (arXiv 2510.24966, 2512.09892: *published*; the code is our
reconstruction). `ask` asks a model for logits, `measure` builds the matrix and measures it,
`combine` writes with combinations of its rows, and `measurement` does all of this for one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastperturb import runs
from fastperturb.data import domains
from fastperturb.data.documents import DocumentTokenizer
from fastperturb.eval import likelihood
from fastperturb.eval.models import Place, autocast, common_tokenizer, find, load
from fastperturb.eval.options import named
from fastperturb.model import PerturbedLM
from fastperturb.rank.ask.model_oracle import ModelOracle
from fastperturb.rank.measure.exponents import exponent_difference
from fastperturb.rank.measurement import RankMeasurement, measure
from fastperturb.rank.options import RankOptions
from fastperturb.rank.texts import TextPieces
from fastperturb.rank.types import Tokens


def run(options: RankOptions) -> int:
    """Measure all models, write the output folder, print the tables, and return the exit status."""
    folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    where = named("models", options.models)
    places = [find(name, path, options.base) for name, path in where.items()]
    earlier = None
    if options.earlier is not None:
        earlier = find("earlier", options.earlier, options.base)
    all_places = places if earlier is None else [*places, earlier]
    for place in all_places:
        if place.is_edited:
            raise ValueError(
                f"model {place.name!r} edits tokens at random, which shifts all later ones: its "
                "futures cannot share a history's cache; leave it out"
            )
    tokenizer = common_tokenizer(all_places, trust_remote_code=options.trust_remote_code)
    pieces, prompt = _read_pieces(options, tokenizer)
    first: RankMeasurement | None = None
    results: dict[str, Any] = {"models": {}, "differences": {}}
    for place in places:
        measurements = _measure_forms(
            place, pieces, prompt, options, first, None if first else earlier
        )
        first = first or next(iter(measurements.values()))
        for name, measurement in measurements.items():
            results["models"][name] = _with_text(measurement.results, tokenizer)
            # A padded vocabulary has other columns.
            if measurement is not first and measurement.spectrum.shape == first.spectrum.shape:
                difference = exponent_difference(
                    measurement.spectrum, first.spectrum, seed=options.seed
                )
                results["differences"][name] = difference.to_dict()
        config = {"places": where, "config": options.to_dict()}
        results = {**results, **config, **runs.provenance()}
        runs.write_json(folder / "results.json", results)
    _write_report(results, folder)
    return 0


def _read_pieces(options: RankOptions, tokenizer: Any) -> tuple[TextPieces, Tokens]:
    """Return the pieces of text to ask about, and the prompt in front of every history."""
    documents = domains.read_documents(options.text, options, DocumentTokenizer(tokenizer))
    begin = tokenizer.bos_token_id
    has_begin = begin is not None and all(int(tokens[0]) == begin for tokens in documents)
    # A piece holds neither the begin token, which is the prompt, nor the end token.
    inner = [np.asarray(tokens[1 if has_begin else 0 : -1]) for tokens in documents]
    pieces = TextPieces.cut_from(
        inner,
        histories=options.histories,
        history_tokens=options.history_tokens,
        futures=options.futures,
        future_tokens=options.future_tokens,
        targets=options.targets,
        seed=options.seed,
    )
    return pieces, ((begin,) if has_begin else ())


def _measure_forms(
    place: Place,
    pieces: TextPieces,
    prompt: Tokens,
    options: RankOptions,
    first: RankMeasurement | None,
    earlier_place: Place | None,
) -> dict[str, RankMeasurement]:
    """Measure a model as it is, and a perturbed one also without its noise.

    first: the first measurement of the run, on whose tokens all models are compared.
    earlier_place: where the model's earlier checkpoint lies.
    """
    lm, earlier = load(place, options), None
    if earlier_place is not None:
        earlier_lm = load(earlier_place, options)
        earlier = _oracle(_forms("earlier", earlier_lm)["earlier"], prompt, options)
    measurements: dict[str, RankMeasurement] = {}
    with autocast(lm, options.precision):
        for name, model in _forms(place.name, lm).items():
            first = first or next(iter(measurements.values()), None)
            measurements[name] = measure(
                _oracle(model, prompt, options),
                pieces,
                top_k=options.top_k if first is None or first.tokens is None else first.tokens,
                steps=options.steps,
                continuations=options.continuations,
                earlier=None if measurements else earlier,
                seed=options.seed,
            )
            print(f"{name}: {measurements[name].summary()}", flush=True)
    return measurements


def _forms(name: str, lm: PerturbedLM) -> dict[str, nn.Module]:
    """Return the model; a perturbed one also without its noise."""
    if not likelihood.perturbs(lm):
        return {name: lm.base}
    return {name: lm, f"{name}, without noise": lm.base}


def _oracle(model: nn.Module, prompt: Tokens, options: RankOptions) -> ModelOracle:
    return ModelOracle(
        model,
        prompt=prompt,
        num_samples=options.num_samples,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
    )


def _with_text(results: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the results with the tokens of written examples decoded."""
    if "generation" not in results:
        return results
    generation = results["generation"]
    written = [
        {key: tokenizer.decode(tokens) for key, tokens in example.items()}
        for example in generation["written"]
    ]
    return {**results, "generation": {**generation, "written": written}}


def _write_report(results: dict[str, Any], folder: Path) -> None:
    """Write the tables and pictures, and show the tables."""
    from fastperturb.rank import pictures, table  # they need matplotlib, an extra

    tables = table.tables(results)
    (folder / "table.md").write_text(table.markdown(tables), encoding="utf-8")
    files = ["results.json", "table.md"]
    if pictures.draw(results["models"], folder / "spectrum.png"):
        files.append("spectrum.png")
    if pictures.draw_generation(results["models"], folder / "generation.png"):
        files.append("generation.png")
    table.show(tables)
    print(f"in {folder}: {', '.join(files)}")
