"""Wide latents and long prefixes: R up to 256 and T up to 8192."""

import pytest
import torch

from fastperturb import PerturbConfig, ops
from fastperturb.ops import reference
from fastperturb.transforms import make_transform

R, T, D, M = 256, 8192, 64, 2


def of(family):
    torch.manual_seed(0)
    config = PerturbConfig(transform=family, latent_dim=R, hidden_dim=R, init_scale=0.5)
    transform = make_transform(config, D, embed_rms=0.5)
    with torch.no_grad():
        for value in transform.parameters():
            value += 0.1 * value.std().clamp_min(0.1) * torch.randn_like(value)
    return transform


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("family", ["lowrank", "gated", "affine", "mlp", "context"])
def test_256_latents_at_8192_positions_are_the_oracles(family):
    transform, exact = of(family), of(family).double()
    embeddings = torch.randn(1, T, D, requires_grad=True)
    upstream = torch.randn(M, 1, T, D)
    out = ops.perturb_embed(embeddings, None, transform, 5, M)
    leaves = [embeddings, *transform.parameters()]
    ours = [out, *torch.autograd.grad(out, leaves, upstream)]
    wide = embeddings.detach().double().requires_grad_()
    right = reference.perturb_embed(wide, None, exact, 5, M)
    leaves = [wide, *exact.parameters()]
    expected = [right, *torch.autograd.grad(right, leaves, upstream.double())]
    for value, truth in zip(ours, expected, strict=True):
        assert (value - truth).norm() <= 2e-5 * truth.norm()
