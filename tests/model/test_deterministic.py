"""`PerturbConfig(deterministic=True)`: the transform's parameters, and z by the token alone."""

import json

import pytest
import torch
from batches import batch
from tiny import llama, perturbed
from torch.nn import functional as F

import fastperturb
from fastperturb import PerturbConfig, noise
from fastperturb.checkpoint.atomic import digest

FAMILIES = ("diagonal", "lowrank", "gated", "affine", "mlp")


SCOPES = ("token", "sequence")


def deterministic(transform="mlp", **options):
    return perturbed(llama(), transform=transform, deterministic=True, **options)


def unpadded():
    ids = batch(length=7)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def plain_logits(lm, ids):
    """Return the base model's logits where a token's latent is that of its id as a position."""
    e = lm.base.get_input_embeddings()(ids)
    z = noise.latent(
        0,
        (1, *ids.shape, lm.transform.latent_dim),
        latent=lm.config.latent,
        scope=lm.config.scope,
        rows=torch.zeros_like(ids[:, 0]),
        positions=ids,
    )[0]
    return lm.base(inputs_embeds=lm.transform(e, z)).logits


def latents_of(lm, ids):
    """Return the latents of tokens [B, T, R], which lowrank's shifts tell."""
    e = torch.zeros(*ids.shape, lm.transform.embed_dim)
    shifts = lm.perturb(e, torch.tensor(9), torch.arange(1), rows=torch.arange(len(ids)), ids=ids)
    U = lm.transform.U * lm.transform.embed_rms
    return torch.linalg.lstsq(U.T, shifts[0].flatten(0, 1).T).solution.T.unflatten(0, ids.shape)


def test_a_token_always_has_one_latent_and_two_tokens_never_share_it():
    lm, ids = deterministic("lowrank"), torch.tensor([[3, 7, 3], [7, 5, 3]])
    z = latents_of(lm, ids)
    for token in (3, 5, 7):
        own = z[ids == token]
        torch.testing.assert_close(own, own[:1].expand_as(own))
        others = z[ids != token]
        assert ((others - own[0]).abs().amax(-1) > 0.1).all()


def test_scope_sequence_has_one_latent_for_all_tokens():
    lm = deterministic("lowrank", scope="sequence")
    z = latents_of(lm, torch.tensor([[3, 7, 3], [7, 5, 3]]))
    torch.testing.assert_close(z, z[:1, :1].expand_as(z))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("estimator", ["iwae", "jensen", "quadratic", "mlmc", "resample"])
@pytest.mark.parametrize("transform", FAMILIES)
def test_loss_is_the_cross_entropy_under_the_latents_of_the_tokens(transform, estimator, scope):
    lm, inputs = deterministic(transform, estimator=estimator, scope=scope), unpadded()
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
@pytest.mark.parametrize("scope", SCOPES)
def test_every_decoding_mode_is_greedy_under_the_latents_of_the_tokens(mode, scope):
    lm, ids = deterministic(scope=scope), unpadded()["input_ids"]
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


def test_a_checkpoint_of_0_2_0_keeps_its_one_latent_for_all_tokens(tmp_path):
    lm, inputs = deterministic(scope="sequence"), unpadded()
    lm.save_pretrained(tmp_path)
    path = tmp_path / "perturbation_config.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["scope"] = "token"
    manifest["config"]["antithetic"] = False
    for key in ("sampling", "group_size"):
        del manifest["config"][key]
    del manifest["sha256"]
    manifest["sha256"] = digest(manifest)
    path.write_text(json.dumps(manifest))
    again = fastperturb.load(llama(), tmp_path)
    torch.testing.assert_close(again(**inputs).log_probs, lm(**inputs).log_probs)


def test_embeddings_without_ids_are_rejected_but_for_one_latent_for_all_tokens():
    ids = unpadded()["input_ids"]
    lm = deterministic()
    e = lm.base.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="give input_ids, or use scope='sequence'"):
        lm(inputs_embeds=e, labels=ids)
    with pytest.raises(ValueError, match="give input_ids, or use scope='sequence'"):
        lm.perturb(e, torch.tensor(0), torch.arange(1), rows=torch.arange(3))
    with lm.exact():
        assert lm(inputs_embeds=e, labels=ids).loss.isfinite()
    lm = deterministic(scope="sequence")
    torch.testing.assert_close(lm(inputs_embeds=e, labels=ids).loss, lm(ids, labels=ids).loss)


def test_features_of_several_samples_are_rejected():
    with pytest.raises(ValueError, match="deterministic=True has only one"):
        PerturbConfig(antithetic=True, deterministic=True)
    with pytest.raises(TypeError, match="deterministic must be True or False"):
        PerturbConfig(deterministic=1)
    with pytest.raises(ValueError, match="deterministic=True has one latent"):
        deterministic().gradient_noise(**unpadded())
    with pytest.raises(ValueError, match="deterministic=True has one latent"):
        deterministic().standard_errors([unpadded()])
