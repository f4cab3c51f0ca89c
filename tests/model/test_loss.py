"""The loss and its gradients against a naive loop over samples, for every estimator."""

import math

import pytest
import torch
from batches import IGNORED, batch, labelled
from oracles import assert_same_gradients, label_log_probs, sample_logits
from tiny import base_model, llama, perturbed, with_lora
from torch.nn import functional as F

from fastperturb import config, estimators

ARCHITECTURES = ("GPT2", "Llama", "Mistral", "Qwen2", "Gemma2")


def inputs_with_gaps():
    """Return a batch with padding on the right and some labels ignored."""
    return batch(unlabelled=4)


def naive_quadratic(logits, labels):
    """Return the quadratic estimator's value [B, T - 1], pair of samples by pair."""
    p = logits[:, :, :-1].float().softmax(-1)
    hit = label_log_probs(logits, labels)[0].exp().mean(0)
    M = len(p)
    cross = sum((p[i] * p[j]).sum(-1) for i in range(M) for j in range(M) if i != j)
    return 2 * hit - cross / (M * (M - 1))


def gradients(loss, lm):
    trained = [p for p in lm.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


def assert_same(ours, expected, *, rel):
    assert_same_gradients(ours, expected, rel=rel, floor=1e-8)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("estimator", ["iwae", "quadratic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_match_a_naive_loop(architecture, estimator, lora):
    model = base_model(architecture)
    adapted = with_lora(model, architecture) if lora else model
    lm = perturbed(adapted, estimator=estimator).train()
    inputs = inputs_with_gaps()
    out = lm(**inputs, num_samples=3, seed=5)

    logits = sample_logits(lm, inputs, seed=5, num_samples=3)
    log_probs, kept = label_log_probs(logits, inputs["labels"])
    marginal = log_probs.logsumexp(0) - math.log(3)
    value = marginal if estimator == "iwae" else naive_quadratic(logits, inputs["labels"])
    loss = -value.where(kept, 0.0).sum() / kept.sum()

    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(out.log_probs, log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.log_marginal, marginal.where(kept, 0.0), rtol=1e-4, atol=1e-4)
    assert_same(gradients(out.loss, lm), gradients(loss, lm), rel=2e-3)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["jensen", "iwae", "jvi_clip"])
def test_estimators_and_marginals_weigh_samples_as_combine_does(estimator, marginal):
    lm = perturbed(llama(), estimator=estimator, marginal=marginal, num_samples=4)
    inputs = inputs_with_gaps()
    out = lm(**inputs, seed=5)
    log_probs, kept = label_log_probs(
        sample_logits(lm, inputs, seed=5, num_samples=4), inputs["labels"]
    )
    log_probs = log_probs if marginal == "token" else log_probs.sum(-1)
    mask = kept if marginal == "token" else kept.any(-1)
    value, _ = estimators.combine(log_probs, estimator, mask=mask)
    loss = -value.sum() / kept.sum()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert out.log_marginal.shape == value.shape
    assert_same(gradients(out.loss, lm), gradients(loss, lm), rel=2e-3)


def test_resample_has_the_iwae_loss_and_sends_k_samples_backward():
    options = {"estimator": "resample", "backward_samples": 1, "num_samples": 6}
    lm = perturbed(llama(), **options, plan="batched")
    inputs = inputs_with_gaps()
    out = lm(**inputs, seed=5)
    with torch.no_grad():
        value, _ = estimators.combine(out.log_probs, "iwae")
    loss = -value.sum() / labelled(inputs).sum()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    upstream = torch.autograd.grad(out.loss, out.log_probs)[0]
    assert (upstream != 0).any(-1).sum(0).tolist() == [1, 1, 1]


def samples_run(out):
    """Return how many samples each row of a telescope ran [B]."""
    return out.log_probs.isfinite().all(-1).sum(0)


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_seed_and_row_id_decide_the_number_of_samples_of_a_telescope(estimator):
    lm = perturbed(llama(), estimator=estimator, num_samples=8)
    inputs = inputs_with_gaps()
    rows = torch.arange(3)
    taken = torch.stack([samples_run(lm(**inputs, seed=seed, rows=rows)) for seed in range(12)])
    assert (taken != taken[:, :1]).any(0).tolist() == [False, True, True]  # rows differ
    assert (taken != taken[:1]).any(0).all()  # and so do steps
    again = [samples_run(lm(**inputs, seed=seed, rows=rows.flip(0))) for seed in range(12)]
    assert torch.equal(torch.stack(again), taken.flip(1))


def test_num_samples_of_the_call_caps_a_telescope():
    lm = perturbed(llama(), estimator="sumo", num_samples=2)
    inputs, telescope = inputs_with_gaps(), estimators.Telescope("sumo", 8)
    mask, deepest = labelled(inputs), 0
    for seed in range(20):
        out = lm(**inputs, seed=seed, num_samples=8)
        taken = samples_run(out)
        log_probs = out.log_probs.detach().nan_to_num(-7.0)
        value, _ = telescope.combine(log_probs, taken - 1, mask=mask)
        assert out.loss.item() == pytest.approx((-value.sum() / mask.sum()).item(), rel=1e-5)
        deepest = max(deepest, int(taken.max()))
    assert deepest == 8


@pytest.mark.parametrize(
    "estimator", ["iwae", "jensen", "jvi_clip", "resample", "mlmc", "quadratic"]
)
def test_parts_of_a_batch_sum_to_the_whole(estimator):
    lm = perturbed(llama(), estimator=estimator, num_samples=4)
    inputs, count = inputs_with_gaps(), labelled(inputs_with_gaps()).sum()
    whole = lm(**inputs, seed=5)
    pieces = []
    for start, stop in ((0, 1), (1, 3)):
        part = {name: value[start:stop] for name, value in inputs.items()}
        rows = torch.arange(start, stop)
        pieces.append(lm(**part, seed=5, rows=rows, num_items_in_batch=count))
    if estimator != "mlmc":  # whose parts run no more samples than their own rows need
        torch.testing.assert_close(
            torch.cat([piece.log_probs for piece in pieces], dim=1),
            whole.log_probs,
            rtol=1e-4,
            atol=1e-5,
        )
    loss = sum(piece.loss for piece in pieces)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert_same(gradients(loss, lm), gradients(whole.loss, lm), rel=1e-4)


def test_mixture_of_estimators_sums_their_losses_and_gradients():
    base, inputs = llama(), inputs_with_gaps()
    mixture = {"iwae": 1.0, "quadratic": 10.0, "jensen": 0.5}

    def run(estimator, **options):
        options = {"num_samples": 4, "sampling": "independent", **options}
        lm = perturbed(base, estimator=estimator, **options)
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


def test_batch_with_every_label_ignored_has_zero_loss_and_gradient():
    lm = perturbed(llama())
    inputs = inputs_with_gaps()
    out = lm(**{**inputs, "labels": torch.full_like(inputs["labels"], IGNORED)})
    assert out.loss == 0
    assert all(g is None or (g == 0).all() for g in gradients(out.loss, lm))


@pytest.mark.parametrize("count", [0, torch.tensor(0), None])
def test_every_label_ignored_gives_zero_loss_for_any_item_count(count):
    lm = perturbed(llama())
    inputs = inputs_with_gaps()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    assert lm(**inputs, num_items_in_batch=count).loss == 0


@pytest.mark.parametrize("estimator", ["iwae", "resample", "mlmc"])
def test_rows_of_one_token_have_no_label_and_zero_loss(estimator):
    lm = perturbed(llama(), estimator=estimator)
    one_token = torch.tensor([[5], [6]])
    out = lm(input_ids=one_token, labels=one_token)
    assert out.loss == 0
    assert out.log_prob_variance == 0


def test_label_that_follows_padding_counts_in_a_call_and_not_in_score():
    lm = perturbed(llama()).eval()
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    after_padding = (mask == 0) | (mask.cumsum(1) == 1)
    pads_ignored = ids.masked_fill(mask == 0, IGNORED)
    inputs = {"input_ids": ids, "attention_mask": mask, "num_samples": 64, "seed": 1}
    with torch.no_grad():
        counted = lm(**inputs, labels=pads_ignored)
        left_out = lm(**inputs, labels=ids.masked_fill(after_padding, IGNORED))
    assert (counted.log_probs[:, 1, 2] != 0).all()  # of row 1's first real token
    assert counted.loss != left_out.loss
    torch.testing.assert_close(lm.score(**inputs).nll.float(), left_out.loss)


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
def test_half_precision_trunks_train_the_fp32_transform(mode):
    model = llama()
    lm = perturbed(model.bfloat16() if mode == "bf16 weights" else model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        out = lm(**inputs_with_gaps(), seed=5)
    exact = perturbed(llama())
    exact.transform.load_state_dict(lm.transform.state_dict())
    expected = exact(**inputs_with_gaps(), seed=5)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    ours = torch.autograd.grad(out.loss, lm.transform.U)[0]
    right = torch.autograd.grad(expected.loss, exact.transform.U)[0]
    assert ours.dtype == torch.float32
    assert F.cosine_similarity(ours.flatten(), right.flatten(), dim=0) > 0.97


def test_gradient_checkpointing_changes_no_gradient():
    lm = perturbed(llama()).train()
    plain = gradients(lm(**inputs_with_gaps(), seed=5).loss, lm)
    enable = getattr(lm.base, "activation_checkpointing_enable", None)  # its name from 5.2x on
    (enable or lm.base.gradient_checkpointing_enable)({"use_reentrant": False})
    assert_same(gradients(lm(**inputs_with_gaps(), seed=5).loss, lm), plain, rel=1e-5)


def test_training_the_transform_lowers_the_loss_on_a_frozen_base():
    model = llama().requires_grad_(False)
    lm = perturbed(model, num_samples=8)
    optimizer = torch.optim.Adam([p for p in lm.parameters() if p.requires_grad], lr=0.05)
    assert {name for name, p in lm.named_parameters() if p.requires_grad} == {"transform.U"}
    losses = []
    for _ in range(20):
        loss = lm(**inputs_with_gaps(), seed=5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert model.lm_head.weight.grad is None


def test_estimator_that_is_only_a_formula_trains_alone_and_in_a_mixture(monkeypatch):
    def formula(log_probs):
        return log_probs.amax(0), F.one_hot(log_probs.argmax(0), 3).movedim(-1, 0)

    for module in (config, estimators):
        monkeypatch.setattr(module, "ESTIMATORS", (*config.ESTIMATORS, "best"))
    monkeypatch.setattr(config, "MIXABLE", (*config.MIXABLE, "best"))
    monkeypatch.setitem(estimators._EQUATIONS, "best", formula)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    for estimator, shares in (("best", (1.0, 0.0)), ({"best": 0.5, "iwae": 2.0}, (0.5, 2.0))):
        lm = perturbed(llama(), estimator=estimator, num_samples=3)
        out = lm(input_ids=ids, labels=ids, seed=5)
        values = shares[0] * out.log_probs.amax(0) + shares[1] * out.log_marginal
        torch.testing.assert_close(out.loss, -values.mean())
        expected = -(
            shares[0] * out.log_probs.amax(0)
            + shares[1] * (out.log_probs.logsumexp(0) - math.log(3))
        ).mean()
        (ours,) = torch.autograd.grad(out.loss, lm.transform.U, retain_graph=True)
        (naive,) = torch.autograd.grad(expected, lm.transform.U)
        torch.testing.assert_close(ours, naive)
