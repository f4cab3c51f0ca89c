"""Random edits against a loop that edits one prefix at a time and asks the base model."""

import dataclasses
import json
import math

import pytest
import tiny
import torch
import transformers
from batches import IGNORED, labelled
from edit_cases import (
    ARCHITECTURES,
    BOS,
    LAYOUTS,
    MODES,
    SEED,
    V,
    edited_lm,
    edits_of,
    left_padded,
    naive_greedy,
    naive_log_probs,
    packed,
    plain,
    right_padded,
    some_tokens,
)
from torch.nn import functional as F

import fastperturb
from fastperturb import EditConfig, EditedLM, PerturbConfig, edit
from fastperturb.engine.edit_layout import KINDS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_match_a_loop_that_edits_each_prefix_by_itself(architecture, layout):
    lm, inputs = edited_lm(architecture), layout()
    out = lm(**inputs, seed=SEED)
    naive = naive_log_probs(lm, inputs)
    torch.testing.assert_close(out.log_probs, naive, rtol=1e-4, atol=1e-4)
    kept = labelled(inputs)
    marginal = naive.logsumexp(0) - math.log(4)
    assert out.loss.item() == pytest.approx(-marginal[kept].mean().item(), rel=1e-4)


def test_swaps_stay_within_their_document():
    lm, inputs = edited_lm(kinds=("swap",), rate=0.9), packed()
    log_probs = lm(**inputs, seed=SEED).log_probs
    torch.testing.assert_close(log_probs, naive_log_probs(lm, inputs), rtol=1e-4, atol=1e-4)


def test_the_label_after_the_last_editable_token_is_predicted_at_that_token():
    lm, ids = edited_lm(kinds=("swap",), rate=1.0), some_tokens().clamp_min(3)
    prompt = torch.arange(11) < 4
    edits = edits_of(lm, ids, 8, editable=prompt.expand_as(ids))
    assert (edits.source[..., 3:] == torch.arange(3, 11)).all()
    assert (edits.ids[..., 3] == ids[:, 3]).all()


def test_edits_replace_and_insert_by_default_and_so_keep_every_token_before_its_label():
    assert EditConfig().kinds == ("replace", "insert")
    ids = some_tokens().clamp_min(3)
    edits = edits_of(edited_lm(kinds=EditConfig().kinds, rate=0.9), ids, 8)
    assert (edits.source.diff(dim=-1) > 0).all() and (edits.source[..., 0] <= 1).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edits_never_exceed_the_position_limit(architecture):
    inputs = packed()
    # The longest document has no room, and the others some.
    lm = edited_lm(architecture, positions=11, kinds=("insert", "delete"), rate=0.9)
    naive = naive_log_probs(lm, inputs, positions_in_model=11)
    torch.testing.assert_close(lm(**inputs, seed=SEED).log_probs, naive, rtol=1e-4, atol=1e-4)
    for layout in (plain, right_padded, left_padded):
        assert lm(**layout(), seed=SEED).loss.isfinite()  # an index past the table would raise


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_log_probs_depend_on_no_later_token(kinds):
    lm, inputs = edited_lm(kinds=kinds, rate=0.8, num_samples=8), plain()
    ids = inputs["input_ids"]
    before = lm(**inputs, seed=SEED).log_probs  # entry t is that of label t + 1
    for changed in range(1, ids.shape[1]):
        for token in (BOS, 7, 8):
            other = ids.clone()
            other[:, changed] = token
            after = lm(**{**inputs, "input_ids": other}, seed=SEED).log_probs
            torch.testing.assert_close(after[..., :changed], before[..., :changed])
            if changed < ids.shape[1] - 2:
                assert not torch.allclose(after[..., changed:], before[..., changed:])


def test_edits_do_not_depend_on_plan_batch_or_padding():
    lm, inputs = edited_lm(), plain()
    whole = lm(**inputs, seed=SEED, return_logits=True)
    for plan in ({"plan": "chunked", "chunk_size": 3}, {"plan": "resample"}):
        other = edited_lm(**plan)(**inputs, seed=SEED)
        torch.testing.assert_close(other.log_probs, whole.log_probs)
    row = {name: value[2:] for name, value in inputs.items()}
    alone = lm(**row, seed=SEED, rows=torch.tensor([2]))
    torch.testing.assert_close(alone.log_probs, whole.log_probs[:, 2:])
    padded = {name: F.pad(value, (0, 5)) for name, value in inputs.items()}
    mask = F.pad(torch.ones_like(inputs["input_ids"]), (0, 5))
    padded["labels"][:, -5:] = IGNORED
    out = lm(**padded, attention_mask=mask, seed=SEED, return_logits=True)
    torch.testing.assert_close(out.log_probs[..., :10], whole.log_probs)
    torch.testing.assert_close(out.logits[:, :11], whole.logits)


@pytest.mark.parametrize(
    "estimation",
    [{"estimator": name} for name in ("jensen", "iwae", "jvi_clip", "mlmc", "quadratic")]
    + [{"estimator": "iwae", "marginal": "sequence"}],
)
def test_every_estimator_has_the_same_gradients_batched_and_chunked(estimation):
    gradients = []
    for plan in ("batched", "chunked"):
        lm = edited_lm(**estimation, plan=plan).train()
        inputs = plain() if "marginal" in estimation else packed()
        lm(**inputs, seed=SEED).loss.backward()
        gradients.append([parameter.grad for parameter in lm.base.parameters()])
    for batched, chunked in zip(*gradients, strict=True):
        assert batched.norm() > 0
        torch.testing.assert_close(chunked, batched, rtol=1e-3, atol=1e-6)


