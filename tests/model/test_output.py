"""The fields of a call's output: which are there, in what order, and what they measure."""

import pytest
import torch
from batches import batch, labelled
from oracles import sample_logits
from tiny import base_model, llama, perturbed

from fastperturb import noise


def test_call_without_labels_returns_only_the_logits_asked_for():
    lm = perturbed(base_model("Gemma2"), num_samples=3)
    inputs = {name: value for name, value in batch(unlabelled=4).items() if name != "labels"}
    out = lm(**inputs, seed=5)
    assert out.loss is None and out.log_probs is None and out.logits is None
    logits = lm(**inputs, seed=5, return_logits=True).logits
    expected = sample_logits(lm, inputs, seed=5, num_samples=3).softmax(-1).mean(0).log()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_ess_and_shift_match_their_definitions():
    lm = perturbed(llama(), num_samples=5)
    inputs = batch(unlabelled=4)
    out = lm(**inputs, seed=5)
    weights = out.log_probs.softmax(0)
    ess = (1 / weights.square().sum(0))[labelled(inputs)].mean()
    assert out.ess.item() == pytest.approx(ess.item(), rel=1e-5)
    e = lm.base.get_input_embeddings()(inputs["input_ids"])
    z = noise.latent(5, (5, 3, 9, 16))
    shifts = (lm.transform(e, z) - e).norm(dim=-1) / e.norm(dim=-1)
    shift = shifts[:, inputs["attention_mask"].bool()].mean()
    assert out.shift.item() == pytest.approx(shift.item(), rel=1e-4)


def test_loss_is_the_first_item_of_the_output():
    out = perturbed(llama())(**batch(unlabelled=4), return_logits=True)
    assert out[0] is out.loss
    known = ["log_marginal", "log_probs", "ess", "shift", "log_prob_variance", "logits"]
    assert list(out) == ["loss", *known]


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_log_prob_variance_is_the_variance_over_samples(marginal):
    inputs = batch(unlabelled=4)
    lm = perturbed(llama(), num_samples=6, marginal=marginal)
    out = lm(**inputs, seed=5)
    mask = labelled(inputs)
    log_probs = out.log_probs if marginal == "token" else out.log_probs.sum(-1)
    mask = mask if marginal == "token" else mask.any(-1)
    torch.testing.assert_close(out.log_prob_variance, log_probs.var(0)[mask].mean())
    assert lm(**inputs, num_samples=1).log_prob_variance == 0
