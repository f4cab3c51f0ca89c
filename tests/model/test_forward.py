"""The tokens that are perturbed and their latents: padding, packing, seeds, masks, exact mode."""

import pytest
import torch
import transformers
from batches import IGNORED, batch
from tiny import base_model, llama, perturbed
from torch.nn import functional as F


def test_left_padded_tokens_keep_their_latents():
    lm = perturbed(llama(), num_samples=3)
    plain = batch(size=1, right=0, unlabelled=4)
    padded = {
        "input_ids": F.pad(plain["input_ids"], (4, 0), value=1),
        "attention_mask": F.pad(plain["attention_mask"], (4, 0)),
        "labels": F.pad(plain["labels"], (4, 0), value=IGNORED),
    }
    alone, shifted = lm(**plain, seed=5), lm(**padded, seed=5)
    torch.testing.assert_close(shifted.log_probs[:, :, 4:], alone.log_probs, rtol=1e-3, atol=1e-4)


def test_exact_runs_the_base_model_unperturbed():
    for estimator in ("iwae", "quadratic", "mlmc"):
        lm = perturbed(llama(), estimator=estimator)
        inputs = batch(unlabelled=4)
        with lm.exact():
            out = lm(**inputs)
        expected = lm.base(**inputs).loss
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert out.shift == 0 and out.log_probs.shape[0] == 1
        assert lm(**inputs, seed=5).shift > 0  # and perturbs again outside


def test_empty_perturb_mask_equals_exact():
    lm = perturbed(llama())
    inputs = batch(unlabelled=4)
    masked = lm(**inputs, perturb_mask=torch.zeros(3, 9, dtype=torch.bool))
    with lm.exact():
        exact = lm(**inputs)
    assert masked.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert masked.shift == 0


def test_seed_decides_the_latents_and_eval_mode_perturbs_too():
    lm = perturbed(llama()).eval()
    inputs = batch(unlabelled=4)
    one, same, other = (lm(**inputs, seed=seed).loss for seed in (5, 5, 6))
    assert one == same and one != other
    torch.manual_seed(3)
    drawn = lm(**inputs).loss
    torch.manual_seed(3)
    assert lm(**inputs).loss == drawn
    assert lm(**inputs).loss != drawn


def test_inputs_embeds_have_the_loss_of_their_ids():
    lm = perturbed(llama())
    inputs = batch(unlabelled=4)
    embeddings = lm.base.get_input_embeddings()(inputs.pop("input_ids"))
    loss = lm(**inputs, inputs_embeds=embeddings, seed=5).loss
    assert loss == lm(**batch(unlabelled=4), seed=5).loss


def test_embed_rms_includes_the_scale_of_the_embedding_module():
    lm = perturbed(base_model("Gemma2"), init_scale=0.25)
    embed = lm.base.get_input_embeddings()
    rms = embed(torch.arange(97)).square().mean().sqrt()
    assert lm.transform.embed_rms.item() == pytest.approx(rms.item(), rel=1e-5)
    assert rms > 2 * embed.weight.square().mean().sqrt()
    out = lm(**batch(unlabelled=4), num_samples=64)
    assert out.shift.item() == pytest.approx(0.25, rel=0.2)


def test_transform_is_fp32_under_any_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        lm = perturbed(llama())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in lm.transform.parameters()} == {torch.float32}


def test_base_that_returns_tuples_has_the_same_loss():
    lm = perturbed(llama(), num_samples=3)
    expected = lm(**batch(unlabelled=4), seed=5).loss
    lm.base.config.return_dict = False
    assert lm(**batch(unlabelled=4), seed=5).loss == expected


def test_pretrained_model_keeps_its_likelihood_under_exact(data_dir):
    folder = data_dir / "models" / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (data_dir / "extra_tinystories" / "sample.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    lm = perturbed(model, init_scale=0.1, num_samples=16).eval()
    with torch.no_grad():
        with lm.exact():
            exact = lm(input_ids=ids, labels=ids).loss
        loss = lm(input_ids=ids, labels=ids, seed=1).loss
        assert exact.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    assert exact < 1.6
    assert exact < loss < exact + 0.3


def test_collapsed_perturbation_warns_once_in_train_mode():
    lm = perturbed(llama(), num_samples=2)
    lm(**batch(unlabelled=4))  # no warning, which would be an error
    with torch.no_grad():
        lm.transform.U *= 1e-3
    lm.eval()(**batch(unlabelled=4))
    with pytest.warns(RuntimeWarning, match="the perturbation has collapsed.*min_scale"):
        lm.train()(**batch(unlabelled=4))
    lm(**batch(unlabelled=4))