def test_zero_rate_and_exact_run_the_base_model():
    inputs = left_padded()
    unedited = edited_lm(rate=0)(**inputs)
    lm = edited_lm()
    with lm.exact():
        exact = lm(**inputs)
    kept = labelled(inputs)
    mask = inputs["attention_mask"]
    base = lm.base(input_ids=inputs["input_ids"], attention_mask=mask).logits.log_softmax(-1)
    expected = base[:, :-1].gather(-1, inputs["labels"][:, 1:].where(kept, 0)[..., None])[..., 0]
    for out in (unedited, exact):
        torch.testing.assert_close(out.log_marginal, expected.where(kept, 0.0))
        assert out.shift == 0
    assert not torch.allclose(lm(**inputs).log_marginal, exact.log_marginal)


def test_shift_is_the_relative_change_of_the_embedding_before_a_label():
    lm, inputs = edited_lm(kinds=("replace", "insert", "delete")), plain()
    ids = inputs["input_ids"]
    edits = edits_of(lm, ids, 4)
    embed = lm.base.get_input_embeddings()
    e, perturbed = embed(ids), embed(edits.ids.gather(2, edits.source))
    expected = (perturbed - e).norm(dim=-1) / e.norm(dim=-1)
    kept = (e.norm(dim=-1) > 0).expand_as(expected)  # the padding token's embedding is zero
    assert lm(**inputs, seed=SEED).shift.item() == pytest.approx(expected[kept].mean().item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_matches_a_loop_that_edits_the_prefix_at_every_step(architecture, mode):
    lm, inputs = edited_lm(architecture), left_padded()
    ids, mask = inputs["input_ids"][:, -7:], inputs["attention_mask"][:, -7:]
    mask[1, :2] = 0
    expected = naive_greedy(lm, ids, mask, MODES[mode], steps=4)
    generated = lm.generate(
        ids, mask, mode=mode, seed=SEED, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_saved_edited_model_loads_as_one_and_computes_the_same(tmp_path, adapted):
    lm = edited_lm(kinds=("swap", "delete"), estimator={"iwae": 1.0, "jensen": 0.5})
    if adapted:
        lm = edit(tiny.with_lora(lm.base), lm.config).eval()
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(edited_lm().base, tmp_path)
    assert type(loaded) is EditedLM and loaded.config == lm.config
    ours, expected = (model(**plain(), seed=SEED).log_probs for model in (loaded, lm))
    assert torch.equal(ours, expected)
    lm.config = dataclasses.replace(lm.config, rate=0.3)
    with pytest.raises(ValueError, match="no longer describes lm.transform"):
        lm.save_pretrained(tmp_path)


def test_score_agrees_with_forward_and_is_at_most_the_best_sample():
    lm = edited_lm()
    score = lm.score(some_tokens(), num_samples=16, seed=SEED)
    out = lm(input_ids=some_tokens(), labels=some_tokens(), num_samples=16, seed=SEED)
    torch.testing.assert_close(score.log_marginal, out.log_marginal)
    assert (score.log_marginal <= out.log_probs.max(0).values + 1e-6).all()
    assert score.nll_standard_error > 0


def test_more_edits_make_real_text_less_likely(data_dir):
    folder = data_dir / "models" / "stories260K-hf"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (data_dir / "extra_tinystories" / "sample.txt").read_text()[:1500]
    ids = tokenizer(text, return_tensors="pt").input_ids
    nll = [
        float(edit(base, config).eval().score(ids, num_samples=8, seed=0).nll)
        for config in (EditConfig(rate=rate, kinds=KINDS) for rate in (0.0, 0.05, 0.3))
    ]
    assert nll == sorted(nll) and nll[2] > nll[0] + 0.3


def test_edit_config_survives_json():
    config = EditConfig(rate=0.25, kinds=["insert", "swap"], estimator={"iwae": 1.0}, num_samples=3)
    assert EditConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"no key 'rates' \(did you mean 'rate'\?\)"):
        EditConfig.from_dict({"rates": 0.1})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 1.2}, "rate must be a probability from 0 to 1, got 1.2"),
        ({"rate": True}, "rate must be a probability"),
        ({"rate": math.nan}, "rate must be a probability"),
        ({"kinds": "swap"}, "kinds must be one or more of"),
        ({"kinds": ()}, "kinds must be one or more of"),
        ({"kinds": ("swap", "swap")}, "kinds must be one or more of"),
        ({"kinds": ("swop",)}, "did you mean 'swap'"),
        ({"neighbors": 0}, "neighbors must be a positive int, got 0"),
        ({"estimator": "iwea"}, "did you mean 'iwae'"),
        ({"estimator": "quadratic", "marginal": "sequence"}, "marginal='sequence' has no"),
        ({"num_samples": 1, "estimator": "quadratic"}, "num_samples must be at least 2"),
    ],
)
def test_bad_edit_config_is_rejected_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        EditConfig(**wrong)


def test_calls_that_edits_cannot_serve_are_rejected_by_name():
    lm = edited_lm()
    with pytest.raises(ValueError, match="inputs_embeds holds no tokens to edit"):
        lm(inputs_embeds=torch.randn(1, 4, 32))
    with pytest.raises(ValueError, match="edits have no parameters"):
        lm.standard_errors([plain()])
    with pytest.raises(TypeError, match="config must be an EditConfig, got PerturbConfig"):
        edit(lm.base, PerturbConfig())
    lm.base.config.eos_token_id = list(range(V - 1))
    with pytest.raises(ValueError, match="two or more tokens that are not special"):
        edit(lm.base, EditConfig())
