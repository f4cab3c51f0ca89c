"""Edits and noise together, against a loop that edits and perturbs one prefix at a time."""

import dataclasses
import json

import pytest
import tiny
import torch
from batches import IGNORED, labelled, positions_of, row_of
from edit_cases import (
    ARCHITECTURES,
    LAYOUTS,
    MODES,
    SEED,
    base_model,
    edited_lm,
    edits_of,
    hybrid_lm,
    left_padded,
    naive_greedy,
    naive_log_probs,
    packed,
    plain,
    right_padded,
    some_tokens,
)
from oracles import assert_same_gradients
from torch.nn import functional as F

import fastperturb
from fastperturb import EditConfig, PerturbConfig, estimators, wrap
from fastperturb.config import ESTIMATORS, TRANSFORMS
from fastperturb.engine.hybrid import Hybrid, HybridConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_match_a_loop_that_edits_and_perturbs_each_prefix(architecture, layout):
    lm, inputs = hybrid_lm(architecture), layout()
    naive = naive_log_probs(lm, inputs)
    torch.testing.assert_close(lm(**inputs, seed=SEED).log_probs, naive, **CLOSE)


@pytest.mark.parametrize(
    "drawn",
    [
        {"sampling": "antithetic"},
        {"sampling": "stratified"},
        {"scope": "sequence", "sampling": "stratified"},
        {"latent": "rademacher", "latent_dim": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [left_padded, packed])
def test_samples_of_a_group_share_latents_of_the_contract_and_no_edits(layout, drawn):
    lm, inputs = hybrid_lm(**drawn), layout()
    naive = naive_log_probs(lm, inputs)
    torch.testing.assert_close(lm(**inputs, seed=SEED).log_probs, naive, **CLOSE)
    edits = edits_of(edited_lm(), inputs["input_ids"], 4)
    for sample in range(0, 4, 2):
        assert not torch.equal(edits.ids[sample], edits.ids[sample + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_context_of_a_latent_is_that_of_its_own_copy(layout):
    lm, inputs = hybrid_lm(transform="context", hidden_dim=5), layout()
    with torch.no_grad():
        lm.transform.G.normal_()
    naive = naive_log_probs(lm, inputs)
    torch.testing.assert_close(lm(**inputs, seed=SEED).log_probs, naive, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_decoding_carries_the_context_of_each_copy(mode):
    lm, inputs = hybrid_lm(transform="context", hidden_dim=5), left_padded()
    with torch.no_grad():
        lm.transform.G.normal_()
    ids, mask = inputs["input_ids"][:, -7:], inputs["attention_mask"][:, -7:]
    mask[1, :2] = 0
    expected = naive_greedy(lm, ids, mask, MODES[mode], steps=3)
    generated = lm.generate(
        ids, mask, mode=mode, seed=SEED, max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_without_edits_the_numbers_are_those_of_noise_alone(family):
    options = {"transform": family, "num_samples": 4, "sampling": "stratified"}
    torch.manual_seed(3)
    noisy = wrap(base_model(), PerturbConfig(**options, init_scale=0.7, latent_dim=3))
    hybrid = hybrid_lm(edits={"rate": 0.0}, **options)
    for layout in (left_padded, packed):
        ours, expected = (lm(**layout(), seed=SEED) for lm in (hybrid, noisy))
        for name in ("loss", "log_probs", "shift"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for mode in MODES:
        prompts = some_tokens(length=5).clamp_min(3)
        texts = [
            lm.generate(prompts, mode=mode, seed=SEED, do_sample=False, max_new_tokens=4)
            for lm in (hybrid, noisy)
        ]
        assert torch.equal(*texts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_noise_the_samples_are_those_of_edits_alone(layout):
    hybrid, edited = hybrid_lm(init_scale=1e-9), edited_lm()
    ours, expected = (lm(**layout(), seed=SEED).log_probs for lm in (hybrid, edited))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_log_probs_depend_on_no_later_token():
    lm, inputs = hybrid_lm(edits={"rate": 0.8}, num_samples=8), plain()
    ids = inputs["input_ids"]
    before = lm(**inputs, seed=SEED).log_probs
    for changed in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, changed] = 7
        after = lm(**{**inputs, "input_ids": other}, seed=SEED).log_probs
        torch.testing.assert_close(after[..., :changed], before[..., :changed])


def test_samples_do_not_depend_on_padding_or_packing():
    lm, inputs = hybrid_lm(), plain()
    whole = lm(**inputs, seed=SEED).log_probs
    for sides in ((0, 5), (5, 0), (2, 3)):
        padded = {name: F.pad(value, sides) for name, value in inputs.items()}
        padded["attention_mask"] = F.pad(torch.ones_like(inputs["input_ids"]), sides)
        outside = padded["attention_mask"] == 0
        outside[:, sides[0]] = True  # nothing precedes the first token of a document
        padded["labels"] = padded["labels"].masked_fill(outside, IGNORED)
        log_probs = lm(**padded, seed=SEED).log_probs[..., sides[0] : sides[0] + 10]
        torch.testing.assert_close(log_probs, whole)
    documents = packed()
    together = lm(**documents, seed=SEED).log_probs
    for start, stop in ((0, 4), (4, 11)):
        document = {name: documents[name][:1, start:stop] for name in ("input_ids", "labels")}
        alone = lm(**document, rows=documents["rows"][0, start : start + 1], seed=SEED).log_probs
        torch.testing.assert_close(together[:, :1, start : stop - 1], alone)


@pytest.mark.parametrize("plan", ["batched", "chunked"])
@pytest.mark.parametrize("estimator", ["jensen", "iwae", "jvi_clip"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_loss_and_gradients_are_those_of_the_loop(marginal, estimator, plan):
    lm = hybrid_lm(marginal=marginal, estimator=estimator, plan=plan, chunk_size=None)
    inputs = right_padded()
    loss = lm(**inputs, seed=SEED).loss
    log_probs, mask = naive_log_probs(lm, inputs), labelled(inputs)
    if marginal == "sequence":
        log_probs = log_probs.sum(-1)
    events = mask if marginal == "token" else mask.any(-1)
    value, _ = estimators.combine(log_probs, estimator, mask=events)
    naive = -value.sum() / mask.sum()
    torch.testing.assert_close(loss, naive, **CLOSE)
    names, parameters = zip(*lm.named_parameters())
    ours = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(naive, parameters)
    assert_same_gradients(ours, expected, rel=1e-3, floor=1e-5, names=names)


@pytest.mark.parametrize(
    ("estimator", "plan"),
    [*((name, "chunked") for name in ESTIMATORS), ("iwae", "resample"), ("resample", "resample")],
)
def test_every_estimator_has_the_same_gradients_under_every_plan(estimator, plan):
    inputs, results = packed(), []
    if plan == "resample":  # both draw the samples that they run again
        choices = ({"plan": "resample"}, {"plan": "resample", "chunk_size": 1})
    else:
        choices = ({"plan": "batched"}, {"plan": "chunked", "chunk_size": 3})
    for choice in choices:
        lm = hybrid_lm(estimator=estimator, num_samples=8, **choice)
        lm.train(estimator != "jvi")  # jvi is for evaluation
        out = lm(**inputs, seed=SEED)
        out.loss.backward()
        results.append((out, [parameter.grad for parameter in lm.parameters()]))
    (whole, batched), (parts, chunked) = results
    torch.testing.assert_close(parts.log_probs, whole.log_probs, equal_nan=True)
    torch.testing.assert_close(parts.shift, whole.shift)
    assert_same_gradients(chunked, batched, rel=1e-3, floor=1e-6)
    assert all(gradient.norm() > 0 for gradient in batched)


def test_shift_is_that_of_the_noise_where_labels_are_predicted():
    lm, inputs = hybrid_lm(), plain()
    edits = edits_of(edited_lm(), inputs["input_ids"], 4)
    e = lm.base.get_input_embeddings()(inputs["input_ids"])
    out = lm(**inputs, seed=SEED)
    z = fastperturb.noise.latent(SEED, (4, *edits.ids.shape[1:], 3))
    shift = (z @ lm.transform.U * lm.transform.embed_rms).norm(dim=-1)  # of lowrank, any embedding
    ratio = shift.gather(2, edits.source) / e.norm(dim=-1)
    kept = (e.norm(dim=-1) > 0).expand_as(ratio)
    assert out.shift.item() == pytest.approx(ratio[kept].mean().item(), rel=1e-4)
    assert hybrid_lm(init_scale=1e-6)(**inputs, seed=SEED).shift < 1e-5


@pytest.mark.parametrize("layout", [plain, right_padded])
def test_neither_padding_nor_what_a_shorter_copy_lacks_is_perturbed(layout):
    lm, inputs, seen = hybrid_lm(plan="batched"), layout(), []

    def keep(trunk, args, kwargs):
        seen.append(kwargs["inputs_embeds"].unflatten(0, (4, 3)))

    hook = lm.base.model.register_forward_pre_hook(keep, with_kwargs=True)
    lm(**inputs, seed=SEED)
    hook.remove()
    mask = inputs.get("attention_mask")
    editable = None if mask is None else mask.bool()
    edits = edits_of(edited_lm(), inputs["input_ids"], 4, editable=editable, attention_mask=mask)
    is_empty = edits.origin < 0
    if mask is not None:
        assert torch.equal(is_empty, edits.attention_mask == 0)
    exact = lm.base.get_input_embeddings()(edits.ids)
    assert is_empty.any() and torch.equal(seen[0][is_empty], exact[is_empty])
    changed = (seen[0] != exact).any(-1)
    assert torch.equal(changed, ~is_empty)


def test_a_collapse_of_the_noise_is_noticed_behind_the_edits():
    lm = hybrid_lm().train()
    with torch.no_grad():
        lm.transform.U *= 1e-4
    with pytest.warns(RuntimeWarning, match="the perturbation has collapsed"):
        lm(**plain(), seed=SEED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", ["independent", "stratified", "antithetic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_matches_a_loop_that_edits_and_perturbs_the_prefix(architecture, sampling, mode):
    lm, inputs = hybrid_lm(architecture, sampling=sampling), left_padded()
    ids, mask = inputs["input_ids"][:, -7:], inputs["attention_mask"][:, -7:]
    mask[1, :2] = 0
    expected = naive_greedy(lm, ids, mask, MODES[mode], steps=3)
    generated = lm.generate(
        ids, mask, mode=mode, seed=SEED, max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generated, expected)


def test_score_agrees_with_forward():
    lm, ids = hybrid_lm(sampling="stratified"), some_tokens()
    score = lm.score(ids, num_samples=16, seed=SEED)
    with lm.overriding(group_size=2):
        out = lm(input_ids=ids, labels=ids, num_samples=16, seed=SEED)
    torch.testing.assert_close(score.log_marginal, out.log_marginal)
    assert score.nll_standard_error > 0


def test_exact_runs_the_base_model():
    lm, inputs = hybrid_lm(), left_padded()
    with lm.exact():
        exact = lm(**inputs)
    mask, kept = inputs["attention_mask"], labelled(inputs)
    logits = lm.base(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions_of(mask)
    ).logits
    index = inputs["labels"][:, 1:].where(kept, 0)[..., None]
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, index)[..., 0]
    torch.testing.assert_close(exact.log_marginal, expected.where(kept, 0.0))


def test_no_copy_exceeds_the_positions_of_the_model():
    base = base_model("GPT2", positions=11)
    lm = hybrid_lm(base=base, edits={"kinds": ("insert", "delete"), "rate": 0.9})
    naive = naive_log_probs(lm, packed(), positions_in_model=11)
    torch.testing.assert_close(lm(**packed(), seed=SEED).log_probs, naive, **CLOSE)


def test_gradient_noise_is_measured():
    measured = hybrid_lm(latent_dim=1).gradient_noise(**row_of(plain(), 0), repeats=3, seed=0)
    assert measured.rows[0].variance > 0


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_saved_hybrid_loads_as_one_and_computes_the_same(tmp_path, adapted):
    base = tiny.with_lora(base_model()) if adapted else base_model()
    lm = hybrid_lm(base=base, edits={"kinds": ("swap", "delete")}, sampling="antithetic").eval()
    with torch.no_grad():
        lm.transform.U *= 1.5
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(base_model(), tmp_path)
    assert isinstance(loaded.perturbation, Hybrid) and loaded.config == lm.config
    ours, expected = (model(**plain(), seed=SEED).log_probs for model in (loaded, lm))
    assert torch.equal(ours, expected)
    other = dataclasses.replace(lm.config, edits=EditConfig(rate=0.3, kinds=("swap", "delete")))
    for config in (other, PerturbConfig(latent_dim=3)):
        lm.config = config
        with pytest.raises(ValueError, match=r"no longer describes lm\.transform"):
            lm.save_pretrained(tmp_path)


OF_EDITS = ("rate", "kinds", "neighbors", "learn_rates", "rate_limits")


def test_config_survives_json_and_keeps_its_edits_when_its_estimation_changes():
    edits = EditConfig(rate=0.25, kinds=["insert", "swap"], num_samples=4)
    config = HybridConfig.of(PerturbConfig(num_samples=4, sampling="antithetic"), edits)
    assert config.edits == EditConfig(rate=0.25, kinds=("insert", "swap"))
    again = HybridConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and set(config.to_dict()["edits"]) == {*OF_EDITS}
    lm = wrap(base_model(), config)
    assert isinstance(lm.perturbation, Hybrid)
    with lm.overriding(num_samples=6, estimator="jensen", sampling="stratified"):
        assert (lm.config.num_samples, lm.config.edits) == (6, config.edits)
    assert lm.config == config


@pytest.mark.parametrize(
    ("noise", "edits", "message"),
    [
        ({"deterministic": True}, {}, "deterministic=True is a control without randomness"),
        ({"proposal": "gradient"}, {}, "proposal='gradient' moves latents .* use proposal='prior'"),
        ({"num_samples": 4}, {"num_samples": 6}, "edits has num_samples=6, and PerturbConfig has "),
        ({}, {"estimator": "jensen"}, "edits has estimator='jensen', and PerturbConfig"),
        ({}, {"marginal": "sequence"}, "edits has marginal='sequence', and PerturbConfig"),
        ({}, {"plan": "batched"}, "edits has plan='batched', and PerturbConfig has plan='auto'"),
    ],
)
def test_configs_that_do_not_go_together_are_rejected_by_name(noise, edits, message):
    with pytest.raises(ValueError, match=message):
        wrap(base_model(), PerturbConfig(**noise), edits=EditConfig(**edits))


def test_configs_of_another_kind_are_rejected_by_name():
    with pytest.raises(TypeError, match="edits must be an EditConfig, got dict"):
        wrap(base_model(), PerturbConfig(), edits={"rate": 0.1})
    with pytest.raises(TypeError, match="config must be a PerturbConfig, got EditConfig"):
        wrap(base_model(), EditConfig(), edits=EditConfig())
    with pytest.raises(ValueError, match=r"no key 'rates' \(did you mean 'rate'\?\)"):
        HybridConfig.from_dict({"edits": {"rates": 0.1}})


def test_calls_that_a_hybrid_cannot_serve_are_rejected_by_name():
    lm, e = hybrid_lm(), torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match="inputs_embeds holds no tokens to edit"):
        lm(inputs_embeds=e)
    with pytest.raises(TypeError, match="Hybrid edits tokens before it perturbs embeddings"):
        lm.perturb(e, torch.tensor(5), 2, rows=torch.arange(1))
