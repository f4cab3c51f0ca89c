"""The model that every method trains, its training, and its distance from the truth.

A ReLU net reads the two moved embeddings and answers with a point h of embedding space. Token y
scores `sharpness * (2 h.E_y - |E_y|^2)`, which is -sharpness * |h - E_y|^2 up to a constant: a
linear head over [E, -|E|^2] with hidden state sharpness * [2h, 1]. Embeddings and head are
frozen, as in a language model that is only adapted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastperturb import ops
from fastperturb.demo import language
from fastperturb.demo.language import Language
from fastperturb.demo.methods import Method
from fastperturb.estimators import Telescope, combine
from fastperturb.transforms import make_transform

PAIRS = 60_000
BATCH = 256
WIDTH = 128
LEARNING_RATE = 3e-3
TRANSFORM_LEARNING_RATE = 2e-2
# A blurred net has little use for noise, so it starts rather sharp: the truth is 62.
FIRST_SHARPNESS = 40.0

EVALUATION_DRAWS = 256
PREFIXES_PER_REGION = 400
PREFIXES_PER_POSITION = 48


class Model(nn.Module):
    """pi(y | T(E(x), z)): the transform, the net and the frozen embeddings."""

    embeddings: Tensor
    head: Tensor

    def __init__(self, embeddings: Tensor, method: Method) -> None:
        super().__init__()
        D = embeddings.shape[1]
        squares = embeddings.square().sum(1, keepdim=True)
        self.register_buffer("embeddings", embeddings)  # [V, D]
        self.register_buffer("head", torch.cat([embeddings, -squares], dim=1))  # [V, D + 1]
        self.net = nn.Sequential(nn.Linear(2 * D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, D))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(FIRST_SHARPNESS)))
        self.transform = None
        # Made last: every method of a seed starts from the same net.
        if method.transform is not None:
            rms = embeddings.square().mean().sqrt().item()
            self.transform = make_transform(method.config(rms), D, embed_rms=rms)
            self.transform.requires_grad_(method.learned)

    def hidden(
        self,
        prefixes: Tensor,  # [B, 2]
        noise_seed: Tensor | int,
        samples: Tensor | int,
        rows: Tensor | None = None,
    ) -> Tensor:  # [M, B, D + 1]
        if self.transform is None:
            moved = self.embeddings[prefixes][None]
        else:
            moved = ops.perturb_embed(
                prefixes, self.embeddings, self.transform, noise_seed, samples, rows=rows
            )
        point = self.net(moved.flatten(2))  # (M, B, D)
        return self.log_sharpness.exp() * torch.cat([2 * point, torch.ones_like(point[..., :1])], 2)

    def log_probs(
        self,
        prefixes: Tensor,  # [B, 2]
        targets: Tensor,  # [B]
        noise_seed: Tensor | int,
        samples: Tensor | int,
        rows: Tensor | None = None,
    ) -> Tensor:  # [M, B]
        hidden = self.hidden(prefixes, noise_seed, samples, rows)
        repeated = targets.expand(len(hidden), -1)
        return ops.linear_logprob(hidden.flatten(0, 1), self.head, repeated.flatten()).view_as(
            repeated
        )

    @torch.no_grad()
    def log_marginal(self, prefixes: Tensor, draws: int = EVALUATION_DRAWS) -> Tensor:
        """log of the mean over draws of every token's probability: [N, 2] to [N, V]."""
        parts = []
        for number, part in enumerate(prefixes.split(32)):
            log_probs = torch.log_softmax(self.hidden(part, number, draws) @ self.head.T, dim=-1)
            parts.append(log_probs.logsumexp(0) - math.log(len(log_probs)))
        return torch.cat(parts)


@dataclass(frozen=True)
class Outcome:
    """What one method learned from one seed. Distances are means of KL(truth || model)."""

    kl: dict[str, float]
    curve: list[float]  # by prefix position along the noisy axis
    movement: dict[str, float] | None  # the noise's sd along the noisy and the precise axis
    samples: float  # draws a row and step


