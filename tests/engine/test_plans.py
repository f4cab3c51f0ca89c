"""Plans: the same loss and gradients however the samples go through the trunk, in less memory."""

import peft
import pytest
import torch
import transformers

import fastperturb
from fastperturb import EditConfig, PerturbConfig, estimators, noise
from fastperturb.engine import plans
from fastperturb.ops import head_blocks

M, B, T, V = 6, 3, 9, 97
ESTIMATORS = ("jensen", "iwae", "jvi_clip", "resample", "sumo", "mlmc", "quadratic")


def base_model(**changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes}))


def adapted(dropout=0.0):
    model = base_model().requires_grad_(False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def wrap(base, config):
    torch.manual_seed(2)
    return fastperturb.wrap(base, config)


def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, V, (B, T))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def loss_and_gradients(lm, **options):
    lm.zero_grad()
    out = lm(**batch(), seed=5, **options)
    out.loss.backward()
    return out, {
        name: value.grad.clone() for name, value in lm.named_parameters() if value.grad is not None
    }


def assert_same(ours, plain):
    (out, grads), (expected, expected_grads) = ours, plain
    for name in ("loss", "log_marginal", "log_probs", "ess", "shift"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name))
    assert grads.keys() == expected_grads.keys() and any("transform" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


def config(plan, estimator="iwae", **options):
    return PerturbConfig(num_samples=M, plan=plan, estimator=estimator, latent_dim=4, **options)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(estimator, marginal, size):
    if (estimator, marginal) == ("quadratic", "sequence"):
        pytest.skip("the quadratic equation has no sequence marginal")
    base = adapted()
    whole = wrap(base, config("batched", estimator, marginal=marginal))
    parts = wrap(base, config("chunked", estimator, marginal=marginal, chunk_size=size))
    assert_same(loss_and_gradients(parts), loss_and_gradients(whole))
    assert parts.plan_report().plan == "chunked" and parts.plan_report().chunk_size <= size


def test_chunks_serve_a_model_that_trains_whole_with_antithetic_draws_and_logits():
    base = base_model()
    whole = wrap(base, config("batched", antithetic=True))
    parts = wrap(base, config("chunked", antithetic=True, chunk_size=3))
    ours, plain = (loss_and_gradients(lm, return_logits=True) for lm in (parts, whole))
    assert_same(ours, plain)
    torch.testing.assert_close(ours[0].logits, plain[0].logits)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["iwae", "resample"])
def test_the_resample_plan_is_the_resample_estimator_with_less_sent_backward(
    estimator, marginal, chunk_size
):
    options = {"marginal": marginal, "backward_samples": 3}
    base = adapted()
    whole = wrap(base, config("batched", "resample", **options))
    drawn = wrap(base, config("resample", estimator, chunk_size=chunk_size, **options))
    ours, plain = loss_and_gradients(drawn), loss_and_gradients(whole)
    assert_same(ours, plain)
    assert not ours[0].log_probs.requires_grad
    assert drawn.plan_report().plan == "resample"
    iwae = wrap(base, config("batched", marginal=marginal))
    torch.testing.assert_close(ours[0].loss, loss_and_gradients(iwae)[0].loss)
    with torch.no_grad():
        torch.testing.assert_close(drawn(**batch(), seed=5).loss, ours[0].loss)


def test_resampled_weights_are_the_estimators_and_average_to_iwaes():
    torch.manual_seed(0)
    log_probs = torch.randn(M, B, T) * 2 - 4
    mask = torch.rand(B, T) < 0.7
    uniforms = torch.rand(3, B)
    resampled = estimators.Resampled.of(log_probs, uniforms, mask=mask)
    index = resampled.drawn[..., None].expand(-1, -1, T)
    placed = torch.zeros_like(log_probs).scatter_add_(0, index, resampled.weights)
    torch.testing.assert_close(placed, estimators.resample(log_probs, uniforms, mask=mask)[1])
    # One draw on a fine grid of uniforms: the mean over it is the expectation.
    grid = (torch.arange(4000) + 0.5) / 4000
    total = torch.zeros_like(log_probs)
    for uniform in grid:
        one = estimators.Resampled.of(log_probs, uniform.expand(1, B), mask=mask)
        total.scatter_add_(0, one.drawn[..., None].expand(-1, -1, T), one.weights)
    _, weights = estimators.combine(log_probs, "iwae", mask=mask)
    torch.testing.assert_close(total / len(grid), weights, rtol=0, atol=5e-3)


