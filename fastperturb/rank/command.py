"""Low logit rank: measure it, write by it, learn from it; and `fastperturb rank`.

    OUTPUT/results.json      every number, and options, versions, commit
    OUTPUT/table.md          the same to be read
    OUTPUT/spectrum.png      singular values, KL against rank, angles, sizes
    OUTPUT/generation.png    the KL of combinations and baselines, step by step

A language model is a matrix here: rows are histories, columns futures and the tokens that may
follow, entries centred log-probs (arXiv 2510.24966, 2512.09892: *published*; the code is our
reconstruction). `oracle` says what is asked, `models` asks a language model, `matrix` makes the
matrix; `spectrum`, `power_law`, `truncation` and `angles` look at it; `combination`, `streams`,
`laws` and `comparison` write by it; `learning` learns a model from queries, and `isan` makes ones
to learn.
"""

from __future__ import annotations

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
from fastperturb.rank.ask.models import ModelOracle
from fastperturb.rank.ask.oracle import (
    Tokens,
)
from fastperturb.rank.measure.measurement import Asked, Measured, measure
from fastperturb.rank.measure.power_law import exponent_difference
from fastperturb.rank.options import RankOptions


def run(options: RankOptions) -> int:
    from fastperturb.rank import pictures, table

    folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    where = named("models", options.models)
    places = [find(*each, options.base) for each in where.items()]
    before = None
    if options.earlier is not None:
        before = find("earlier", options.earlier, options.base)
    every = [*places, *([before] if before else [])]
    for place in every:
        if place.is_edited:
            raise ValueError(
                f"model {place.name!r} edits tokens at random, which moves all that follow: it is "
                "no function of a history's cache; leave it out"
            )
    tokenizer = common_tokenizer(every, trust_remote_code=options.trust_remote_code)
    asked, prompt = _asked(options, tokenizer)
    first: Measured | None = None
    found: dict[str, Any] = {"models": {}, "differences": {}}
    for place in places:
        measured = _measured(place, asked, prompt, options, first, None if first else before)
        first = first or next(iter(measured.values()))
        for name, each in measured.items():
            found["models"][name] = _decoded(each.found, tokenizer)
            # A vocabulary that was padded has other columns.
            if each is not first and each.spectrum.shape == first.spectrum.shape:
                difference = exponent_difference(each.spectrum, first.spectrum, seed=options.seed)
                found["differences"][name] = difference.to_dict()
        config = {"places": where, "config": options.to_dict()}
        results = {**found, **config, **runs.provenance()}
        runs.write_json(folder / "results.json", results)

    tables = table.tables(results)
    (folder / "table.md").write_text(table.markdown(tables), encoding="utf-8")
    files = ["results.json", "table.md"]
    if pictures.draw(results["models"], folder / "spectrum.png"):
        files.append("spectrum.png")
    if pictures.draw_generation(results["models"], folder / "generation.png"):
        files.append("generation.png")
    table.show(tables)
    print(f"in {folder}: {', '.join(files)}")
    return 0


def _measured(
    place: Place,
    asked: Asked,
    prompt: Tokens,
    options: RankOptions,
    first: Measured | None,
    before: Place | None,
) -> dict[str, Measured]:
    """A model as it is, and one that moves embeddings without its noise as well.

    first: what was measured first, whose tokens all are asked about.
    before: where the model's earlier checkpoint lies.
    """
    lm, earlier = load(place, options), None
    if before is not None:
        earlier = _oracle(_forms("earlier", load(before, options))["earlier"], prompt, options)
    found: dict[str, Measured] = {}
    with autocast(lm, options.precision):
        for name, model in _forms(place.name, lm).items():
            first = first or next(iter(found.values()), None)
            found[name] = measure(
                _oracle(model, prompt, options),
                asked,
                top_k=options.top_k if first is None or first.tokens is None else first.tokens,
                steps=options.steps,
                continuations=options.continuations,
                earlier=None if found else earlier,
                seed=options.seed,
            )
            print(f"{name}: {found[name].line()}", flush=True)
    return found


def _decoded(found: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """With what was written as text."""
    if "generation" not in found:
        return found
    generation = found["generation"]
    written = [
        {key: tokenizer.decode(tokens) for key, tokens in each.items()}
        for each in generation["written"]
    ]
    return {**found, "generation": {**generation, "written": written}}


def _asked(options: RankOptions, tokenizer: Any) -> tuple[Asked, Tokens]:
    """What is asked, and the tokens that stand in front of it all."""
    tokenize = DocumentTokenizer(tokenizer)
    documents = domains.read_documents(options.text, options, tokenize)
    begin = tokenizer.bos_token_id
    begins = begin is not None and all(int(each[0]) == begin for each in documents)
    # Neither the begin token, which the prompt is, nor the end token belongs into a piece.
    inner = [each[1 if begins else 0 : -1] for each in documents]
    asked = Asked.of(
        [np.asarray(each) for each in inner],
        histories=options.histories,
        history_tokens=options.history_tokens,
        futures=options.futures,
        future_tokens=options.future_tokens,
        targets=options.targets,
        seed=options.seed,
    )
    return asked, ((begin,) if begins else ())


def _forms(name: str, lm: PerturbedLM) -> dict[str, nn.Module]:
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
