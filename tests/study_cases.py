"""Made-up results of a study, whose verdict and numbers are known."""

import copy

import numpy as np

from fastperturb.eval.likelihood import Likelihood
from fastperturb.study import summary

DOMAINS = ["stories", "german", "code"]
COUNTS = {
    name: np.random.default_rng(n).integers(20, 200, 30 + n).tolist()
    for n, name in enumerate(DOMAINS)
}
# Nll in and out of domain, by view and tempering, of a study in which the learned method gains.
LEVELS = {
    "exact": {
        ("as_trained", False): (3.00, 4.10),
        ("as_trained", True): (3.00, 4.00),
        ("noise_added", False): (3.02, 4.05),
        ("noise_added", True): (3.01, 3.99),
    },
    "learned": {
        ("as_trained", False): (2.99, 3.92),
        ("as_trained", True): (2.99, 3.90),
        ("without_noise", False): (3.05, 4.20),
        ("without_noise", True): (3.00, 4.02),
    },
    "exact, rate x 2": {("as_trained", False): (3.0, 4.2), ("as_trained", True): (3.0, 4.1)},
    "exact, compute x 8": {("as_trained", False): (3.02, 4.1), ("as_trained", True): (3.02, 3.98)},
    "learned, deterministic": {("as_trained", False): (3.0, 4.1), ("as_trained", True): (3.0, 4.0)},
}
FACTS = {
    "exact": {"role": "baseline"},
    "learned": {"draws": 8, "shift": [[1, 0.2], [10, 0.1]], "validation_nll": 2.8},
    "exact, rate x 2": {
        "role": "control",
        "control": "learning_rate",
        "of": "exact",
        "learning_rate": 2e-3,
        "validation_nll": 3.1,
    },
    "exact, compute x 8": {"role": "control", "control": "equal_compute", "of": "exact"},
    "learned, deterministic": {
        "role": "control",
        "control": "deterministic",
        "of": "learned",
        "shift": [[1, 0.2]],
    },
}


def likelihood(domain, nll, *, wobble=0.0, draws=1):
    """Return a likelihood with this nll, whose documents differ.

    They differ in the same way for every model, except for a part of size wobble."""
    counts = np.array(COUNTS[domain])
    own = np.random.default_rng(7).normal(size=len(counts))
    own += wobble * np.random.default_rng(round(1e6 * nll)).normal(size=len(counts))
    sums = counts * (nll + own - (counts @ own) / counts.sum())
    sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= draws]
    curve = {
        "num_samples": sizes,
        "nll": [nll + 0.1 / n - 0.1 / draws for n in sizes],
        "jackknife": [None, *[nll] * (len(sizes) - 1)],
    }
    return Likelihood(
        nll_sums=sums.tolist(),
        jackknife_sums=sums.tolist(),
        counts=counts.tolist(),
        num_samples=draws,
        curve=curve,
    ).to_dict()


def measurement(form, levels, *, draws, wobble=0.0):
    """Return a measurement; german and code are 0.5 below and above the level out of domain."""
    view, tuned = form
    nll = {"stories": levels[0], "german": levels[1] - 0.5, "code": levels[1] + 0.5}
    domains = {name: likelihood(name, nll[name], wobble=wobble, draws=draws) for name in DOMAINS}
    return {
        "view": view,
        "tuned": tuned,
        "temperature": 1.1 if tuned else 1.0,
        "domains": domains,
    }


def cell(method, seed, *, levels=None, deviation=0.002, wobble=0.0, **facts):
    """Return a run. Each seed adds 0.1 to all levels, and a deviation to those of this method.

    For seeds 0, 1 and 2 it adds -deviation, 0 and deviation, whose standard deviation is deviation.
    """
    facts = {
        "role": "method",
        "control": None,
        "of": None,
        "draws": 1,
        "steps": 100,
        "shift": [],
        **FACTS.get(method, {}),
        **facts,
    }
    levels = levels or LEVELS[method]
    own = 0.0 if method.startswith("exact") else deviation
    offset = 0.1 * seed + own * (seed - 1)
    evaluated = 32 if facts["draws"] > 1 else 1
    longer = 8 if facts["control"] == "equal_compute" else 1
    return {
        "method": method,
        "seed": seed,
        "learning_rate": 1e-3,
        "best_step": 80,
        "validation_nll": 2.9,
        "token_passes": 1000 * facts["draws"] * longer,
        "token_scales": None,
        "measurements": [
            measurement(
                form,
                [level + offset for level in form_levels],
                draws=evaluated if form[0] == "as_trained" else 32 if "added" in form[0] else 1,
                wobble=wobble,
            )
            | {"validation_nll": facts.get("validation_nll", 2.9)}
            for form, form_levels in levels.items()
        ],
        "learned": bool(facts["shift"]) and facts["control"] is None,
        **facts,
    }


def study_results(*, seeds=(0, 1, 2), methods=tuple(LEVELS), changes=(), more=(), **options):
    """Return the results of a study; changes: {(method, form): levels that replace those above}."""
    levels = copy.deepcopy(LEVELS)
    for (method, form), form_levels in dict(changes).items():
        levels[method][form] = form_levels
    cells = [cell(name, seed, levels=levels[name], **options) for seed in seeds for name in methods]
    base = [measurement(("as_trained", tuned), (4.0, 4.5), draws=1) for tuned in (False, True)]
    unigram = {
        text: {name: likelihood(name, nll) for name in DOMAINS}
        for text, nll in (("training", 6.0), ("own", 5.0))
    }
    return {
        "in_domain": "stories",
        "domains": DOMAINS,
        "baseline": "exact",
        "seeds": list(seeds),
        "base": base,
        "unigram": unigram,
        "cells": [*cells, *more],
        "config": {
            "draws": 32,
            "noise_scale": None,
            "train": {"perturb": {"init_scale": 0.2}},
        },
    }


def verdict_of(results, method="learned"):
    [verdict] = [v for v in summary.summarise(results)["verdicts"] if v["method"] == method]
    return verdict


def row_of(summarised, method, *, what=None, view="as_trained", tuned=True):
    [row] = [
        row
        for row in summarised["rows"]
        if (row["method"], row["view"], row["tuned"]) == (method, view, tuned)
        and what in (None, row["what"])
    ]
    return row