@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_plans_work_under_autocast_and_the_models_own_checkpointing(plan):
    base = adapted()
    plain = wrap(base, config("batched", "resample" if plan == "resample" else "iwae"))
    lm = wrap(base, config(plan, chunk_size=2))
    expected = loss_and_gradients(plain)
    switch = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base.get_base_model(), f"{switch}_checkpointing_enable")()
    lm.train(), plain.train()
    assert_same(loss_and_gradients(lm), expected)
    getattr(base.get_base_model(), f"{switch}_checkpointing_disable")()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, low = loss_and_gradients(lm), loss_and_gradients(plain)
    torch.testing.assert_close(ours[0].loss, low[0].loss, rtol=1e-3, atol=1e-3)
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, low[1][name], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kind", ["ids", "embeddings", "edits"])
@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_what_the_caller_reuses_before_the_backward_changes_nothing(plan, kind):
    given = {**batch(), "seed": torch.tensor(5), "rows": torch.arange(B)}
    if kind == "edits":
        options = {} if plan == "chunked" else {"backward_samples": 2}
        edits = EditConfig(num_samples=M, rate=0.5, plan=plan, chunk_size=1, **options)
        lm = fastperturb.edit(adapted(), edits)
    else:
        lm = wrap(adapted(), config(plan, chunk_size=1))
    if kind == "embeddings":
        embed = lm.base.get_input_embeddings()
        given["inputs_embeds"] = embed(given.pop("input_ids")).detach()
    trained = [value for value in lm.parameters() if value.requires_grad]
    expected = torch.autograd.grad(lm(**given).loss, trained)
    loss = lm(**given).loss
    for value in given.values():
        value.zero_()
    for ours, right in zip(torch.autograd.grad(loss, trained), expected):
        torch.testing.assert_close(ours, right)


def test_an_exact_loss_may_be_differentiated_after_leaving_exact():
    lm = wrap(adapted(), config("chunked", chunk_size=1))
    lm.transform.requires_grad_(False)
    with lm.exact():
        within = lm(**batch()).loss
        trained = [value for value in lm.parameters() if value.requires_grad]
        expected = torch.autograd.grad(within, trained)
        after = lm(**batch()).loss
    for ours, right in zip(torch.autograd.grad(after, trained), expected):
        torch.testing.assert_close(ours, right)


def test_without_labels_there_is_nothing_to_resample():
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    whole, resampling = (wrap(base_model(), config(plan)) for plan in ("batched", "resample"))
    expected = whole(**inputs, seed=5, return_logits=True).logits
    ours = resampling(**inputs, seed=5, return_logits=True).logits
    torch.testing.assert_close(ours, expected)
    assert resampling.plan_report().plan == "batched"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo
@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_chunks_work_in_a_compiled_wrapper(plan):
    lm = wrap(base_model(), config(plan, chunk_size=2))
    expected = loss_and_gradients(lm)
    lm.compile(backend="aot_eager")
    assert_same(loss_and_gradients(lm), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_chunks_work_with_a_compiled_trunk():
    base = base_model()
    expected = loss_and_gradients(wrap(base, config("batched")))
    lm = wrap(base, config("chunked", chunk_size=2))
    base.model.compile(backend="aot_eager")
    assert_same(loss_and_gradients(lm), expected)


def test_micro_batches_add_up_to_the_whole_batch_under_chunks():
    lm = wrap(adapted(), config("chunked", chunk_size=2))
    _, whole = loss_and_gradients(lm)
    lm.zero_grad()
    inputs = batch()
    count = (inputs["labels"][:, 1:] != -100).sum()
    for row in range(B):
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        rows = torch.tensor([row])
        lm(**part, rows=rows, seed=5, num_items_in_batch=count).loss.backward()
    for name, grad in whole.items():
        now = lm.get_parameter(name).grad
        torch.testing.assert_close(now, grad, rtol=1e-4, atol=1e-6)


def test_the_first_pass_of_a_chunk_skips_the_heads_second_gemm(monkeypatch):
    wanted = []
    run = head_blocks.linear_logprob

    def recorded(*given, want_grad_hidden, **options):
        wanted.append(want_grad_hidden)
        return run(*given, want_grad_hidden=want_grad_hidden, **options)

    monkeypatch.setattr(head_blocks, "linear_logprob", recorded)
    loss_and_gradients(wrap(adapted(), config("chunked", chunk_size=3)))
    assert wanted == [False, False, True, True]


def test_dropout_is_the_same_in_both_passes_of_a_chunk(monkeypatch):
    lm = wrap(adapted(dropout=0.5), config("chunked", chunk_size=2)).train()
    torch.manual_seed(7)
    out, grads = loss_and_gradients(lm)
    monkeypatch.setattr(plans, "checkpoint", lambda run, part, **options: run(part))
    torch.manual_seed(7)
    expected, expected_grads = loss_and_gradients(lm)
    assert torch.equal(out.loss, expected.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])


