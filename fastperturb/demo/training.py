"""The model that every method trains, its training, and its distance from the truth.

A ReLU net reads the two moved embeddings and answers with a point h of embedding space. Token y
scores `sharpness * (2 h.E_y - |E_y|^2)`, which is -sharpness * |h - E_y|^2 up to a constant: a
linear head over [E, -|E|^2] with hidden state sharpness * [2h, 1]. Embeddings and head are
frozen, as in a language model that is only adapted. Where the trunk is held at the truth the
net is `TrueResponse`, and the transform alone trains.
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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is learned from, and how much of it a step takes."""

    pairs: int | None = PAIRS  # None: fresh ones every step
    batch: int = BATCH
    noise_sd: float = language.NOISE_SD  # the truth's
    true_trunk: bool = False  # the net is the truth's own response, held; embeddings have no ids


class TrueResponse(nn.Module):
    """The truth's answer to two embeddings: g of the mean along the noisy axis, the other's mean.

    Under noise of the truth's sd along the noisy axis a model with this net is the truth, where
    embeddings are grid positions: ids would add to the positions, and to the head's distances.
    """

    axes: Tensor

    def __init__(self, axes: Tensor) -> None:
        super().__init__()
        self.register_buffer("axes", axes)  # [2, D]

    def forward(self, moved: Tensor) -> Tensor:  # [..., 2D] to [..., D]
        position = moved.unflatten(-1, (2, -1)).mean(-2) @ self.axes.T
        return torch.stack([language.link(position[..., 0]), position[..., 1]], -1) @ self.axes


class Model(nn.Module):
    """pi(y | T(E(x), z)): the transform, the net and the frozen embeddings."""

    embeddings: Tensor
    head: Tensor

    def __init__(
        self, embeddings: Tensor, method: Method, trunk: TrueResponse | None = None
    ) -> None:
        super().__init__()
        D = embeddings.shape[1]
        squares = embeddings.square().sum(1, keepdim=True)
        self.register_buffer("embeddings", embeddings)  # [V, D]
        self.register_buffer("head", torch.cat([embeddings, -squares], dim=1))  # [V, D + 1]
        self.net = trunk or nn.Sequential(nn.Linear(2 * D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, D))
        sharpness = 1 / (2 * language.RESPONSE_SD**2) if trunk else FIRST_SHARPNESS
        self.log_sharpness = nn.Parameter(
            torch.tensor(math.log(sharpness)), requires_grad=trunk is None
        )
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
        return self.head_log_probs(self.hidden(prefixes, noise_seed, samples, rows), targets)

    def head_log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:  # [M, B, D + 1] to [M, B]
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
    entropy: dict[str, float]  # of the truth; with kl it makes the cross-entropy
    curve: list[float]  # by prefix position along the noisy axis
    movement: dict[str, float] | None  # the noise's sd along the noisy and the precise axis
    samples: float  # draws a row and step


@dataclass(frozen=True)
class Data:
    """What a seed settles before any model is made. No pairs: fresh ones every step."""

    world: Language
    prefixes: Tensor | None  # [pairs, 2]
    targets: Tensor | None  # [pairs]
    regions: dict[str, Tensor]  # {name: [N, 2]}
    columns: list[Tensor]  # of each position along the noisy axis
    generator: torch.Generator

    def batch(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """A random batch of pairs."""
        if self.prefixes is None or self.targets is None:
            return draw_pairs(setting.batch, setting.noise_sd, self.generator)
        chosen = torch.randint(len(self.targets), (setting.batch,), generator=self.generator)
        return self.prefixes[chosen], self.targets[chosen]


def draw_pairs(count: int, noise_sd: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prefixes in support and what the truth continues them with."""
    tokens = language.tokens_between(*language.SUPPORT)
    prefixes = language.draw_prefixes(tokens, count, generator)
    return prefixes, language.sample(prefixes, generator, noise_sd=noise_sd)


def make_data(seed: int, setting: Setting) -> Data:
    generator = torch.Generator().manual_seed(seed)
    world = language.make_language(generator, id_sd=0.0 if setting.true_trunk else language.ID_SD)
    prefixes = targets = None
    if setting.pairs is not None:
        prefixes, targets = draw_pairs(setting.pairs, setting.noise_sd, generator)
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
    return Data(world, prefixes, targets, regions, columns, generator)


def run_job(seed: int, method: Method, steps: int, setting: Setting = Setting()) -> Outcome:
    """Make the language of this seed, train on it and evaluate: the same in every process."""
    data = make_data(seed, setting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = TrueResponse(data.world.axes) if setting.true_trunk else None
        model = Model(data.world.embeddings, method, trunk)
    samples = train(model, method, data, setting, steps=steps)
    laws = {name: language.truth(chosen, setting.noise_sd) for name, chosen in data.regions.items()}
    return Outcome(
        kl={name: distance(model, data.regions[name], law) for name, law in laws.items()},
        entropy={name: -torch.xlogy(law, law).sum(1).mean().item() for name, law in laws.items()},
        curve=[
            distance(model, chosen, language.truth(chosen, setting.noise_sd))
            for chosen in data.columns
        ],
        movement=movement(model, data.world),
        samples=samples,
    )


def train(model: Model, method: Method, data: Data, setting: Setting, *, steps: int) -> float:
    """AdamW, its rate constant for half of the steps and then falling to zero.

    Returns the mean number of draws that a row took.
    """
    groups = []
    if not setting.true_trunk:
        trunk = [*model.net.parameters(), model.log_sharpness]
        groups.append({"params": trunk, "lr": LEARNING_RATE})
    if method.learned:
        assert model.transform is not None
        shift = [*model.transform.parameters()]
        groups.append({"params": shift, "lr": TRANSFORM_LEARNING_RATE})
    # Decay would shrink the noise towards the exact prefix, whatever the data say.
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 2 - 2 * step / steps)
    )
    draws = 0
    for _ in range(steps):
        prefixes, targets = data.batch(setting)
        value, used = objective(model, method, prefixes, targets, data.generator)
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
        schedule.step()
        draws += used
    return draws / (steps * setting.batch)


def objective(
    model: Model, method: Method, prefixes: Tensor, targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The estimator's value for each row [B], to be raised, and the number of draws it took."""
    noise_seed = torch.randint(2**62, (), generator=generator)
    telescope = method.telescope
    if telescope is not None:
        level = telescope.sample(torch.rand(len(targets), generator=generator))  # (B,)
        return telescoped(model, telescope, level, prefixes, targets, noise_seed)
    draws = method.num_samples * len(targets)
    if method.estimator == "quadratic":
        hidden = model.hidden(prefixes, noise_seed, method.num_samples)
        return ops.linear_quadratic(hidden, model.head, targets), draws
    if not method.quadratic:
        log_probs = model.log_probs(prefixes, targets, noise_seed, method.num_samples)
        return combine(log_probs, method.estimator)[0], draws
    hidden = model.hidden(prefixes, noise_seed, method.num_samples)
    log_probs = model.head_log_probs(hidden, targets)
    quadratic = ops.linear_quadratic(hidden, model.head, targets)
    return combine(log_probs, method.estimator)[0] + method.quadratic * quadratic, draws


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


def distance(model: Model, prefixes: Tensor, law: Tensor) -> float:
    """The mean over prefixes of KL(law || the model's marginal)."""
    return divergence(law, model.log_marginal(prefixes)).mean().item()


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
