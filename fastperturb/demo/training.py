"""The model that every method trains, its training, and its distance from the truth.

A ReLU net reads the last perturbed embeddings, two as a rule, and answers with a point h of
embedding space. Token y scores `sharpness * (2 h.E_y - |E_y|^2)`, which is -sharpness * |h - E_y|^2
up to a constant: a linear head over [E, -|E|^2] with hidden state sharpness * [2h, 1]. Embeddings
and head are frozen, as in a language model that is only adapted. Where the trunk is held at the
truth, the net is `TrueResponse`, and only the transform trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from fastperturb import ops
from fastperturb.demo import language
from fastperturb.demo.language import Language
from fastperturb.demo.methods import JointLaw, Method
from fastperturb.estimators import Telescope, combine
from fastperturb.transforms import make_transform

PAIRS = 60_000
BATCH = 256
WIDTH = 128
LEARNING_RATE = 3e-3
TRANSFORM_LEARNING_RATE = 2e-2
# A blurred net has little use for noise, so the net starts rather sharp; the truth is 62.
FIRST_SHARPNESS = 40.0

EVALUATION_SAMPLES = 256
PREFIXES_PER_REGION = 400
PREFIXES_PER_POSITION = 48


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The training data and the batch size. Field names are keys of saved results."""

    pairs: int | None = PAIRS  # None: fresh pairs every step
    batch: int = BATCH
    noise_sd: float = language.NOISE_SD  # of the truth
    contextual: bool = False  # the truth's noise depends on a third token, before the two
    true_trunk: bool = False  # the net is TrueResponse, held fixed; embeddings have no ids
    seen: int = 2  # the last tokens that the net reads

    @property
    def prefix_length(self) -> int:
        return 3 if self.contextual else 2


class TrueResponse(nn.Module):
    """The true response to two embeddings: g of the noisy mean, and the precise mean.

    With noise of the true standard deviation along the noisy axis, a model with this net is the
    truth. Embeddings must be grid positions: ids would add to positions, and to the distances in
    the head.
    """

    axes: Tensor

    def __init__(self, axes: Tensor) -> None:
        super().__init__()
        self.register_buffer("axes", axes)  # [2, D]

    def forward(self, embeddings: Tensor) -> Tensor:  # [..., 2D] to [..., D]
        position = embeddings.unflatten(-1, (2, -1)).mean(-2) @ self.axes.T
        return torch.stack([language.link(position[..., 0]), position[..., 1]], -1) @ self.axes


class Model(nn.Module):
    """pi(y | T(E(x), z)): the transform, the net and the frozen embeddings."""

    embeddings: Tensor
    head: Tensor

    def __init__(
        self,
        embeddings: Tensor,
        method: Method,
        trunk: TrueResponse | None = None,
        *,
        seen: int = 2,
    ) -> None:
        super().__init__()
        D, self.seen = embeddings.shape[1], seen
        squares = embeddings.square().sum(1, keepdim=True)
        self.register_buffer("embeddings", embeddings)  # [V, D]
        self.register_buffer("head", torch.cat([embeddings, -squares], dim=1))  # [V, D + 1]
        self.net = trunk or nn.Sequential(
            nn.Linear(seen * D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, D)
        )
        sharpness = 1 / (2 * language.RESPONSE_SD**2) if trunk else FIRST_SHARPNESS
        self.log_sharpness = nn.Parameter(
            torch.tensor(math.log(sharpness)), requires_grad=trunk is None
        )
        self.transform = None
        # Made last, so that all methods of a seed start from the same net.
        if method.transform is not None:
            rms = embeddings.square().mean().sqrt().item()
            self.transform = make_transform(method.config(rms), D, embed_rms=rms)
            self.transform.requires_grad_(method.learned)

    def hidden(
        self,
        prefixes: Tensor,  # [B, 2 or more]
        noise_seed: Tensor | int,
        samples: Tensor | int,
        rows: Tensor | None = None,
        **joint_law: Unpack[JointLaw],
    ) -> Tensor:  # [M, B, D + 1]
        if self.transform is None:
            perturbed = self.embeddings[prefixes][None]
        else:
            perturbed = ops.perturb_embed(
                prefixes,
                self.embeddings,
                self.transform,
                noise_seed,
                samples,
                rows=rows,
                **joint_law,
            )
        point = self.net(perturbed[:, :, -self.seen :].flatten(2))  # (M, B, D)
        return self.log_sharpness.exp() * torch.cat([2 * point, torch.ones_like(point[..., :1])], 2)

    def log_probs(
        self,
        prefixes: Tensor,  # [B, 2 or more]
        targets: Tensor,  # [B]
        noise_seed: Tensor | int,
        samples: Tensor | int,
        rows: Tensor | None = None,
    ) -> Tensor:  # [M, B]
        return self.head_log_probs(self.hidden(prefixes, noise_seed, samples, rows), targets)

    def head_log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:  # [M, B, D + 1] to [M, B]
        repeated = targets.expand(len(hidden), -1)
        return ops.linear_logprob(hidden.flatten(0, 1), self.head, repeated.flatten()).view_as(
            repeated
        )

    @torch.no_grad()
    def log_marginal(self, prefixes: Tensor, num_samples: int = EVALUATION_SAMPLES) -> Tensor:
        """Return the log of every token's probability, averaged over samples: [N, 2] to [N, V]."""
        parts = []
        for number, part in enumerate(prefixes.split(32)):
            hidden = self.hidden(part, number, num_samples)
            log_probs = torch.log_softmax(hidden @ self.head.T, dim=-1)
            parts.append(log_probs.logsumexp(0) - math.log(len(log_probs)))
        return torch.cat(parts)


