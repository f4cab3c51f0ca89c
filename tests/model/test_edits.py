"""Random edits against a naive loop that edits one prefix at a time and asks the base model."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from torch.nn import functional as F

import fastperturb
from fastperturb import EditConfig, EditedLM, PerturbConfig, edit, noise
from fastperturb.engine.edit_layout import KINDS, nearest

V, SEED, IGNORED = 29, 5, -100
BOS, EOS, PAD = SPECIAL = (1, 2, 0)
TOKENS = {"vocab_size": V, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
ARCHITECTURES = {
    "llama": lambda positions: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TOKENS, **LLAMA, max_position_embeddings=positions)
    ),
    "gpt2": lambda positions: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TOKENS, **GPT2, n_positions=positions)
    ),
}


def edited_lm(architecture="llama", *, positions=64, **config):
    torch.manual_seed(0)
    base = ARCHITECTURES[architecture](positions).eval()
    return edit(base, EditConfig(**{"rate": 0.6, "num_samples": 4, "neighbors": 3} | config))


def some_tokens(size=3, length=11):
    """Token ids in which special ones occur."""
    return torch.randint(V, (size, length), generator=torch.Generator().manual_seed(1))


def labelled(**inputs):
    """A call's arguments, with labels that are not the input's own tokens."""
    ids = inputs["input_ids"]
    labels = torch.randint(V, ids.shape, generator=torch.Generator().manual_seed(2))
    if "attention_mask" in inputs:
        real = inputs["attention_mask"].bool()
        labels = labels.masked_fill(~(real & real.roll(1, 1)), IGNORED)
    if "position_ids" in inputs:
        labels = labels.masked_fill(inputs["position_ids"] == 0, IGNORED)
    return {**inputs, "labels": labels}


def plain():
    return labelled(input_ids=some_tokens())


def right_padded():
    ids, mask = some_tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    return labelled(input_ids=ids, attention_mask=mask)


def left_padded():
    ids, mask = some_tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    return labelled(input_ids=ids, attention_mask=mask)


def left_padded_from_zero():
    inputs = left_padded()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return inputs


def packed():
    lengths = [[4, 7], [1, 5, 5], [11]]
    numbers = iter(range(100, 110))
    rows = [torch.cat([torch.full((n,), next(numbers)) for n in row]) for row in lengths]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return labelled(
        input_ids=some_tokens(), position_ids=torch.stack(positions), rows=torch.stack(rows)
    )


def half_editable():
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, :3] = mask[1, 5:7] = mask[2, 8] = False
    return {**plain(), "perturb_mask": mask}


LAYOUTS = (plain, right_padded, left_padded, left_padded_from_zero, packed, half_editable)


def naive_prefix(lm, tokens, words, may_move, room):
    """What stands for the tokens x_0 .. x_t of a document when label t + 1 is predicted."""
    config, table = lm.config, lm.base.get_input_embeddings().weight
    drawable = [token for token in range(V) if token not in SPECIAL]
    out, insertions, deletions, t = [], 0, 0, 0
    while t < len(tokens):
        token, (edited, kind, choice, _) = tokens[t], words[t]
        kind = config.kinds[kind * len(config.kinds) >> 32]
        if edited >= config.rate * 2**32 or token in SPECIAL or not may_move[t]:
            kind = None
        if t == 0 and kind in ("delete", "swap"):
            kind = None
        if kind == "swap":
            if t + 1 == len(tokens):  # x_t waits for x_{t+1}, which this label is about
                break
            pair = [token, tokens[t + 1]]
            if may_move[t + 1] and pair[1] not in SPECIAL:
                pair.reverse()
            out += pair
            t += 2
            continue
        if kind == "replace":
            cosines = F.cosine_similarity(table[token], table[drawable], dim=-1)
            order = [drawable[i] for i in cosines.argsort(descending=True)]
            near = [other for other in order if other != token][: config.neighbors]
            token = near[choice * len(near) >> 32]
        if kind == "insert":
            insertions += 1
            if insertions <= room + deletions:
                out.append(drawable[choice * len(drawable) >> 32])
        if kind == "delete":
            deletions += 1
        else:
            out.append(token)
        t += 1
    return out


@torch.no_grad()
def naive_logits(lm, inputs, samples, positions_in_model=64):
    """Next-token log-probs [M, B, T, V], one edited prefix at a time; NaN at padding."""
    ids = inputs["input_ids"]
    size, length = ids.shape
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    told = inputs.get("position_ids")
    if told is None:
        told = real.cumsum(1) - 1
    rows = inputs.get("rows", torch.arange(size))
    rows = rows if rows.ndim == 2 else rows[:, None].expand(-1, length)
    may_move = inputs.get("perturb_mask", torch.ones_like(real))
    key = torch.tensor([SEED, 0])
    found = torch.full((len(samples), size, length, V), math.nan)
    for b in range(size):
        here = [t for t in range(length) if real[b, t]]
        starts = [t for t in here if t == here[0] or told[b, t] != told[b, t - 1] + 1]
        for start, stop in zip(starts, [*starts[1:], here[-1] + 1]):
            tokens = ids[b, start:stop].tolist()
            room = positions_in_model - 1 - int(told[b, stop - 1])
            for m, sample in enumerate(samples):
                counter = [
                    [0xFFFFFFFF, int(told[b, t]), sample, int(rows[b, t])]
                    for t in range(start, stop)
                ]
                words = noise.philox(torch.tensor(counter), key).tolist()
                for t in range(start, stop):
                    n = t + 1 - start
                    moves = may_move[b, start:stop].tolist()
                    prefix = torch.tensor([naive_prefix(lm, tokens[:n], words, moves, room)])
                    places = torch.arange(prefix.shape[1])[None] + told[b, start]
                    logits = lm.base(input_ids=prefix, position_ids=places).logits
                    found[m, b, t] = logits[0, -1].log_softmax(-1)
    return found


def naive_log_probs(lm, inputs, positions_in_model=64):
    labels = inputs["labels"][:, 1:]
    kept = labels != IGNORED
    logits = naive_logits(lm, inputs, range(4), positions_in_model)[:, :, :-1]
    index = labels.where(kept, 0).expand(4, -1, -1)[..., None]
    return logits.gather(-1, index)[..., 0].where(kept, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_those_of_a_loop_that_edits_each_prefix_by_itself(architecture, layout):
    lm, inputs = edited_lm(architecture), layout()
    out = lm(**inputs, seed=SEED)
    naive = naive_log_probs(lm, inputs)
    torch.testing.assert_close(out.log_probs, naive, rtol=1e-4, atol=1e-4)
    kept = inputs["labels"][:, 1:] != IGNORED
    marginal = naive.logsumexp(0) - math.log(4)
    assert out.loss.item() == pytest.approx(-marginal[kept].mean().item(), rel=1e-4)


def test_swaps_stay_within_their_document():
    lm, inputs = edited_lm(kinds=("swap",), rate=0.9), packed()
    found = lm(**inputs, seed=SEED).log_probs
    torch.testing.assert_close(found, naive_log_probs(lm, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_copy_has_a_position_that_the_model_has_not(architecture):
    inputs = packed()
    # The longest document has no room, and the others some.
    lm = edited_lm(architecture, positions=11, kinds=("insert", "delete"), rate=0.9)
    naive = naive_log_probs(lm, inputs, positions_in_model=11)
    torch.testing.assert_close(lm(**inputs, seed=SEED).log_probs, naive, rtol=1e-4, atol=1e-4)
    for layout in (plain, right_padded, left_padded):
        assert lm(**layout(), seed=SEED).loss.isfinite()  # an index past the table would raise


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_no_label_is_predicted_from_later_tokens(kinds):
    lm, inputs = edited_lm(kinds=kinds, rate=0.8, num_samples=8), plain()
    ids = inputs["input_ids"]
    before = lm(**inputs, seed=SEED).log_probs  # entry t is about label t + 1
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
def test_every_equation_has_the_same_gradients_under_both_plans(estimation):
    gradients = []
    for plan in ("batched", "chunked"):
        lm = edited_lm(**estimation, plan=plan).train()
        inputs = plain() if "marginal" in estimation else packed()
        lm(**inputs, seed=SEED).loss.backward()
        gradients.append([parameter.grad for parameter in lm.base.parameters()])
    for batched, chunked in zip(*gradients, strict=True):
        assert batched.norm() > 0
        torch.testing.assert_close(chunked, batched, rtol=1e-3, atol=1e-6)


def edits_of(lm, ids, count, **layout):
    empty = dict.fromkeys(("positions", "moving", "attention_mask", "position_ids"))
    return lm.transform(
        lm.base.get_input_embeddings().weight,
        ids,
        torch.tensor(SEED),
        torch.arange(count),
        rows=torch.arange(len(ids)),
        **{**empty, **layout},
    )


def test_tokens_are_edited_at_the_rate_and_by_each_kind_alike():
    ids = torch.tensor([[BOS, *[7, EOS] * 500]])  # an editable token never has one beside it
    counts = {}
    for kind in ("replace", "insert", "delete"):
        copies = edits_of(edited_lm(kinds=(kind,), rate=0.2, positions=4096), ids, 40)
        sevens = (copies.ids == 7).sum() / 40
        others = (~torch.isin(copies.ids, torch.tensor([*SPECIAL, 7]))).sum() / 40
        counts[kind] = (float(sevens), float(others))
        assert ((copies.ids == EOS).sum((1, 2)) == 500).all()
        assert ((copies.ids == BOS).sum((1, 2)) == 1).all()
    close = lambda mean: pytest.approx(mean, abs=6)  # noqa: E731, 3 standard errors
    assert counts["replace"] == (close(400), close(100))
    assert counts["insert"] == (close(500 + 100 / 26), close(100 * 25 / 26))
    assert counts["delete"] == (close(400), 0)
    copies = edits_of(edited_lm(rate=0.8, kinds=("replace", "delete"), positions=4096), ids, 40)
    assert float((copies.ids == 7).sum()) / 40 == close(100)


def test_replacements_are_even_over_neighbours_and_insertions_over_plain_tokens():
    ids = torch.full((1, 400), 7)
    lm = edited_lm(kinds=("replace",), rate=1.0, neighbors=5)
    table = lm.base.get_input_embeddings().weight
    cosines = F.cosine_similarity(table[7], table, dim=-1)
    cosines[[7, *SPECIAL]] = -2
    shares = edits_of(lm, ids, 20).ids.flatten().bincount(minlength=V) / 8000
    assert set(shares.nonzero()[:, 0].tolist()) == set(cosines.topk(5).indices.tolist())
    assert shares.topk(5).values == pytest.approx([0.2] * 5, abs=0.015)

    copies = edits_of(edited_lm(kinds=("insert",), rate=1.0, positions=1000), ids, 20)
    assert (copies.ids[..., 1::2] == 7).all() and copies.ids.shape[-1] == 800
    shares = copies.ids[..., ::2].flatten().bincount(minlength=V) / 8000
    assert (shares[list(SPECIAL)] == 0).all()
    assert shares[3:] == pytest.approx([1 / 26] * 26, abs=0.008)


def test_swapped_pairs_never_overlap():
    ids = torch.arange(3, 13)[None]
    copies = edits_of(edited_lm(kinds=("swap",), rate=1.0), ids, 1)
    assert copies.ids[0, 0].tolist() == [3, 5, 4, 7, 6, 9, 8, 11, 10, 12]
    assert copies.source[0, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


def test_neighbours_of_a_token_depend_on_nothing_but_the_table():
    table = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    table[100:200] = table[:100] * 1.5  # ties
    special = torch.zeros(300, dtype=torch.bool)
    whole = nearest(table, torch.arange(300), 7, special)
    for tokens in torch.arange(300).split([1, 63, 64, 65, 107]):
        assert torch.equal(nearest(table, tokens, 7, special), whole[tokens])
    with torch.autocast("cpu"):
        assert torch.equal(nearest(table, torch.arange(300), 7, special), whole)


def test_a_rate_of_zero_and_exact_are_the_base_model():
    inputs = left_padded()
    still = edited_lm(rate=0)(**inputs)
    lm = edited_lm()
    with lm.exact():
        exact = lm(**inputs)
    kept = inputs["labels"][:, 1:] != IGNORED
    mask = inputs["attention_mask"]
    base = lm.base(input_ids=inputs["input_ids"], attention_mask=mask).logits.log_softmax(-1)
    expected = base[:, :-1].gather(-1, inputs["labels"][:, 1:].where(kept, 0)[..., None])[..., 0]
    for out in (still, exact):
        torch.testing.assert_close(out.log_marginal, expected.where(kept, 0.0))
        assert out.shift == 0
    assert not torch.allclose(lm(**inputs).log_marginal, exact.log_marginal)


def test_shift_is_how_far_the_embedding_before_a_label_is_from_the_original_one():
    lm, inputs = edited_lm(kinds=("replace", "insert", "delete")), plain()
    ids = inputs["input_ids"]
    copies = edits_of(lm, ids, 4)
    embed = lm.base.get_input_embeddings()
    e, moved = embed(ids), embed(copies.ids.gather(2, copies.source))
    expected = (moved - e).norm(dim=-1) / e.norm(dim=-1)
    kept = (e.norm(dim=-1) > 0).expand_as(expected)  # the padding token's embedding is zero
    assert lm(**inputs, seed=SEED).shift.item() == pytest.approx(expected[kept].mean().item())


def naive_greedy(lm, ids, mask, samples_of, steps):
    for step in range(steps):
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        logits = naive_logits(lm, inputs, samples_of(step))[:, :, -1]
        ids = torch.cat([ids, logits.logsumexp(0).argmax(-1, keepdim=True)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    return ids


MODES = {
    "sequence": lambda step: [0],
    "token": lambda step: [step],
    "mixture": lambda step: [0, 1, 2, 3],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_is_that_of_a_loop_that_edits_the_prefix_at_every_step(architecture, mode):
    lm, inputs = edited_lm(architecture), left_padded()
    ids, mask = inputs["input_ids"][:, -7:], inputs["attention_mask"][:, -7:]
    mask[1, :2] = 0
    expected = naive_greedy(lm, ids, mask, MODES[mode], steps=4)
    found = lm.generate(
        ids, mask, mode=mode, seed=SEED, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_a_saved_model_loads_as_the_same_family_and_computes_the_same(tmp_path, adapted):
    lm = edited_lm(kinds=("swap", "delete"), estimator={"iwae": 1.0, "jensen": 0.5})
    if adapted:
        peft = pytest.importorskip("peft", reason="LoRA tests need peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        lm = edit(peft.get_peft_model(lm.base, lora), lm.config).eval()
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(edited_lm().base, tmp_path)
    assert type(loaded) is EditedLM and loaded.config == lm.config
    found, expected = (each(**plain(), seed=SEED).log_probs for each in (loaded, lm))
    assert torch.equal(found, expected)
    lm.config = dataclasses.replace(lm.config, rate=0.3)
    with pytest.raises(ValueError, match="no longer describes lm.transform"):
        lm.save_pretrained(tmp_path)


def test_scoring_is_finite_and_no_better_than_the_best_draw():
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
        float(edit(base, EditConfig(rate=rate)).eval().score(ids, num_samples=8, seed=0).nll)
        for rate in (0.0, 0.05, 0.3)
    ]
    assert nll == sorted(nll) and nll[2] > nll[0] + 0.3


def test_a_config_survives_plain_data():
    config = EditConfig(rate=0.25, kinds=["insert", "swap"], estimator={"iwae": 1.0}, num_samples=3)
    assert EditConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


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
def test_a_wrong_config_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        EditConfig(**wrong)


def test_what_edits_cannot_do_is_refused_by_name():
    lm = edited_lm()
    with pytest.raises(ValueError, match="inputs_embeds holds no tokens to edit"):
        lm(inputs_embeds=torch.randn(1, 4, 16))
    with pytest.raises(ValueError, match="edits have no parameters"):
        lm.standard_errors([plain()])
    with pytest.raises(TypeError, match="config must be an EditConfig, got PerturbConfig"):
        edit(lm.base, PerturbConfig())
    lm.base.config.eos_token_id = list(range(V - 1))
    with pytest.raises(ValueError, match="two or more tokens that are not special"):
        edit(lm.base, EditConfig())