def run_job(seed: int, method: Method, steps: int) -> Outcome:
    """Make the language of this seed, train on it and evaluate: the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    world = language.make_language(generator)
    prefixes = language.draw_prefixes(language.tokens_between(*language.SUPPORT), PAIRS, generator)
    targets = language.sample(prefixes, generator)
    regions = {
        name: language.some_prefixes(
            language.tokens_between(*limits), PREFIXES_PER_REGION, generator
        )
        for name, limits in language.REGIONS.items()
    }
    columns = [
        language.some_prefixes(tokens, PREFIXES_PER_POSITION, generator)
        for tokens in torch.arange(language.VOCAB).chunk(language.SIDE)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(world.embeddings, method)
    samples = train(model, method, prefixes, targets, steps=steps, generator=generator)
    return Outcome(
        kl={name: distance(model, chosen) for name, chosen in regions.items()},
        curve=[distance(model, chosen) for chosen in columns],
        movement=movement(model, world),
        samples=samples,
    )


def train(
    model: Model,
    method: Method,
    prefixes: Tensor,  # [pairs, 2]
    targets: Tensor,  # [pairs]
    *,
    steps: int,
    generator: torch.Generator,
) -> float:
    """AdamW, its rate constant for half of the steps and then falling to zero.

    Returns the mean number of draws that a row took.
    """
    groups = [{"params": [*model.net.parameters(), model.log_sharpness], "lr": LEARNING_RATE}]
    if method.learned:
        assert model.transform is not None
        groups.append({"params": model.transform.parameters(), "lr": TRANSFORM_LEARNING_RATE})
    # Decay would shrink the noise towards the exact prefix, whatever the data say.
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 2 - 2 * step / steps)
    )
    draws = 0
    for _ in range(steps):
        chosen = torch.randint(len(targets), (BATCH,), generator=generator)
        value, used = objective(model, method, prefixes[chosen], targets[chosen], generator)
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
        schedule.step()
        draws += used
    return draws / (steps * BATCH)


def objective(
    model: Model, method: Method, prefixes: Tensor, targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The estimator's value for each row [B], to be raised, and the number of draws it took."""
    noise_seed = torch.randint(2**62, (), generator=generator)
    if method.estimator == "mlmc":
        telescope = Telescope("mlmc", method.num_samples)
        level = telescope.sample(torch.rand(len(targets), generator=generator))  # (B,)
        return telescoped(model, telescope, level, prefixes, targets, noise_seed)
    draws = method.num_samples * len(targets)
    if method.estimator == "quadratic":
        hidden = model.hidden(prefixes, noise_seed, method.num_samples)
        return ops.linear_quadratic(hidden, model.head, targets), draws
    log_probs = model.log_probs(prefixes, targets, noise_seed, method.num_samples)
    return combine(log_probs, method.estimator)[0], draws


def telescoped(
    model: Model,
    telescope: Telescope,
    level: Tensor,  # [B]
    prefixes: Tensor,
    targets: Tensor,
    noise_seed: Tensor,
) -> tuple[Tensor, int]:
    """A telescope whose rows take as many draws as their own level needs, and no more.

    The draws of all rows go through the net as one list of (row, sample) pairs: noise depends
    on these numbers alone, so the list gets what a full [M, B] pass would have given it.
    """
    draws = telescope.draws(level)  # (B,)
    row = torch.arange(len(draws)).repeat_interleave(draws)  # (P,)
    sample = torch.arange(len(row)) - (draws.cumsum(0) - draws)[row]  # (P,)
    listed = model.log_probs(prefixes[row], targets[row], noise_seed, sample[None], row)[0]
    unused = listed.new_zeros(int(draws.max()), len(draws))
    log_probs = unused.index_put((sample, row), listed)  # (M, B)
    return telescope.combine(log_probs, level)[0], len(row)


def divergence(law: Tensor, log_model: Tensor) -> Tensor:
    """KL(law || model) of every row: [N, V] and [N, V] to [N]."""
    return (torch.xlogy(law, law) - law * log_model).sum(1)


def distance(model: Model, prefixes: Tensor) -> float:
    """The mean over prefixes of KL(truth || the model's marginal)."""
    return divergence(language.truth(prefixes), model.log_marginal(prefixes)).mean().item()


@torch.no_grad()
def movement(model: Model, world: Language) -> dict[str, float] | None:
    """The sd of the transform's shift along both axes, over draws and tokens."""
    if model.transform is None:
        return None
    tokens = torch.arange(language.VOCAB)[:, None]  # (V, 1)
    moved = ops.perturb_embed(tokens, model.embeddings, model.transform, 0, EVALUATION_DRAWS)
    shift = (moved - model.embeddings[tokens]) @ world.axes.T  # (M, V, 1, 2)
    noisy, precise = shift.square().mean((0, 1, 2)).sqrt().tolist()
    return {"noisy": noisy, "precise": precise}
