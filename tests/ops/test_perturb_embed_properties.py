"""Properties of perturb_embed for every shape, family, distribution and seed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastperturb import PerturbConfig, ops
from fastperturb.config import LATENTS, SCOPES, TRANSFORMS
from fastperturb.transforms import make_transform

settings.register_profile("ops", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("ops")


@st.composite
def calls(draw):
    """Draw a transform, its embeddings [B, T, D], and the keyword arguments of a call."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    D = draw(st.integers(1, 70))
    config = PerturbConfig(
        transform=draw(st.sampled_from(TRANSFORMS)),
        latent=draw(st.sampled_from(LATENTS)),
        scope=draw(st.sampled_from(SCOPES)),
        latent_dim=draw(st.integers(1, 21)),
        hidden_dim=draw(st.integers(1, 9)),
    )
    transform = make_transform(config, D, embed_rms=0.7)
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    options = {
        "seed": draw(st.integers(-(2**63), 2**64 - 1)),
        "samples": 2 * draw(st.integers(1, 4)),
        "antithetic": draw(st.booleans()),
    }
    return transform, torch.randn(*shape, D), options


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@given(calls(), st.data())
def test_any_subset_of_samples_and_rows_gives_the_same_numbers(call, data):
    transform, e, options = call
    whole = ops.perturb_embed(e, None, transform, **options)
    M, B = whole.shape[:2]
    samples = torch.tensor(data.draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=M)))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=B)))
    options["samples"] = samples
    part = ops.perturb_embed(e[rows], None, transform, rows=rows, **options)
    close(part, whole[samples][:, rows])


@given(calls(), st.randoms(use_true_random=False))
def test_permuting_samples_permutes_the_output(call, random):
    transform, e, options = call
    whole = ops.perturb_embed(e, None, transform, **options)
    order = list(range(len(whole)))
    random.shuffle(order)
    options["samples"] = torch.tensor(order)
    close(ops.perturb_embed(e, None, transform, **options), whole[order])


@given(calls(), st.data())
def test_masked_embeddings_stay_and_the_others_are_as_without_a_mask(call, data):
    transform, e, options = call
    bits = data.draw(st.lists(st.booleans(), min_size=e[..., 0].numel(), max_size=200))
    mask = torch.tensor(bits[: e[..., 0].numel()]).reshape(e.shape[:2])
    out = ops.perturb_embed(e, None, transform, perturb_mask=mask, **options)
    assert torch.equal(out[:, ~mask], e[~mask].expand(len(out), -1, -1))
    close(out[:, mask], ops.perturb_embed(e, None, transform, **options)[:, mask])


@given(calls(), st.data())
def test_shifts_are_the_distances_of_the_output_and_0_where_masked(call, data):
    transform, e, options = call
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=36, max_size=36)))
    mask = mask[: e[..., 0].numel()].view(e.shape[:2])
    options = {"perturb_mask": mask, **options}
    out, shift = ops.perturb_embed(e, None, transform, **options, return_shift=True)
    close(shift, (out - e).norm(dim=-1))
    assert (shift[:, ~mask] == 0).all()


@given(calls(), st.data())
def test_any_subset_of_samples_and_rows_has_the_same_shifts(call, data):
    transform, e, options = call
    _, whole = ops.perturb_embed(e, None, transform, **options, return_shift=True)
    M, B = whole.shape[:2]
    samples = torch.tensor(data.draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=M)))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=B)))
    options["samples"] = samples
    _, part = ops.perturb_embed(e[rows], None, transform, rows=rows, **options, return_shift=True)
    close(part, whole[samples][:, rows])


@given(calls())
def test_the_gradient_is_the_sum_of_the_per_sample_gradients(call):
    transform, e, options = call
    seed, samples = options.pop("seed"), options.pop("samples")
    out = ops.perturb_embed(e, None, transform, seed, samples, **options)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    psi = ops.perturb_embed_per_sample_grad(upstream, e, None, transform, seed, samples, **options)
    for name, value in transform.named_parameters():
        total, size = psi[name].sum((0, 1)), psi[name].abs().sum()
        assert (total - value.grad).norm() <= 1e-5 * size + 1e-6
