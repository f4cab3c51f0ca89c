"""Plans: the same loss and gradients however the samples go through the trunk."""

import math
import subprocess
import sys

import oracles
import pytest
import torch
from batches import batch, labelled, row_of
from tiny import llama, perturbed, with_lora

import fastperturb
from fastperturb import EditConfig, PerturbConfig, estimators, wrap
from fastperturb.engine import memory, plans
from fastperturb.engine.head import LabelHead
from fastperturb.ops import head_blocks

M, B, T = 6, 3, 9
ESTIMATORS = ("jensen", "iwae", "jvi_clip", "resample", "sumo", "mlmc", "quadratic")


def adapted(**lora):
    return with_lora(llama(), **lora)


def planned(base, plan, estimator="iwae", **options):
    """Wrap a model with M samples that run by this plan."""
    options = {"num_samples": M, "latent_dim": 4, **options}
    return perturbed(base, plan=plan, estimator=estimator, **options)


def loss_and_gradients(lm, **options):
    return oracles.loss_and_gradients(lm, batch(), **options)


def assert_same(ours, plain):
    (out, grads), (expected, expected_grads) = ours, plain
    for name in ("loss", "log_marginal", "log_probs", "ess", "shift"):
        values = getattr(out, name), getattr(expected, name)
        torch.testing.assert_close(*values, equal_nan=name == "log_probs")  # of telescopes
    assert grads.keys() == expected_grads.keys() and any("transform" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunked_plan_has_the_loss_and_gradients_of_batched(estimator, marginal, size):
    if (estimator, marginal) == ("quadratic", "sequence"):
        pytest.skip("the quadratic estimator has no sequence marginal")
    base = adapted()
    whole = planned(base, "batched", estimator, marginal=marginal)
    parts = planned(base, "chunked", estimator, marginal=marginal, chunk_size=size)
    assert_same(loss_and_gradients(parts), loss_and_gradients(whole))
    assert parts.plan_report().plan == "chunked" and parts.plan_report().chunk_size <= size


@pytest.mark.parametrize("size", [1, 3])  # neither cuts at the end of a group
@pytest.mark.parametrize("estimator", ["iwae", "jvi_clip", "quadratic"])
def test_chunked_plan_cuts_stratified_groups_without_a_change(estimator, size):
    base, drawn = adapted(), {"sampling": "stratified", "num_samples": 8, "group_size": 4}
    whole = planned(base, "batched", estimator, **drawn)
    parts = planned(base, "chunked", estimator, chunk_size=size, **drawn)
    assert_same(loss_and_gradients(parts), loss_and_gradients(whole))


@pytest.mark.parametrize("group_size", [2, 4])
def test_losses_take_stratified_groups_as_their_units(group_size):
    drawn = {"sampling": "stratified", "num_samples": 8, "group_size": group_size}
    inputs = batch()
    mask = labelled(inputs)
    lm = planned(llama(), "batched", "jvi_clip", **drawn)
    out = lm(**inputs, seed=5)
    groups = out.log_probs.unflatten(0, (-1, group_size)).logsumexp(1) - math.log(group_size)
    value, _ = estimators.combine(groups, "jvi_clip", mask=mask)
    torch.testing.assert_close(out.loss, -value.sum() / mask.sum())
    with lm.overriding(estimator="quadratic"):
        out = lm(**inputs, seed=5)
        logits = oracles.sample_logits(lm, inputs, seed=5, num_samples=8)
    p = logits.softmax(-1)[:, :, :-1]  # (M, B, T-1, V)
    means = p.unflatten(0, (-1, group_size)).mean(1)
    count = len(means)
    pairs = means.sum(0).square() - means.square().sum(0)
    value = 2 * out.log_probs.exp().mean(0) - pairs.sum(-1) / (count * (count - 1))
    torch.testing.assert_close(out.loss, -value.where(mask, 0.0).sum() / mask.sum())


def test_chunked_plan_serves_full_training_antithetic_samples_and_logits():
    base = llama()
    whole = planned(base, "batched", antithetic=True)
    parts = planned(base, "chunked", antithetic=True, chunk_size=3)
    ours, plain = (loss_and_gradients(lm, return_logits=True) for lm in (parts, whole))
    assert_same(ours, plain)
    torch.testing.assert_close(ours[0].logits, plain[0].logits)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["iwae", "resample"])
def test_resample_plan_has_the_gradients_of_the_resample_estimator(estimator, marginal, chunk_size):
    options = {"marginal": marginal, "backward_samples": 3}
    base = adapted()
    whole = planned(base, "batched", "resample", **options)
    resampling = planned(base, "resample", estimator, chunk_size=chunk_size, **options)
    ours, plain = loss_and_gradients(resampling), loss_and_gradients(whole)
    assert_same(ours, plain)
    assert not ours[0].log_probs.requires_grad
    assert resampling.plan_report().plan == "resample"
    iwae = planned(base, "batched", marginal=marginal)
    torch.testing.assert_close(ours[0].loss, loss_and_gradients(iwae)[0].loss)
    with torch.no_grad():
        torch.testing.assert_close(resampling(**batch(), seed=5).loss, ours[0].loss)


