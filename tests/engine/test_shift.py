"""The shift of a call: the mean of |T(e) - e| / |e| over samples and perturbed positions."""

import dataclasses

import pytest
import torch
from batches import batch
from tiny import llama, perturbed

from fastperturb import noise
from fastperturb.config import TRANSFORMS
from fastperturb.engine.continuous import Continuous
from fastperturb.engine.trunk import shift_norms


def shifted(lm, inputs, *, count):
    """Return |T(e, z) - e| / |e| [count, B, T] in fp64, by the transform's formula."""
    e = lm.base.get_input_embeddings()(inputs["input_ids"]).double()
    shape = (count, *e.shape[:2], lm.transform.latent_dim)
    z = noise.latent(5, shape, strata=lm.config.strata(count))
    parameters = [value.double() for value in lm.transform.effective_parameters()]
    rho = lm.transform.embed_rms.double()
    perturbed_embeddings = type(lm.transform).formula(e, z.double(), rho, *parameters)
    return (perturbed_embeddings - e).norm(dim=-1) / e.norm(dim=-1)


@pytest.mark.parametrize("plan", ["batched", "chunked"])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_shift_of_a_16_bit_model_is_measured_before_its_embeddings_are_rounded(family, plan):
    """At this scale rounding to bfloat16 adds as much as the perturbation itself."""
    lm = perturbed(llama().bfloat16(), transform=family, init_scale=2e-3, num_samples=4, plan=plan)
    inputs = batch()
    expected = shifted(lm, inputs, count=4)[:, inputs["attention_mask"].bool()].mean()
    assert lm(**inputs, seed=5).shift.item() == pytest.approx(expected.item(), rel=1e-3)


def test_shift_of_continuous_samples_takes_no_pass_over_their_embeddings(monkeypatch):
    lm, inputs = perturbed(llama(), num_samples=4, plan="batched"), batch()
    passes = []

    def kept(lm, laid_out, samples):
        passes.append(Continuous.trunk_inputs(lm.perturbation, lm, laid_out, samples))
        return passes[-1]

    monkeypatch.setattr(lm.perturbation, "trunk_inputs", kept)
    lm(**inputs, seed=5)
    (trunk_inputs,) = passes
    e = lm.base.get_input_embeddings()(inputs["input_ids"])
    unreadable = dataclasses.replace(trunk_inputs, embeddings=None)
    norms = shift_norms(unreadable, torch.full_like(e, torch.nan))
    real = inputs["attention_mask"].bool()
    expected = shifted(lm, inputs, count=4).sum(0).where(real, 0.0)
    torch.testing.assert_close(norms / e.norm(dim=-1), expected.float(), rtol=1e-4, atol=0)


def test_shift_has_no_gradient_and_is_fp32_for_a_model_in_fp64():
    lm = perturbed(llama().double(), num_samples=2)
    shift = lm(**batch(), seed=5).shift
    assert shift.dtype == torch.float32 and not shift.requires_grad
