"""`PerturbConfig(deterministic=True)`: the transform's parameters with z held at one sample."""

import pytest
import torch
from batches import batch
from tiny import llama, perturbed
from torch.nn import functional as F

import fastperturb
from fastperturb import PerturbConfig, noise

FAMILIES = ("diagonal", "lowrank", "gated", "affine", "mlp")


def deterministic(transform="mlp", **options):
    return perturbed(llama(), transform=transform, deterministic=True, **options)


def unpadded():
    ids = batch(length=7)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def plain_logits(lm, ids):
    """Return the base model's logits where every token has the held latent."""
    e = lm.base.get_input_embeddings()(ids)
    z = noise.latent(0, (1, 1, 1, lm.transform.latent_dim), latent=lm.config.latent)[0, 0, 0]
    return lm.base(inputs_embeds=lm.transform(e, z)).logits


@pytest.mark.parametrize("estimator", ["iwae", "jensen", "quadratic", "mlmc", "resample"])
@pytest.mark.parametrize("transform", FAMILIES)
def test_loss_is_the_cross_entropy_under_one_latent_for_all_tokens(transform, estimator):
    lm, inputs = deterministic(transform, estimator=estimator), unpadded()
    out = lm(**inputs, seed=5)
    logits = plain_logits(lm, inputs["input_ids"])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    assert out.log_probs.shape[0] == 1 and out.ess == 1
    parameters = list(lm.transform.parameters())
    ours = torch.autograd.grad(out.loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_seed_row_ids_positions_and_num_samples_change_nothing():
    lm, inputs = deterministic(), unpadded()
    expected = lm(**inputs, seed=0).log_probs
    rows = torch.arange(21).view(3, 7)
    packed = torch.arange(7).expand(3, 7).contiguous()
    for changes in ({"seed": 9}, {"rows": rows, "position_ids": packed}, {"num_samples": 5}):
        torch.testing.assert_close(lm(**inputs, **{"seed": 0, **changes}).log_probs, expected)
    score = lm.score(**inputs, num_samples=16)
    torch.testing.assert_close(score.log_marginal, expected[0])
    assert score.curve.num_samples == [1]


@pytest.mark.parametrize("mode", ["sequence", "token", "mixture"])
def test_every_decoding_mode_is_greedy_under_the_held_latent(mode):
    lm, ids = deterministic(), unpadded()["input_ids"]
    generated = lm.generate(ids, mode=mode, seed=3, max_new_tokens=5, num_return_sequences=1)
    for length in range(7, 12):
        expected = plain_logits(lm, generated[:, :length])[:, -1].argmax(-1)
        assert (generated[:, length] == expected).all()


def test_saved_deterministic_model_loads_as_deterministic(tmp_path):
    lm, inputs = deterministic(), unpadded()
    lm.save_pretrained(tmp_path)
    again = fastperturb.load(llama(), tmp_path)
    assert again.config.deterministic
    torch.testing.assert_close(again(**inputs, seed=8).loss, lm(**inputs, seed=1).loss)


def test_features_of_several_samples_are_rejected():
    with pytest.raises(ValueError, match="deterministic=True has only one"):
        PerturbConfig(antithetic=True, deterministic=True)
    with pytest.raises(TypeError, match="deterministic must be True or False"):
        PerturbConfig(deterministic=1)
    with pytest.raises(ValueError, match="deterministic=True has one latent"):
        deterministic().gradient_noise(**unpadded())
    with pytest.raises(ValueError, match="deterministic=True has one latent"):
        deterministic().standard_errors([unpadded()])