def test_resampled_weights_match_the_estimator_and_average_to_iwae():
    torch.manual_seed(0)
    log_probs = torch.randn(M, B, T) * 2 - 4
    mask = torch.rand(B, T) < 0.7
    uniforms = torch.rand(3, B)
    resampled = estimators.Resampled.of(log_probs, uniforms, mask=mask)
    index = resampled.drawn[..., None].expand(-1, -1, T)
    placed = torch.zeros_like(log_probs).scatter_add_(0, index, resampled.weights)
    torch.testing.assert_close(placed, estimators.resample(log_probs, uniforms, mask=mask)[1])
    # With K = 1, the mean over a fine grid of uniforms is the expectation.
    grid = (torch.arange(4000) + 0.5) / 4000
    total = torch.zeros_like(log_probs)
    for uniform in grid:
        one = estimators.Resampled.of(log_probs, uniform.expand(1, B), mask=mask)
        total.scatter_add_(0, one.drawn[..., None].expand(-1, -1, T), one.weights)
    _, weights = estimators.combine(log_probs, "iwae", mask=mask)
    torch.testing.assert_close(total / len(grid), weights, rtol=0, atol=5e-3)


@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_plans_work_under_autocast_and_gradient_checkpointing(plan):
    base = adapted()
    plain = planned(base, "batched", "resample" if plan == "resample" else "iwae")
    lm = planned(base, plan, chunk_size=2)
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
def test_inputs_overwritten_before_the_backward_change_no_gradient(plan, kind):
    inputs = {**batch(), "seed": torch.tensor(5), "rows": torch.arange(B)}
    if kind == "edits":
        options = {} if plan == "chunked" else {"backward_samples": 2}
        edits = EditConfig(num_samples=M, rate=0.5, plan=plan, chunk_size=1, **options)
        lm = fastperturb.edit(adapted(), edits)
    else:
        lm = planned(adapted(), plan, chunk_size=1)
    if kind == "embeddings":
        embed = lm.base.get_input_embeddings()
        inputs["inputs_embeds"] = embed(inputs.pop("input_ids")).detach()
    trained = [value for value in lm.parameters() if value.requires_grad]
    expected = torch.autograd.grad(lm(**inputs).loss, trained)
    loss = lm(**inputs).loss
    for value in inputs.values():
        value.zero_()
    for ours, right in zip(torch.autograd.grad(loss, trained), expected):
        torch.testing.assert_close(ours, right)


def test_exact_loss_can_be_differentiated_after_leaving_exact():
    lm = planned(adapted(), "chunked", chunk_size=1)
    lm.transform.requires_grad_(False)
    with lm.exact():
        within = lm(**batch()).loss
        trained = [value for value in lm.parameters() if value.requires_grad]
        expected = torch.autograd.grad(within, trained)
        after = lm(**batch()).loss
    for ours, right in zip(torch.autograd.grad(after, trained), expected):
        torch.testing.assert_close(ours, right)


def test_resample_plan_without_labels_runs_batched():
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    whole, resampling = (planned(llama(), plan) for plan in ("batched", "resample"))
    expected = whole(**inputs, seed=5, return_logits=True).logits
    ours = resampling(**inputs, seed=5, return_logits=True).logits
    torch.testing.assert_close(ours, expected)
    assert resampling.plan_report().plan == "batched"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo
@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_plans_work_in_a_compiled_wrapper(plan):
    lm = planned(llama(), plan, chunk_size=2)
    expected = loss_and_gradients(lm)
    lm.compile(backend="aot_eager")
    assert_same(loss_and_gradients(lm), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_chunked_plan_works_with_a_compiled_trunk():
    base = llama()
    expected = loss_and_gradients(planned(base, "batched"))
    lm = planned(base, "chunked", chunk_size=2)
    base.model.compile(backend="aot_eager")
    assert_same(loss_and_gradients(lm), expected)


def test_micro_batches_sum_to_the_whole_batch_under_the_chunked_plan():
    lm = planned(adapted(), "chunked", chunk_size=2)
    _, whole = loss_and_gradients(lm)
    lm.zero_grad()
    inputs = batch()
    count = labelled(inputs).sum()
    for row in range(B):
        part = {**row_of(inputs, row), "rows": torch.tensor([row])}
        lm(**part, seed=5, num_items_in_batch=count).loss.backward()
    for name, grad in whole.items():
        summed = lm.get_parameter(name).grad
        torch.testing.assert_close(summed, grad, rtol=1e-4, atol=1e-6)


def test_first_pass_of_a_chunk_skips_the_second_gemm_of_the_head(monkeypatch):
    wanted = []
    run = head_blocks.linear_logprob

    def recorded(*args, want_grad_hidden, **options):
        wanted.append(want_grad_hidden)
        return run(*args, want_grad_hidden=want_grad_hidden, **options)

    monkeypatch.setattr(head_blocks, "linear_logprob", recorded)
    loss_and_gradients(planned(adapted(), "chunked", chunk_size=3))
    assert wanted == [False, False, True, True]


def test_dropout_is_the_same_in_both_passes_of_a_chunk(monkeypatch):
    lm = planned(adapted(lora_dropout=0.5), "chunked", chunk_size=2).train()
    torch.manual_seed(7)
    out, grads = loss_and_gradients(lm)
    monkeypatch.setattr(plans, "checkpoint", lambda run, part, **options: run(part))
    torch.manual_seed(7)
    expected, expected_grads = loss_and_gradients(lm)
    assert torch.equal(out.loss, expected.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])


