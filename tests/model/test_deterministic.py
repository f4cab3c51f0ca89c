"""`PerturbConfig(deterministic=True)`: the transform's parameters with z held at one draw."""

import pytest
import torch
import transformers

import fastperturb
from fastperturb import PerturbConfig, noise, wrap

FAMILIES = ("diagonal", "lowrank", "gated", "affine", "mlp")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def held(transform="mlp", **options):
    return wrap(llama(), PerturbConfig(transform=transform, deterministic=True, **options))


def batch():
    ids = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def plain_logits(lm, ids):
    """The base's own, over embeddings that the held draw moves, all alike."""
    e = lm.base.get_input_embeddings()(ids)
    z = noise.latent(0, (1, 1, 1, lm.transform.latent_dim), latent=lm.config.latent)[0, 0, 0]
    return lm.base(inputs_embeds=lm.transform(e, z)).logits


@pytest.mark.parametrize("estimator", ["iwae", "jensen", "quadratic", "mlmc", "resample"])
@pytest.mark.parametrize("transform", FAMILIES)
def test_the_loss_is_the_plain_one_over_embeddings_moved_alike(transform, estimator):
    lm, inputs = held(transform, estimator=estimator), batch()
    out = lm(**inputs, seed=5)
    logits = plain_logits(lm, inputs["input_ids"])
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    assert out.log_probs.shape[0] == 1 and out.ess == 1
    parameters = list(lm.transform.parameters())
    ours = torch.autograd.grad(out.loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_nothing_that_keys_noise_changes_it():
    lm, inputs = held(), batch()
    expected = lm(**inputs, seed=0).log_probs
    rows = torch.arange(21).view(3, 7)
    packed = torch.arange(7).expand(3, 7).contiguous()
    for changes in ({"seed": 9}, {"rows": rows, "position_ids": packed}, {"num_samples": 5}):
        torch.testing.assert_close(lm(**inputs, **{"seed": 0, **changes}).log_probs, expected)
    score = lm.score(**inputs, num_samples=16)
    torch.testing.assert_close(score.log_marginal, expected[0])
    assert score.curve.num_samples == [1]


@pytest.mark.parametrize("mode", ["sequence", "token", "mixture"])
def test_every_decoding_mode_is_the_same_plain_model(mode):
    lm, ids = held(), batch()["input_ids"]
    found = lm.generate(ids, mode=mode, seed=3, max_new_tokens=5, num_return_sequences=1)
    for row in range(7, 12):
        expected = plain_logits(lm, found[:, :row])[:, -1].argmax(-1)
        assert (found[:, row] == expected).all()


def test_it_is_saved_as_what_it_is(tmp_path):
    lm, inputs = held(), batch()
    lm.save_pretrained(tmp_path)
    again = fastperturb.load(llama(), tmp_path)
    assert again.config.deterministic
    torch.testing.assert_close(again(**inputs, seed=8).loss, lm(**inputs, seed=1).loss)


def test_what_is_about_draws_is_refused():
    with pytest.raises(ValueError, match="deterministic=True has one"):
        PerturbConfig(antithetic=True, deterministic=True)
    with pytest.raises(TypeError, match="deterministic must be True or False"):
        PerturbConfig(deterministic=1)
    with pytest.raises(ValueError, match="no draws"):
        held().gradient_noise(**batch())
    with pytest.raises(ValueError, match="no draws"):
        held().standard_errors([batch()])
