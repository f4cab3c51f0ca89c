"""The wrapper against a naive loop over samples, through each model's own forward."""

import math

import pytest
import torch
import transformers
from torch.nn import functional as F

from fastperturb import PerturbConfig, estimators, noise, wrap

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, final_logit_softcapping=3.0)
    ),
}
IGNORED = -100


def base_model(architecture="llama"):
    torch.manual_seed(0)
    return ARCHITECTURES[architecture]()


def batch(*, size=3, length=9, padding=True):
    """Token ids, a right-padded attention mask, and labels with gaps."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (size, length))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[0, :4] = IGNORED
    if padding:
        mask[1, -3:] = 0
        labels[1, -3:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def naive_logits(lm, inputs, *, seed, num_samples):
    """Each sample's logits [M, B, T, V], one plain forward of the base model at a time."""
    base, ids = lm.base, inputs["input_ids"]
    e = base.get_input_embeddings()(ids)
    z = noise.latent(seed, (num_samples, *ids.shape, lm.transform.latent_dim))
    real = inputs["attention_mask"].bool()[..., None]
    return torch.stack(
        [
            base(
                inputs_embeds=torch.where(real, lm.transform(e, sample), e),
                attention_mask=inputs["attention_mask"],
                position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0),
            ).logits
            for sample in z
        ]
    )


def naive_log_probs(logits, labels):
    kept = labels[:, 1:] != IGNORED
    index = labels[:, 1:].where(kept, 0).expand(len(logits), -1, -1)[..., None]
    log_probs = logits[:, :, :-1].float().log_softmax(-1).gather(-1, index)[..., 0]
    return log_probs.where(kept, 0.0), kept


def naive_quadratic(logits, labels):
    p = logits[:, :, :-1].float().softmax(-1)
    hit = naive_log_probs(logits, labels)[0].exp().mean(0)
    M = len(p)
    cross = sum((p[i] * p[j]).sum(-1) for i in range(M) for j in range(M) if i != j)
    return 2 * hit - cross / (M * (M - 1))