def test_resample_plan_rejects_dropout_and_works_in_eval_mode():
    lm = planned(adapted(lora_dropout=0.5), "resample").train()
    with pytest.raises(ValueError, match="lora_dropout.*plan='resample' runs the model twice"):
        lm(**batch())
    assert torch.isfinite(lm.eval()(**batch()).loss)


def test_last_sample_has_its_own_latents_in_a_short_chunk():
    lm, inputs = planned(adapted(), "chunked", chunk_size=4), batch()
    logits = oracles.sample_logits(lm, inputs, seed=5, num_samples=M)
    expected, _ = oracles.label_log_probs(logits, inputs["labels"])
    torch.testing.assert_close(lm(**inputs, seed=5).log_probs[-1], expected[-1])


def bytes_kept(lm):
    """Return the bytes that a forward keeps for its backward."""
    samples = torch.arange(1)
    return memory.kept_bytes(lambda _: lm(**batch(), seed=5), samples, lm)


def test_memory_of_chunked_and_resample_grows_by_log_probs_only():
    base = adapted()

    def growth(plan, **options):
        few, many = (
            bytes_kept(perturbed(base, num_samples=count, plan=plan, **options))
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


def test_auto_batches_all_samples_where_they_fit_and_reports_why(monkeypatch):
    lm = planned(adapted(), "auto")
    with pytest.raises(RuntimeError, match="no plan to report before the first forward"):
        lm.plan_report()
    expected = loss_and_gradients(lm)
    report = lm.plan_report()
    assert report.plan == "batched" and report.chunk_size == M
    assert "all 6 samples fit" in str(report) and report.bytes_per_sample > 0
    for free, size in ((4 * report.bytes_per_sample, 2), (0, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        loss_and_gradients(lm)
        assert lm.plan_report() == report  # a kind of batch keeps its plan
        other = planned(lm.base, "auto")
        assert_same(loss_and_gradients(other), expected)
        small = other.plan_report()
        assert (small.plan, small.chunk_size) == ("chunked", size)
        assert "6 samples at once would not fit" in str(small)


def test_auto_leaves_room_for_gradients_and_an_optimizer(monkeypatch):
    lm = planned(llama(), "auto")
    lm(**batch(), seed=5)
    activations = 11 * lm.plan_report().bytes_per_sample  # of 6 samples, with its margins
    coming = sum(3 * 4 * value.numel() for value in lm.parameters())
    for free, plan in ((activations, "chunked"), (activations + coming, "batched")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        other = planned(lm.base, "auto")
        other(**batch(), seed=5)
        assert other.plan_report().plan == plan


def test_auto_measures_the_bytes_that_a_sample_keeps():
    base = adapted()
    whole = bytes_kept(planned(base, "batched"))
    lm = planned(base, "auto")
    lm(**batch(), seed=5)
    assert 0.8 * whole < M * lm.plan_report().bytes_per_sample < 1.3 * whole
    assert lm.plan_report().free_bytes == pytest.approx(
        memory.free_bytes(torch.device("cpu")), rel=0.3
    )


def test_auto_leaves_the_random_state_unchanged():
    lm = planned(adapted(lora_dropout=0.5), "auto").train()
    whole = planned(lm.base, "batched").train()
    losses = []
    for model in (lm, whole):
        torch.manual_seed(11)
        losses.append(model(**batch(), seed=5).loss)
    assert torch.equal(*losses)


def test_auto_measures_nothing_without_a_gradient_or_with_one_sample():
    lm = planned(adapted(), "auto")
    with torch.no_grad():
        lm(**batch())
    assert "without a gradient" in lm.plan_report().reason
    lm(**batch(), num_samples=1)
    assert "one sample" in lm.plan_report().reason


def test_importing_the_planner_does_not_import_the_compiler():
    code = (
        "import sys; from fastperturb.engine import planner; print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_chunk_that_raised_leaves_the_gradients_of_the_next_call_alone(monkeypatch):
    """Its traceback is alive, as in an `except` that tries again."""
    base = llama().train().requires_grad_(False)  # the head keeps a gradient for the backward
    lm = wrap(base, PerturbConfig(plan="chunked", chunk_size=1))
    ids = torch.randint(97, (2, 8))
    with pytest.raises(torch.OutOfMemoryError) as alive, monkeypatch.context() as patched:
        patched.setattr(LabelHead, "log_probs", _out_of_memory)
        lm(input_ids=ids, labels=ids, seed=1)
    loss = lm(input_ids=ids, labels=ids, seed=1).loss
    assert torch.autograd.grad(loss, lm.transform.U)[0].isfinite().all(), alive


def _out_of_memory(*arguments):
    raise torch.OutOfMemoryError("none left")