def test_resampling_refuses_dropout_and_goes_on_without():
    lm = wrap(adapted(dropout=0.5), config("resample")).train()
    with pytest.raises(ValueError, match=r"plan='resample' runs the model twice.*lora_dropout"):
        lm(**batch())
    assert torch.isfinite(lm.eval()(**batch()).loss)


def kept(lm):
    """The bytes that a forward keeps for its backward."""
    samples = torch.arange(1)
    return plans.kept_bytes(lambda _: lm(**batch(), seed=5), samples, lm)


def test_what_chunks_and_resampling_keep_does_not_grow_with_the_samples():
    base = adapted()

    def growth(plan, **options):
        few, many = (
            kept(wrap(base, PerturbConfig(num_samples=count, plan=plan, **options)))
            for count in (4, 32)
        )
        return many - few, few

    log_probs = 28 * B * T * 4
    grown, few = growth("batched")
    assert grown > 5 * few
    for plan, options in {
        "chunked": {"chunk_size": 2},
        "resample": {"backward_samples": 2},
    }.items():
        grown, _ = growth(plan, **options)
        assert grown < 12 * log_probs, plan


def test_auto_takes_all_at_once_where_it_fits_and_says_so(monkeypatch):
    lm = wrap(adapted(), config("auto"))
    with pytest.raises(RuntimeError, match="no plan to report before the first forward"):
        lm.plan_report()
    expected = loss_and_gradients(lm)
    report = lm.plan_report()
    assert report.plan == "batched" and report.chunk_size == M
    assert "all 6 samples fit" in str(report) and report.bytes_per_sample > 0
    for free, size in ((4 * report.bytes_per_sample, 2), (0, 1)):
        monkeypatch.setattr(plans, "free_bytes", lambda device, free=free: free)
        loss_and_gradients(lm)
        assert lm.plan_report() == report  # a kind of batch keeps its plan
        other = wrap(lm.base, config("auto"))
        assert_same(loss_and_gradients(other), expected)
        small = other.plan_report()
        assert (small.plan, small.chunk_size) == ("chunked", size)
        assert "6 samples at once would not fit" in str(small)


def test_auto_leaves_room_for_gradients_and_an_optimizer(monkeypatch):
    lm = wrap(base_model(), config("auto"))
    lm(**batch(), seed=5)
    activations = 11 * lm.plan_report().bytes_per_sample  # of 6 samples, with its margins
    coming = sum(3 * 4 * value.numel() for value in lm.parameters())
    for free, plan in ((activations, "chunked"), (activations + coming, "batched")):
        monkeypatch.setattr(plans, "free_bytes", lambda device, free=free: free)
        other = wrap(lm.base, config("auto"))
        other(**batch(), seed=5)
        assert other.plan_report().plan == plan


def test_auto_measures_what_a_sample_really_keeps():
    base = adapted()
    whole = kept(wrap(base, config("batched")))
    lm = wrap(base, config("auto"))
    lm(**batch(), seed=5)
    assert 0.8 * whole < M * lm.plan_report().bytes_per_sample < 1.3 * whole
    assert lm.plan_report().free_bytes == pytest.approx(
        plans.free_bytes(torch.device("cpu")), rel=0.3
    )


def test_auto_leaves_the_random_state_as_it_was():
    lm = wrap(adapted(dropout=0.5), config("auto")).train()
    whole = wrap(lm.base, config("batched")).train()
    for each in (lm, whole):
        torch.manual_seed(11)
        each.drawn = each(**batch(), seed=5).loss
    assert torch.equal(lm.drawn, whole.drawn)


def test_scoring_without_a_gradient_and_single_samples_need_no_measurement():
    lm = wrap(adapted(), config("auto"))
    with torch.no_grad():
        lm(**batch())
    assert "without a gradient" in lm.plan_report().reason
    lm(**batch(), num_samples=1)
    assert "one sample" in lm.plan_report().reason


def test_noise_is_the_samples_own_in_every_chunk():
    lm = wrap(adapted(), config("chunked", chunk_size=4))
    z = noise.latent(5, (M, B, T, 4))
    inputs = batch()
    e = lm.base.get_input_embeddings()(inputs["input_ids"])
    real = inputs["attention_mask"].bool()
    last = torch.where(real[..., None], lm.transform(e, z[-1]), e)
    logits = lm.base(inputs_embeds=last, attention_mask=inputs["attention_mask"]).logits
    target = inputs["labels"][:, 1:].clamp_min(0)[..., None]
    expected = logits[:, :-1].log_softmax(-1).gather(2, target)[..., 0]
    out = lm(**inputs, seed=5)
    torch.testing.assert_close(out.log_probs[-1], expected.where(real[:, 1:], 0.0))
