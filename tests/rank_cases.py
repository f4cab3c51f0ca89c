"""Histories, futures, matrices and answers one context at a time, for the tests of rank."""

import random

import numpy as np
import torch

from fastperturb import PerturbConfig, wrap

VOCAB = 97
BEGIN = (1,)
PROBE = 1  # a first pass, over one token, shows whether a model keeps a cache


def sequences(count, shortest, longest, *, seed=0):
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(shortest, longest)))
        for _ in range(count)
    ]


# Of all lengths; futures that begin others, that are one another, and none at all.
HISTORIES = [*sequences(5, 0, 9), ()]
FUTURES = [(), (5,), (5, 6), (5, 6, 7), (8, 9), (5, 6), *sequences(3, 1, 6, seed=1)]


@torch.no_grad()
def one_by_one(model, histories, futures, prompt=BEGIN):
    """The law after each context [H, F, V], by a pass of its own."""
    found = [
        [model(input_ids=torch.tensor([prompt + h + f])).logits[0, -1] for f in futures]
        for h in histories
    ]
    return torch.stack([torch.stack(each) for each in found]).log_softmax(-1)


def perturbed(model, **options):
    torch.manual_seed(2)
    return wrap(model, PerturbConfig(**{"latent_dim": 4, "init_scale": 1.0, **options}))


def of_spectrum(singular_values, shape, seed=0):
    """A matrix [H, F, K] with these singular values and random singular vectors."""
    random, count = np.random.default_rng(seed), len(singular_values)
    left = np.linalg.qr(random.standard_normal((shape[0], count)))[0]
    right = np.linalg.qr(random.standard_normal((shape[1] * shape[2], count)))[0]
    return ((left * singular_values) @ right.T).reshape(shape)


def random_rows(random, histories, power, columns=150):
    """Independent rows diag(i^-power) g, g standard normal."""
    scale = np.arange(1, columns + 1) ** -power
    return (random.standard_normal((histories, columns)) * scale).reshape(histories, -1, 10)