@dataclass(frozen=True)
class Outcome:
    """The result of training one method with one seed. Field names are keys of saved results."""

    kl: dict[str, float]  # mean KL(truth || model), by region
    entropy: dict[str, float]  # of the truth; kl + entropy is the cross-entropy
    curve: list[float]  # mean KL by prefix position along the noisy axis
    movement: dict[str, float] | None  # standard deviation of the shift along each axis
    samples: float  # mean samples per row and step


@dataclass(frozen=True)
class Data:
    """The language, training pairs and test prefixes of a seed, the same for all methods."""

    world: Language
    prefixes: Tensor | None  # [pairs, 2]; None: fresh pairs every step
    targets: Tensor | None  # [pairs]
    regions: dict[str, Tensor]  # test prefixes by region: [N, 2]
    columns: list[Tensor]  # test prefixes by position along the noisy axis: [N, 2]
    generator: torch.Generator

    def batch(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Draw a random batch of pairs."""
        if self.prefixes is None or self.targets is None:
            return draw_pairs(setting.batch, setting, self.generator)
        chosen = torch.randint(len(self.targets), (setting.batch,), generator=self.generator)
        return self.prefixes[chosen], self.targets[chosen]


def draw_pairs(count: int, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw prefixes in support, and a continuation of each from the setting's truth."""
    tokens = language.tokens_between(*language.SUPPORT)
    prefixes = language.draw_prefixes(tokens, count, generator, length=setting.prefix_length)
    targets = language.sample(
        prefixes, generator, noise_sd=setting.noise_sd, contextual=setting.contextual
    )
    return prefixes, targets


def make_data(seed: int, setting: Setting) -> Data:
    """Make the language, the training pairs and the test prefixes of a seed."""
    generator, length = torch.Generator().manual_seed(seed), setting.prefix_length
    world = language.make_language(generator, id_sd=0.0 if setting.true_trunk else language.ID_SD)
    prefixes = targets = None
    if setting.pairs is not None:
        prefixes, targets = draw_pairs(setting.pairs, setting, generator)
    regions = {
        name: language.some_prefixes(
            language.tokens_between(*limits), PREFIXES_PER_REGION, generator, length=length
        )
        for name, limits in language.REGIONS.items()
    }
    columns = [
        language.some_prefixes(tokens, PREFIXES_PER_POSITION, generator, length=length)
        for tokens in torch.arange(language.VOCAB).chunk(language.SIDE)
    ]
    return Data(world, prefixes, targets, regions, columns, generator)


def run_job(seed: int, method: Method, steps: int, setting: Setting = Setting()) -> Outcome:
    """Train one model and evaluate it; the result depends on nothing but the arguments."""
    data = make_data(seed, setting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = TrueResponse(data.world.axes) if setting.true_trunk else None
        model = Model(data.world.embeddings, method, trunk, seen=setting.seen)
    samples = train(model, method, data, setting, steps=steps)
    truths = true_distributions(data, setting)
    return Outcome(
        kl={name: distance(model, data.regions[name], truth) for name, truth in truths.items()},
        entropy={name: mean_entropy(truth) for name, truth in truths.items()},
        curve=[
            distance(model, prefixes, true_distribution(prefixes, setting))
            for prefixes in data.columns
        ],
        movement=axis_shifts(model, data.world),
        samples=samples,
    )


def train(model: Model, method: Method, data: Data, setting: Setting, *, steps: int) -> float:
    """Train by AdamW, and return the mean number of samples that a row took.

    The learning rate is constant for half of the steps, and then falls to zero.
    """
    groups = []
    if not setting.true_trunk:
        trunk = [*model.net.parameters(), model.log_sharpness]
        groups.append({"params": trunk, "lr": LEARNING_RATE})
    if method.learned:
        assert model.transform is not None
        transform = [*model.transform.parameters()]
        groups.append({"params": transform, "lr": TRANSFORM_LEARNING_RATE})
    # No weight decay: it would shrink the noise, whatever the data say.
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 2 - 2 * step / steps)
    )
    samples = 0
    for _ in range(steps):
        prefixes, targets = data.batch(setting)
        value, used = objective(model, method, prefixes, targets, data.generator)
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
        schedule.step()
        samples += used
    return samples / (steps * setting.batch)


