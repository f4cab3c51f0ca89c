"""Histories, futures, matrices and plain ways to answer, which the tests of rank share."""

import random

import numpy as np
import torch

from fastperturb import PerturbConfig, wrap
from fastperturb.rank import ISAN

VOCAB = 97
BEGIN = (1,)


def token_sequences(count, shortest, longest, *, seed=0):
    """Random sequences of token ids from 3 to VOCAB, of random lengths."""
    generator = random.Random(seed)
    return [
        tuple(generator.randrange(3, VOCAB) for _ in range(generator.randint(shortest, longest)))
        for _ in range(count)
    ]


# Of all lengths; among the futures are prefixes of others, one twice, and the empty one.
HISTORIES = [*token_sequences(5, 0, 9), ()]
FUTURES = [(), (5,), (5, 6), (5, 6, 7), (8, 9), (5, 6), *token_sequences(3, 1, 6, seed=1)]


@torch.no_grad()
def log_probs_one_by_one(model, histories, futures, prompt=BEGIN):
    """Log-probs after each context [H, F, V], each by a pass of its own."""
    logits = [
        [
            model(input_ids=torch.tensor([prompt + history + future])).logits[0, -1]
            for future in futures
        ]
        for history in histories
    ]
    return torch.stack([torch.stack(row) for row in logits]).log_softmax(-1)


def perturbed(model, **options):
    """The model under a random perturbation, strong enough to change its predictions."""
    torch.manual_seed(2)
    return wrap(model, PerturbConfig(**{"latent_dim": 4, "init_scale": 1.0, **options}))


def small_isan(rank=3, vocab_size=6, length=9):
    """A random linear network, as an oracle of known rank."""
    return ISAN.random(vocab_size, length, rank, seed=1)


def small_sequences(count, length, *, vocab_size=6, seed=0):
    """Random sequences of one length over the alphabet of a small network."""
    generator = np.random.default_rng(seed)
    return [tuple(row) for row in generator.integers(vocab_size, size=(count, length)).tolist()]


def matrix_with_spectrum(singular_values, shape, seed=0):
    """A matrix [H, F, K] with these singular values and random singular vectors."""
    generator, count = np.random.default_rng(seed), len(singular_values)
    left = np.linalg.qr(generator.standard_normal((shape[0], count)))[0]
    right = np.linalg.qr(generator.standard_normal((shape[1] * shape[2], count)))[0]
    return ((left * singular_values) @ right.T).reshape(shape)


def matrix_of_random_rows(generator, histories, power, columns=150):
    """A matrix of independent rows diag(i^-power) g, with g standard normal."""
    scale = np.arange(1, columns + 1) ** -power
    return (generator.standard_normal((histories, columns)) * scale).reshape(histories, -1, 10)
