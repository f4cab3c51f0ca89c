"""Low logit rank: measure it, write by it, learn from it; and `fastperturb rank`.

    OUTPUT/results.json      every number, and options, versions, commit
    OUTPUT/table.md          the same to be read
    OUTPUT/spectrum.png      singular values, KL against rank, angles, sizes
    OUTPUT/generation.png    the KL of combinations and baselines, step by step

A language model is a matrix here: rows are histories, columns futures and the tokens that may
follow, entries centred log-probs (arXiv 2510.24966, 2512.09892: *published*; the code is our
reconstruction). `oracle` says what is asked, `models` asks a language model, `matrix` makes the
matrix; `spectrum`, `power_law`, `truncation` and `angles` look at it; `combination`, `streams` and
`comparison` write by it; `learning` learns a model from queries, and `isan` makes ones to learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from fastperturb import runs
from fastperturb.eval import domains, likelihood
from fastperturb.eval.models import autocast, common_tokenizer, find, load
from fastperturb.eval.options import named
from fastperturb.model import PerturbedLM
from fastperturb.rank.isan import ISAN
from fastperturb.rank.learned import LearnedModel
from fastperturb.rank.learning import learn
from fastperturb.rank.matrix import LogitMatrix, logit_matrix
from fastperturb.rank.measurement import Measured, Questions, measure
from fastperturb.rank.models import ModelOracle
from fastperturb.rank.options import RankOptions
from fastperturb.rank.oracle import FunctionOracle, LogitOracle, Metered, QueryBudgetSpent, Tokens
from fastperturb.rank.power_law import exponent_difference
from fastperturb.train.documents import DocumentTokenizer

__all__ = [
    "ISAN",
    "FunctionOracle",
    "LearnedModel",
    "LogitMatrix",
    "LogitOracle",
    "Metered",
    "ModelOracle",
    "QueryBudgetSpent",
    "RankOptions",
    "learn",
    "logit_matrix",
    "run",
]


def run(options: RankOptions) -> int:
    from fastperturb.rank import pictures, table

    folder = runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    where = named("models", options.models)
    places = [find(*each, options.base) for each in where.items()]
    before = None
    if options.earlier is not None:
        before = find("earlier", options.earlier, options.base)
        places.append(before)
    tokenizer = common_tokenizer(places, trust_remote_code=options.trust_remote_code)
    questions, prompt = _questions(options, tokenizer)
    found: dict[str, Measured] = {}
    for number, place in enumerate(places[: len(where)]):
        lm = load(place, options)
        earlier = None
        if before is not None and number == 0:
            earlier = _oracle(_forms("earlier", load(before, options))[0][1], prompt, options)
        with autocast(lm, options.precision):
            for name, model in _forms(place.name, lm):
                oracle = _oracle(model, prompt, options)
                found[name] = measure(
                    oracle,
                    questions,
                    top_k=options.top_k,
                    steps=options.steps,
                    continuations=options.continuations,
                    earlier=earlier,
                    seed=options.seed,
                )
                print(f"{name}: {found[name].line()}", flush=True)
                earlier = None  # of the first alone
        del lm  # before the next one is loaded

    for each in found.values():
        for written in each.found.get("generation", {}).get("written", ()):
            written |= {key: tokenizer.decode(tokens) for key, tokens in written.items()}
    first, *others = found
    results = {
        "models": {name: each.found for name, each in found.items()},
        "differences": {
            name: exponent_difference(
                found[name].spectrum, found[first].spectrum, seed=options.seed
            ).to_dict()
            for name in others
        },
        "places": where,
        "config": options.to_dict(),
        **runs.provenance(),
    }
    runs.write_json(folder / "results.json", results)
    tables = table.tables(results)
    (folder / "table.md").write_text(table.markdown(tables), encoding="utf-8")
    written = ["results.json", "table.md"]
    if pictures.draw(results["models"], folder / "spectrum.png"):
        written.append("spectrum.png")
    if pictures.draw_generation(results["models"], folder / "generation.png"):
        written.append("generation.png")
    table.show(tables)
    print(f"in {folder}: {', '.join(written)}")
    return 0


def _questions(options: RankOptions, tokenizer: Any) -> tuple[Questions, Tokens]:
    """What is asked, and the tokens that stand in front of it all."""
    tokenize = DocumentTokenizer(tokenizer)
    documents = domains.read_documents(options.text, options, tokenize)
    begin = tokenizer.bos_token_id
    begins = begin is not None and all(int(each[0]) == begin for each in documents)
    # Neither the begin token, which the prompt is, nor the end token belongs into a window.
    inner = [each[1 if begins else 0 : -1] for each in documents]
    questions = Questions.of(
        [np.asarray(each) for each in inner],
        histories=options.histories,
        history_tokens=options.history_tokens,
        futures=options.futures,
        future_tokens=options.future_tokens,
        targets=options.targets,
        seed=options.seed,
    )
    return questions, ((begin,) if begins else ())


def _forms(name: str, lm: PerturbedLM) -> list[tuple[str, nn.Module]]:
    """A model as it is, and one that moves embeddings without its noise as well."""
    if not likelihood.moves(lm):
        return [(name, lm.base)]
    return [(name, lm), (f"{name}, without noise", lm.base)]


def _oracle(model: nn.Module, prompt: Tokens, options: RankOptions) -> ModelOracle:
    return ModelOracle(
        model,
        prompt=prompt,
        num_samples=options.num_samples,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
    )