def gradients(loss, lm):
    trained = [p for p in lm.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


def assert_same_gradients(ours, naive, tolerance=2e-3):
    for mine, theirs in zip(ours, naive, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-8


def with_lora(model):
    peft = pytest.importorskip("peft", reason="LoRA tests need peft")
    is_gpt2 = model.config.model_type == "gpt2"  # whose Conv1D keeps its weight transposed
    config = peft.LoraConfig(
        r=4,
        target_modules=["c_attn"] if is_gpt2 else ["q_proj", "v_proj"],
        fan_in_fan_out=is_gpt2,
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("estimator", ["iwae", "quadratic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_a_naive_loop(architecture, estimator, lora):
    model = base_model(architecture)
    lm = wrap(with_lora(model) if lora else model, PerturbConfig(estimator=estimator)).train()
    inputs = batch()
    out = lm(**inputs, num_samples=3, seed=5)

    logits = naive_logits(lm, inputs, seed=5, num_samples=3)
    log_probs, kept = naive_log_probs(logits, inputs["labels"])
    marginal = log_probs.logsumexp(0) - math.log(3)
    value = marginal if estimator == "iwae" else naive_quadratic(logits, inputs["labels"])
    loss = -value.where(kept, 0.0).sum() / kept.sum()

    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(out.log_probs, log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.log_marginal, marginal.where(kept, 0.0), rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(out.loss, lm), gradients(loss, lm))


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["jensen", "iwae", "jvi_clip"])
def test_every_estimator_and_marginal_weighs_the_samples_as_combine_does(estimator, marginal):
    lm = wrap(base_model(), PerturbConfig(estimator=estimator, marginal=marginal, num_samples=4))
    inputs = batch()
    out = lm(**inputs, seed=5)
    log_probs, kept = naive_log_probs(
        naive_logits(lm, inputs, seed=5, num_samples=4), inputs["labels"]
    )
    outcomes = log_probs if marginal == "token" else log_probs.sum(-1)
    mask = kept if marginal == "token" else kept.any(-1)
    value, _ = estimators.combine(outcomes, estimator, mask=mask)
    loss = -value.sum() / kept.sum()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert out.log_marginal.shape == value.shape
    assert_same_gradients(gradients(out.loss, lm), gradients(loss, lm))


def test_resampling_is_the_iwae_loss_with_fewer_samples_sent_backward():
    options = {"estimator": "resample", "backward_samples": 1, "num_samples": 6}
    lm = wrap(base_model(), PerturbConfig(**options, plan="batched"))
    inputs = batch()
    out = lm(**inputs, seed=5)
    with torch.no_grad():
        value, _ = estimators.combine(out.log_probs, "iwae")
    assert out.loss.item() == pytest.approx((-value.sum() / kept_count(inputs)).item(), rel=1e-5)
    upstream = torch.autograd.grad(out.loss, out.log_probs)[0]
    assert (upstream != 0).any(-1).sum(0).tolist() == [1, 1, 1]


def kept_count(inputs):
    return (inputs["labels"][:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_telescopes_take_a_number_of_draws_that_the_seed_decides(estimator):
    lm = wrap(base_model(), PerturbConfig(estimator=estimator, num_samples=8))
    taken = {seed: len(lm(**batch(), seed=seed).log_probs) for seed in range(12)}
    assert len(set(taken.values())) > 1 and max(taken.values()) <= 8
    again = {seed: len(lm(**batch(), seed=seed).log_probs) for seed in range(12)}
    assert again == taken


@pytest.mark.parametrize(
    "estimator", ["iwae", "jensen", "jvi_clip", "resample", "mlmc", "quadratic"]
)
def test_splitting_a_batch_changes_nothing(estimator):
    lm = wrap(base_model(), PerturbConfig(estimator=estimator, num_samples=4))
    inputs, count = batch(), kept_count(batch())
    whole = lm(**inputs, seed=5)
    pieces = []
    for start, stop in ((0, 1), (1, 3)):
        part = {name: value[start:stop] for name, value in inputs.items()}
        rows = torch.arange(start, stop)
        pieces.append(lm(**part, seed=5, rows=rows, num_items_in_batch=count))
    torch.testing.assert_close(
        torch.cat([piece.log_probs for piece in pieces], dim=1),
        whole.log_probs,
        rtol=1e-4,
        atol=1e-5,
    )
    loss = sum(piece.loss for piece in pieces)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert_same_gradients(gradients(loss, lm), gradients(whole.loss, lm), tolerance=1e-4)


def test_left_padding_gives_each_token_the_noise_it_has_without_padding():
    lm = wrap(base_model(), PerturbConfig(num_samples=3))
    plain = batch(size=1, padding=False)
    padded = {
        "input_ids": F.pad(plain["input_ids"], (4, 0), value=1),
        "attention_mask": F.pad(plain["attention_mask"], (4, 0)),
        "labels": F.pad(plain["labels"], (4, 0), value=IGNORED),
    }
    one, other = lm(**plain, seed=5), lm(**padded, seed=5)
    torch.testing.assert_close(other.log_probs[:, :, 4:], one.log_probs, rtol=1e-3, atol=1e-4)


def test_a_packed_document_gets_the_noise_of_its_own_number_and_positions():
    lm = wrap(base_model(), PerturbConfig(num_samples=2, plan="batched"))
    ids = batch(size=2, length=5, padding=False)["input_ids"]
    seen = []
    lm.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    lm(input_ids=ids, rows=torch.tensor([7, 4]), seed=5)
    lm(
        input_ids=ids.reshape(1, 10),
        position_ids=torch.arange(5).repeat(2)[None],
        rows=torch.tensor([7, 4]).repeat_interleave(5)[None],
        seed=5,
    )
    alone, packed = seen  # (M * B, T, D)
    torch.testing.assert_close(packed.reshape(2, 2, 5, -1), alone.reshape(2, 2, 5, -1))


def test_a_telescope_uses_the_cap_of_the_call():
    lm = wrap(base_model(), PerturbConfig(estimator="sumo", num_samples=2))
    inputs = batch()
    out = next(
        out
        for seed in range(40)
        if len((out := lm(**inputs, seed=seed, num_samples=8)).log_probs) > 2
    )
    level = torch.tensor(len(out.log_probs) - 1)
    telescope = estimators.Telescope("sumo", 8)
    mask = inputs["labels"][:, 1:] != IGNORED
    value, _ = telescope.combine(out.log_probs.detach(), level, mask=mask)
    assert out.loss.item() == pytest.approx((-value.sum() / mask.sum()).item(), rel=1e-5)


def test_exact_is_the_base_model_on_exact_prefixes():
    for estimator in ("iwae", "quadratic", "mlmc"):
        lm = wrap(base_model(), PerturbConfig(estimator=estimator))
        inputs = batch()
        with lm.exact():
            out = lm(**inputs)
        expected = lm.base(**inputs).loss
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert out.shift == 0 and out.log_probs.shape[0] == 1
        assert lm(**inputs, seed=5).shift > 0  # and perturbs again outside


def test_a_mask_of_nothing_is_the_exact_model():
    lm = wrap(base_model(), PerturbConfig())
    inputs = batch()
    masked = lm(**inputs, perturb_mask=torch.zeros(3, 9, dtype=torch.bool))
    with lm.exact():
        exact = lm(**inputs)
    assert masked.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert masked.shift == 0


def test_the_seed_decides_the_noise_and_evaluation_still_perturbs():
    lm = wrap(base_model(), PerturbConfig()).eval()
    inputs = batch()
    one, same, other = (lm(**inputs, seed=seed).loss for seed in (5, 5, 6))
    assert one == same and one != other
    torch.manual_seed(3)
    drawn = lm(**inputs).loss
    torch.manual_seed(3)
    assert lm(**inputs).loss == drawn
    assert lm(**inputs).loss != drawn


def test_without_labels_only_what_was_asked_for_is_computed():
    lm = wrap(base_model("gemma2"), PerturbConfig(num_samples=3))
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    out = lm(**inputs, seed=5)
    assert out.loss is None and out.log_probs is None and out.logits is None
    logits = lm(**inputs, seed=5, return_logits=True).logits
    expected = naive_logits(lm, inputs, seed=5, num_samples=3).softmax(-1).mean(0).log()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_embeddings_may_be_given_instead_of_ids():
    lm = wrap(base_model(), PerturbConfig())
    inputs = batch()
    embeddings = lm.base.get_input_embeddings()(inputs.pop("input_ids"))
    given = lm(**inputs, inputs_embeds=embeddings, seed=5).loss
    assert given == lm(**batch(), seed=5).loss


def test_the_scale_of_the_embedding_module_counts():
    lm = wrap(base_model("gemma2"), PerturbConfig(init_scale=0.25))
    embed = lm.base.get_input_embeddings()
    rms = embed(torch.arange(97)).square().mean().sqrt()
    assert lm.transform.embed_rms.item() == pytest.approx(rms.item(), rel=1e-5)
    assert rms > 2 * embed.weight.square().mean().sqrt()
    out = lm(**batch(), num_samples=64)
    assert out.shift.item() == pytest.approx(0.25, rel=0.2)


def test_diagnostics_are_what_they_say():
    lm = wrap(base_model(), PerturbConfig(num_samples=5))
    inputs = batch()
    out = lm(**inputs, seed=5)
    kept = inputs["labels"][:, 1:] != IGNORED
    weights = out.log_probs.softmax(0)
    ess = (1 / weights.square().sum(0))[kept].mean()
    assert out.ess.item() == pytest.approx(ess.item(), rel=1e-5)
    e = lm.base.get_input_embeddings()(inputs["input_ids"])
    z = noise.latent(5, (5, 3, 9, 16))
    moved = (lm.transform(e, z) - e).norm(dim=-1) / e.norm(dim=-1)
    shift = moved[:, inputs["attention_mask"].bool()].mean()
    assert out.shift.item() == pytest.approx(shift.item(), rel=1e-4)


def test_a_batch_without_labels_in_it_has_zero_loss_and_gradient():
    lm = wrap(base_model(), PerturbConfig())
    inputs = batch()
    out = lm(**{**inputs, "labels": torch.full_like(inputs["labels"], IGNORED)})
    assert out.loss == 0
    assert all(g is None or (g == 0).all() for g in gradients(out.loss, lm))


@pytest.mark.parametrize("count", [0, torch.tensor(0), None])
def test_a_global_batch_without_labels_has_zero_loss(count):
    lm = wrap(base_model(), PerturbConfig())
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    assert lm(**inputs, num_items_in_batch=count).loss == 0


def test_the_loss_comes_first_as_in_every_hugging_face_output():
    out = wrap(base_model(), PerturbConfig())(**batch(), return_logits=True)
    assert out[0] is out.loss
    known = ["log_marginal", "log_probs", "ess", "shift", "log_prob_variance", "logits"]
    assert list(out) == ["loss", *known]


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
def test_half_precision_trunks_train_the_fp32_transform(mode):
    model = base_model()
    lm = wrap(model.bfloat16() if mode == "bf16 weights" else model, PerturbConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        out = lm(**batch(), seed=5)
    exact = wrap(base_model(), PerturbConfig())
    exact.transform.load_state_dict(lm.transform.state_dict())
    expected = exact(**batch(), seed=5)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    ours = torch.autograd.grad(out.loss, lm.transform.U)[0]
    right = torch.autograd.grad(expected.loss, exact.transform.U)[0]
    assert ours.dtype == torch.float32
    assert F.cosine_similarity(ours.flatten(), right.flatten(), dim=0) > 0.97


def test_gradient_checkpointing_in_the_trunk_changes_nothing():
    lm = wrap(base_model(), PerturbConfig()).train()
    plain = gradients(lm(**batch(), seed=5).loss, lm)
    enable = getattr(lm.base, "activation_checkpointing_enable", None)  # its name from 5.2x on
    (enable or lm.base.gradient_checkpointing_enable)({"use_reentrant": False})
    assert_same_gradients(gradients(lm(**batch(), seed=5).loss, lm), plain, tolerance=1e-5)


def test_training_the_transform_on_a_frozen_base_lowers_the_loss():
    model = base_model().requires_grad_(False)
    lm = wrap(model, PerturbConfig(num_samples=8))
    optimizer = torch.optim.Adam([p for p in lm.parameters() if p.requires_grad], lr=0.05)
    assert {name for name, p in lm.named_parameters() if p.requires_grad} == {"transform.U"}
    losses = []
    for _ in range(20):
        loss = lm(**batch(), seed=5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert model.lm_head.weight.grad is None


def test_a_real_pretrained_model_keeps_its_likelihood_under_exact(data_dir):
    folder = data_dir / "models" / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (data_dir / "extra_tinystories" / "sample.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    lm = wrap(model, PerturbConfig(init_scale=0.1, num_samples=16)).eval()
    with torch.no_grad():
        with lm.exact():
            exact = lm(input_ids=ids, labels=ids).loss
        perturbed = lm(input_ids=ids, labels=ids, seed=1).loss
        assert exact.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    assert exact < 1.6
    assert exact < perturbed < exact + 0.3


# --- what is refused -----------------------------------------------------------------------


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="model is on the meta device: load its weights"):
        wrap(base_model().to("meta"), PerturbConfig())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be a positive int, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be a positive int, got 2.0"),
        ({"labels": torch.full((3, 9), 97)}, IndexError, r"labels must be .*\[0, 97\), got 97"),
        ({"labels": torch.zeros(3, 8).long()}, ValueError, r"labels must be \[B, T\] = \[3, 9\]"),
        ({"labels": torch.zeros(3, 9)}, ValueError, r"labels must be \[B, T\] of torch.int64, got"),
        ({"labels": [[1] * 9] * 3}, TypeError, "labels must be a tensor .*got list"),
        ({"position_ids": torch.zeros(3, 9).int()}, ValueError, "position_ids must be .*int32"),
        ({"perturb_mask": torch.ones(3, 9)}, ValueError, "perturb_mask must be .*torch.bool, got"),
        ({"input_ids": torch.full((3, 9), 97)}, IndexError, r"input_ids must lie in \[0, 97\)"),
        ({"input_ids": torch.zeros(3, 9)}, ValueError, "input_ids must be .*got torch.float32"),
        ({"input_ids": torch.zeros(0, 9).long()}, ValueError, "input_ids must hold at least one"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 9, 8)}, ValueError, "32 wide"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be one num"),
        ({"attention_mask": torch.ones(2, 9)}, ValueError, r"attention_mask must be \[B, T\]"),
        ({"input_ids": torch.zeros(9).long()}, ValueError, r"input_ids must be \[B, T\]"),
        ({"input_ids": None}, ValueError, "either input_ids or inputs_embeds, got neither"),
        ({"inputs_embeds": torch.zeros(3, 9, 32)}, ValueError, "got both"),
        ({"attention_mask": torch.ones(3, 9, device="meta")}, ValueError, "attention_mask .* meta"),
        ({"perturb_mask": torch.ones(3, 8).bool()}, ValueError, r"perturb_mask must be"),
        ({"rows": torch.arange(2)}, ValueError, r"rows must be int64 \[B\] or \[B, T\]"),
        ({"seed": 1.5}, ValueError, "seed must be an int"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, error, message):
    lm = wrap(base_model(), PerturbConfig())
    with pytest.raises(error, match=message):
        lm(**{**batch(), **changes})


def test_a_call_cannot_ask_for_draws_the_estimator_cannot_use():
    quadratic = wrap(base_model(), PerturbConfig(estimator="quadratic"))
    with pytest.raises(ValueError, match="num_samples must be at least 2 for estimator='quad"):
        quadratic(**batch(), num_samples=1)
    resampling = wrap(base_model(), PerturbConfig(estimator="resample", backward_samples=4))
    with pytest.raises(ValueError, match="backward_samples must not exceed num_samples=2, got 4"):
        resampling(**batch(), num_samples=2)
    antithetic = wrap(base_model(), PerturbConfig(antithetic=True))
    with pytest.raises(ValueError, match="num_samples must be even with antithetic=True"):
        antithetic(**batch(), num_samples=3)


def test_training_by_plain_jvi_is_refused_and_evaluating_by_it_is_not():
    lm = wrap(base_model(), PerturbConfig(estimator="jvi")).train()
    with pytest.raises(ValueError, match="use estimator='jvi_clip'"):
        lm(**batch())
    assert torch.isfinite(lm.eval()(**batch()).loss)


def varlen_attention(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
):
    """What the flash kernel computes of documents laid end to end: [tokens, heads, width]."""
    assert causal and softmax_scale == q.shape[-1] ** -0.5
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    parts = [
        F.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in document), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for document in zip(q.split(lengths), k.split(lengths), v.split(lengths))
    ]
    return torch.cat(parts)


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers' own flash path, down to the kernel that needs a GPU."""

    utils = transformers.modeling_flash_attention_utils
    kernels = (None, varlen_attention, None, None, None)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(utils, "_loaded_implementation", None)


def test_packed_documents_under_flash_attention_give_what_sdpa_gives(flash_attention):
    lm = wrap(base_model(), PerturbConfig(num_samples=3))
    ids = torch.randint(97, (2, 9))
    packed = {
        "input_ids": ids,
        "labels": ids,
        # Documents of one token too, and a row that begins within one.
        "position_ids": torch.tensor([[0, 0, 1, 0, 1, 2, 3, 4, 0], [3, 4, 5, 6, 0, 1, 2, 3, 4]]),
        "rows": torch.tensor([[0, 1, 1, 2, 2, 2, 2, 2, 3], [4, 4, 4, 4, 5, 5, 5, 5, 5]]),
    }
    expected = lm(**packed, seed=4).log_probs
    lm.base.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(lm(**packed, seed=4).log_probs, expected)


def test_packed_documents_stay_apart_whatever_mask_comes_with_them():
    lm = wrap(base_model(), PerturbConfig(num_samples=3))
    ids = torch.randint(3, 97, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions, "seed": 5}
    mask = torch.ones_like(ids)
    expected = lm(**packed).log_probs
    torch.testing.assert_close(lm(**packed, attention_mask=mask).log_probs, expected)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="packed position_ids take no attention_mask"):
        lm(**packed, attention_mask=mask)
    mask[0, -1], mask[0, 3] = 1, 0  # the end of the first document, which hides no boundary
    with pytest.raises(ValueError, match="packed position_ids take no attention_mask"):
        lm(**packed, attention_mask=mask)


def test_positions_under_padding_are_no_packing():
    lm = wrap(base_model(), PerturbConfig(num_samples=3))
    ids, mask = torch.randint(3, 97, (1, 5)), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 0, 1, 2]])  # as `generate` makes them
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask, "seed": 5}
    told, counted = lm(**inputs, position_ids=positions), lm(**inputs)
    torch.testing.assert_close(told.log_probs[:, :, 2:], counted.log_probs[:, :, 2:])
    hole = torch.tensor([[1, 1, 0, 1, 1]])  # within one document
    lm(**{**inputs, "attention_mask": hole}, position_ids=torch.arange(5)[None])


@pytest.mark.parametrize(
    "packing",
    [
        {"rows": torch.tensor([[0] * 4 + [1] * 5])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
    ],
    ids=["rows", "position_ids"],
)
def test_the_sequence_marginal_of_packed_documents_is_refused(packing):
    lm = wrap(base_model(), PerturbConfig(num_samples=3, marginal="sequence"))
    ids = torch.randint(3, 97, (1, 9))
    with pytest.raises(ValueError, match="the sequence marginal is of one document a row"):
        lm(ids, labels=ids, **packing)
    with pytest.raises(ValueError, match="the sequence marginal is of one document a row"):
        lm.score(ids, **packing)


def test_a_base_that_returns_tuples_is_run_all_the_same():
    lm = wrap(base_model(), PerturbConfig(num_samples=3))
    expected = lm(**batch(), seed=5).loss
    lm.base.config.return_dict = False
    assert lm(**batch(), seed=5).loss == expected


def test_the_transform_is_in_fp32_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        lm = wrap(base_model(), PerturbConfig())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in lm.transform.parameters()} == {torch.float32}


def test_a_config_that_is_no_config_is_refused():
    with pytest.raises(TypeError, match="config must be a PerturbConfig, got dict"):
        wrap(base_model(), {"num_samples": 3})


def test_a_mixture_of_equations_is_the_sum_of_their_losses():
    base, inputs = base_model(), batch()
    mixture = {"iwae": 1.0, "quadratic": 10.0, "jensen": 0.5}

    def run(estimator, **options):
        torch.manual_seed(2)
        lm = wrap(base, PerturbConfig(estimator=estimator, num_samples=4, **options))
        out = lm(**inputs, seed=5)
        return out, torch.autograd.grad(out.loss, list(lm.transform.parameters()))

    alone = {name: run(name) for name in mixture}
    for options in ({"plan": "batched"}, {"plan": "chunked", "chunk_size": 3}):
        out, grads = run(mixture, **options)
        loss = sum(weight * alone[name][0].loss for name, weight in mixture.items())
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(out.log_marginal, alone["iwae"][0].log_marginal)
        for index, grad in enumerate(grads):
            total = sum(weight * alone[name][1][index] for name, weight in mixture.items())
            torch.testing.assert_close(grad, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_the_variance_of_log_probs_over_samples_is_reported(marginal):
    inputs = batch()
    lm = wrap(base_model(), PerturbConfig(num_samples=6, marginal=marginal))
    out = lm(**inputs, seed=5)
    mask = inputs["labels"][:, 1:] != IGNORED
    log_probs = out.log_probs if marginal == "token" else out.log_probs.sum(-1)
    mask = mask if marginal == "token" else mask.any(-1)
    torch.testing.assert_close(out.log_prob_variance, log_probs.var(0)[mask].mean())
    assert lm(**inputs, num_samples=1).log_prob_variance == 0


def test_a_collapse_is_warned_of_once_in_training():
    lm = wrap(base_model(), PerturbConfig(num_samples=2))
    lm(**batch())  # no warning, which would be an error
    with torch.no_grad():
        lm.transform.U *= 1e-3
    lm.eval()(**batch())
    with pytest.warns(RuntimeWarning, match="the perturbation has collapsed.*min_scale"):
        lm.train()(**batch())
    lm(**batch())
