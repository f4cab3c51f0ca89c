import pytest
import torch

from fastperturb import PerturbConfig, noise
from fastperturb.config import LATENTS, TRANSFORMS
from fastperturb.transforms import make_transform

PARAMETERS = {
    "diagonal": {"s": (24,)},
    "lowrank": {"U": (6, 24)},
    "gated": {"U": (6, 24), "A": (24, 5), "C": (5, 24)},
    "affine": {"Ua": (6, 24), "Ub": (6, 24)},
    "mlp": {"A": (24, 5), "B": (6, 5), "b": (5,), "C": (5, 24)},
    "context": {"U": (6, 24), "A": (24, 5), "G": (5, 6), "decay": (5,)},
}


def transform_of(family, *, embed_dim=24, embed_rms=0.3, **options):
    torch.manual_seed(0)
    config = PerturbConfig(transform=family, **{"latent_dim": 6, "hidden_dim": 5, **options})
    return make_transform(config, embed_dim, embed_rms=embed_rms)


def shake(transform, amount=0.3):
    """Change every parameter from its special starting value."""
    with torch.no_grad():
        for value in transform.parameters():
            value += amount * value.std().nan_to_num(1.0).clamp_min(0.1) * torch.randn_like(value)
    return transform


def measured_scale(transform, latent):
    torch.manual_seed(1)
    e = transform.embed_rms * torch.randn(512, transform.embed_dim)
    z = noise.latent(5, (16, 1, 512, transform.latent_dim), latent=latent)[:, 0]
    return ((transform(e, z) - e).square().mean().sqrt() / transform.embed_rms).item()


@pytest.mark.parametrize("family", TRANSFORMS)
def test_parameters_have_the_contract_names_and_shapes(family):
    transform = transform_of(family)
    assert {n: tuple(p.shape) for n, p in transform.named_parameters()} == PARAMETERS[family]
    assert [name for name, _ in transform.named_buffers()] == ["embed_rms"]


@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_shift_is_zero_at_z_zero(family):
    transform = shake(transform_of(family))
    e = torch.randn(7, 24)
    assert torch.equal(transform(e, torch.zeros(7, transform.latent_dim)), e)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_every_entry_is_perturbed_where_z_is_not_zero(family):
    transform = shake(transform_of(family))
    e = torch.randn(7, 24)
    assert (transform(e, torch.randn(7, transform.latent_dim)) != e).all()


def by_hand(family, e, z, rho, p):
    """Compute the defining formula of one token's embedding, the first of its document."""
    x = e / rho
    if family == "diagonal":
        return e + rho * p["s"] * z
    if family == "lowrank":
        return e + rho * (p["U"].T @ z)
    if family == "gated":
        return e + rho * (1 + torch.tanh(p["C"].T @ (p["A"].T @ x))) * (p["U"].T @ z)
    if family == "affine":
        return (1 + p["Ua"].T @ z) * e + rho * (p["Ub"].T @ z)
    if family == "context":
        h = (1 - torch.sigmoid(p["decay"])) * (p["A"].T @ x)
        return e + rho * (p["U"].T @ (z * (1 + torch.tanh(p["G"].T @ h))))
    gelu = lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5))  # noqa: E731
    rest = p["A"].T @ x + p["b"]
    return e + rho * (p["C"].T @ gelu(rest + p["B"].T @ z) - p["C"].T @ gelu(rest))


@pytest.mark.parametrize("family", TRANSFORMS)
def test_forward_is_the_defining_formula(family):
    transform = shake(transform_of(family)).double()
    e, z = torch.randn(24).double(), torch.randn(transform.latent_dim).double()
    expected = by_hand(family, e, z, transform.embed_rms, dict(transform.named_parameters()))
    torch.testing.assert_close(transform(e[None], z)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_starting_shift_has_the_configured_scale_relative_to_the_embeddings(family, latent):
    transform = transform_of(family, init_scale=0.15, latent=latent, embed_dim=96)
    assert measured_scale(transform, latent) == pytest.approx(0.15, rel=0.06)
    assert transform.scale().item() == pytest.approx(0.15, rel=1e-5)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_floor_lifts_a_shrunken_shift_and_leaves_a_large_one(family):
    floored = transform_of(family, init_scale=0.2, min_scale=0.1)
    free = transform_of(family, init_scale=0.2)
    e, z = 0.3 * torch.randn(9, 24), torch.randn(9, free.latent_dim)
    torch.testing.assert_close(floored(e, z), free(e, z))
    with torch.no_grad():
        for name in floored.outer:
            getattr(floored, name).mul_(0.01)
    assert floored.scale().item() == pytest.approx(0.002, rel=1e-4)
    assert measured_scale(floored, "gaussian") == pytest.approx(0.1, rel=0.12)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_a_floor_above_the_starting_scale_applies_at_once(family):
    transform = transform_of(family, init_scale=0.1, min_scale=0.3, embed_dim=96)
    assert measured_scale(transform, "gaussian") == pytest.approx(0.3, rel=0.1)


def test_the_floor_keeps_the_gradient_of_the_direction():
    transform = transform_of("lowrank", init_scale=0.2, min_scale=0.2)
    with torch.no_grad():
        transform.U.mul_(0.1)
    transform(torch.zeros(3, 24), torch.randn(3, 6)).square().sum().backward()
    along = (transform.U.grad * transform.U).sum().abs()
    assert along < 1e-5 * transform.U.grad.norm() * transform.U.norm()  # its length is pinned
    assert transform.U.grad.norm() > 0


@pytest.mark.parametrize("family", TRANSFORMS)
def test_a_shift_of_exactly_zero_under_a_floor_stays_finite(family):
    transform = transform_of(family, min_scale=0.1)
    with torch.no_grad():
        for name in transform.outer:
            getattr(transform, name).zero_()
    e = torch.randn(3, 24)
    perturbed = transform(e, torch.randn(3, transform.latent_dim))
    perturbed.square().sum().backward()
    assert torch.equal(perturbed, e)
    assert all(torch.isfinite(value.grad).all() for value in transform.parameters())


@pytest.mark.parametrize("family", TRANSFORMS)
def test_repr_shows_shapes_latent_and_scale(family):
    text = repr(transform_of(family, scope="sequence", min_scale=0.1))
    for part in (*PARAMETERS[family], "gaussian", "sequence", "scale=0.2", "min_scale=0.1"):
        assert part in text
    assert "\n" not in text


def test_diagonal_ignores_latent_dim():
    assert transform_of("diagonal", latent_dim=3).latent_dim == 24


@pytest.mark.parametrize("embed_dim", [0, -4, 2.0, True])
def test_an_invalid_embed_dim_raises(embed_dim):
    with pytest.raises(ValueError, match="embed_dim must be a positive int"):
        make_transform(PerturbConfig(), embed_dim)


@pytest.mark.parametrize("embed_rms", [0.0, -1.0, float("nan")])
def test_an_invalid_embed_rms_raises(embed_rms):
    with pytest.raises(ValueError, match="embed_rms must be a finite number above 0"):
        make_transform(PerturbConfig(), 8, embed_rms=embed_rms)
