"""`python -m bench.proposal`: the error of a row's log marginal, by proposal and number of samples.

The model is stories260K under a lowrank transform at its start, scope and marginal sequence; rows
are of Wikipedia. The truth is importance sampling from a gaussian that is fitted to the posterior
of z in rounds, whose effective samples the result names.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.sampling import texts
from fastperturb import PerturbConfig, PerturbedLM, runs, wrap
from fastperturb.engine.inputs import lay_out

VARIANTS = [
    *(("prior", 0, count) for count in (16, 64, 256)),
    *(("gradient", steps, count) for steps in (1, 4, 12) for count in (4, 16)),
]
_STEPS, _ROUNDS, _DRAWS, _LAST_DRAWS = 40, 8, 256, 4096


def model() -> PerturbedLM:
    config = PerturbConfig(scope="sequence", marginal="sequence", sampling="independent")
    torch.manual_seed(0)
    return wrap(texts.Model.load("sequence").base, config)


@torch.no_grad()
def log_probs(lm: PerturbedLM, ids: Tensor, z: Tensor) -> Tensor:
    """Return log p(labels | z) of latents [m, B, R]: [m, B] in fp64."""
    e = lm.base.get_input_embeddings()(ids)
    perturbed = lm.transform(e, z[:, :, None])  # (m, B, T, D)
    values = []
    with lm.exact():
        for some in perturbed.flatten(0, 1).split(64):
            labels = ids.repeat(-(-len(some) // len(ids)), 1)[: len(some)]
            values.append(lm(inputs_embeds=some, labels=labels).log_probs[0].double().sum(-1))
    return torch.cat(values).view(z.shape[:2])


def truth(lm: PerturbedLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log marginal of each row, and the effective samples that it rests on."""
    mean = start(lm, ids)
    size, latent_dim = mean.shape
    prior = torch.distributions.MultivariateNormal(torch.zeros(latent_dim), torch.eye(latent_dim))
    covariance = 0.5 * torch.eye(latent_dim).expand(size, -1, -1)
    for round_number in range(_ROUNDS + 1):
        is_last = round_number == _ROUNDS
        fitted = torch.distributions.MultivariateNormal(mean, covariance)
        z = fitted.sample((_LAST_DRAWS if is_last else _DRAWS,))
        weights = log_probs(lm, ids, z) + (prior.log_prob(z) - fitted.log_prob(z)).double()
        if is_last:
            break
        share = tempered(weights).softmax(0).float()
        mean = torch.einsum("mb,mbr->br", share, z)
        spread = torch.einsum("mb,mbr,mbs->brs", share, z - mean, z - mean)
        covariance = 0.8 * spread + 0.2 * covariance + 0.02 * torch.eye(latent_dim)
    effective = 1 / weights.softmax(0).square().sum(0)
    return weights.logsumexp(0) - math.log(_LAST_DRAWS), effective


def tempered(weights: Tensor, least: int = 64) -> Tensor:
    """Return the weights times the largest power of 2/3 that leaves `least` effective samples."""
    factor = torch.ones_like(weights[0])
    for _ in range(20):
        effective = 1 / (factor * weights).softmax(0).square().sum(0)
        factor = torch.where(effective < least, factor / 1.5, factor)
    return factor * weights


def start(lm: PerturbedLM, ids: Tensor) -> Tensor:
    """Return mu [B, R] after many steps."""
    unset = dict.fromkeys(
        ("inputs_embeds", "attention_mask", "position_ids", "perturb_mask", "num_samples", "rows")
    )
    with lm.overriding(proposal="gradient", proposal_steps=_STEPS), torch.no_grad():
        [batch] = lay_out(
            lm,
            input_ids=ids,
            labels=ids,
            seed=0,
            num_items_in_batch=None,
            return_logits=False,
            **unset,
        )
    assert batch.latent_mean is not None
    return batch.latent_mean[:, 0]


def errors(lm: PerturbedLM, ids: Tensor, exact: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Return each variant's error of a row's log marginal, in nats, over rows and seeds."""
    rows = []
    for name, steps, draws in VARIANTS:
        changes = {"proposal": name, **({"proposal_steps": steps} if steps else {})}
        scores = []
        with lm.overriding(**changes), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few effective samples
            for seed in range(repeats):
                scores.append(lm.score(ids, num_samples=draws, seed=seed))
        error = torch.stack([score.log_marginal for score in scores]) - exact
        effective = torch.stack([score.ess for score in scores]).mean()
        rows.append(
            {
                "proposal": name,
                "steps": steps,
                "samples": draws,
                "root_mean_square_error": float(error.square().mean().sqrt()),
                "mean_error": float(error.mean()),
                "effective_samples": float(effective),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/proposal"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not texts.are_there():
        return
    torch.set_num_threads(1)
    folder = runs.open_output_dir(options.output_dir, overwrite=True)
    lm, every = model(), texts.pieces("wikipedia", "test")
    ids = every[:: len(every) // options.rows][: options.rows]
    exact, effective = truth(lm, ids)
    print(f"truth {exact.tolist()} on {effective.tolist()} effective samples", flush=True)
    results = {
        "truth": {
            "log_marginal": exact.tolist(),
            "effective_samples": effective.tolist(),
        },
        "rows": errors(lm, ids, exact, options.repeats),
        **runs.provenance(),
        "device": f"{runs.cpu_model()}, one thread",
    }
    runs.write_json(folder / "results.json", results)


if __name__ == "__main__":
    main()