def objective(
    model: Model, method: Method, prefixes: Tensor, targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return the estimator's value of each row [B], to be maximised, and the samples it took."""
    noise_seed = torch.randint(2**62, (), generator=generator)
    telescope = method.telescope
    if telescope is not None:
        level = telescope.sample(torch.rand(len(targets), generator=generator))  # (B,)
        return telescoped(model, telescope, level, prefixes, targets, noise_seed)
    samples = method.num_samples * len(targets)
    strata = method.joint_law["strata"]
    hidden = model.hidden(prefixes, noise_seed, method.num_samples, **method.joint_law)
    if method.estimator == "quadratic":
        return ops.linear_quadratic(hidden, model.head, targets, strata=strata), samples
    value, _ = combine(model.head_log_probs(hidden, targets), method.estimator, strata=strata)
    if method.quadratic:
        quadratic = ops.linear_quadratic(hidden, model.head, targets, strata=strata)
        value = value + method.quadratic * quadratic
    return value, samples


def telescoped(
    model: Model,
    telescope: Telescope,
    level: Tensor,  # [B]
    prefixes: Tensor,
    targets: Tensor,
    noise_seed: Tensor,
) -> tuple[Tensor, int]:
    """Return the value of a telescope, and the samples it took.

    Each row takes only the samples that its level needs. All (row, sample) pairs go through the net
    as one list; noise depends only on these two numbers, so it is that of a full [M, B] pass.
    """
    samples = telescope.draws(level)  # (B,)
    row = torch.arange(len(samples)).repeat_interleave(samples)  # (P,)
    sample = torch.arange(len(row)) - (samples.cumsum(0) - samples)[row]  # (P,)
    listed = model.log_probs(prefixes[row], targets[row], noise_seed, sample[None], row)[0]
    unused = listed.new_zeros(int(samples.max()), len(samples))
    log_probs = unused.index_put((sample, row), listed)  # (M, B)
    return telescope.combine(log_probs, level)[0], len(row)


def true_distributions(data: Data, setting: Setting) -> dict[str, Tensor]:
    """Return the truth after the test prefixes of each region: {name: [N, V]}."""
    return {name: true_distribution(prefixes, setting) for name, prefixes in data.regions.items()}


def true_distribution(prefixes: Tensor, setting: Setting) -> Tensor:
    """Return the truth of a setting after each prefix: [N, 2] to [N, V]."""
    return language.truth(prefixes, setting.noise_sd, contextual=setting.contextual)


def mean_entropy(truth: Tensor) -> float:
    """Return the mean entropy of distributions [N, V]."""
    return -torch.xlogy(truth, truth).sum(1).mean().item()


def divergence(truth: Tensor, log_model: Tensor) -> Tensor:
    """Return KL(truth || model) of every row: [N, V] and [N, V] to [N]."""
    return (torch.xlogy(truth, truth) - truth * log_model).sum(1)


def distance(model: Model, prefixes: Tensor, truth: Tensor) -> float:
    """Return the mean over prefixes of KL(truth || the model's marginal)."""
    return divergence(truth, model.log_marginal(prefixes)).mean().item()


@torch.no_grad()
def axis_shifts(model: Model, world: Language) -> dict[str, float] | None:
    """Return the standard deviation of the shift along both axes, over samples and tokens."""
    if model.transform is None:
        return None
    tokens = torch.arange(language.VOCAB)[:, None]  # (V, 1)
    perturbed = ops.perturb_embed(tokens, model.embeddings, model.transform, 0, EVALUATION_SAMPLES)
    shift = (perturbed - model.embeddings[tokens]) @ world.axes.T  # (M, V, 1, 2)
    noisy, precise = shift.square().mean((0, 1, 2)).sqrt().tolist()
    return {"noisy": noisy, "precise": precise}
