"""Generators and prefixes for the tests of the demo."""

import torch
from torch import Tensor

from fastperturb.demo import language


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_prefixes() -> Tensor:
    tokens = torch.arange(language.VOCAB)
    return torch.cartesian_prod(tokens, tokens)
