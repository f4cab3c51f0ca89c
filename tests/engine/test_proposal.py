"""The gradient proposal: exact by quadrature, the same under every plan, rejected by name."""

from unittest import mock

import pytest
import tiny
import tiny_run
import torch
from batches import IGNORED

from fastperturb import PerturbConfig, wrap
from fastperturb.engine import proposal
from fastperturb.ops import dispatch

V, T = 13, 3


def llama(**changes):
    return tiny.llama(vocab_size=V, num_hidden_layers=1, initializer_range=0.4, **changes)


def proposing(base=None, **options):
    fixed = {"proposal": "gradient", "latent_dim": 1, "init_scale": 0.5, "num_samples": 4}
    return wrap(llama() if base is None else base, PerturbConfig(**{**fixed, **options}))


def batch(length=T, size=2):
    torch.manual_seed(0)
    ids = torch.randint(3, V, (size, length))
    return {"input_ids": ids, "labels": ids.clone()}


def grid(scope):
    """Return eps on a fine grid, [points, latents], and the log of a standard normal's weights."""
    count = 1 if scope == "sequence" else T - 1  # the last position's latent moves no label
    line = torch.linspace(-7, 7, 201 if count == 1 else 61, dtype=torch.float64)
    points = torch.cartesian_prod(*[line] * count).view(-1, count)
    return points, (-points.square() / 2).sum(-1).log_softmax(0)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_the_weighted_mean_over_the_proposal_is_the_marginal(scope, marginal, monkeypatch):
    """Both expectations are sums over a grid, which stands in for the noise."""
    lm = proposing(scope=scope, marginal=marginal)
    inputs = batch(size=1)
    nodes, log_chances = grid(scope)
    eps = torch.zeros(len(nodes), 1, T, 1)
    eps[:, 0, : nodes.shape[1], 0] = nodes
    if scope == "sequence":
        eps = eps[:, :, :1].expand(-1, -1, T, -1)

    def noise(seed, m, b, t, **options):
        return eps[m[:, 0], :, : b.shape[1]].clone()

    monkeypatch.setattr("fastperturb.noise.draw_latent", noise)
    events = {}
    for name in ("gradient", "prior"):
        with lm.overriding(proposal=name), dispatch.only("torch"):
            output = lm(**inputs, num_samples=len(nodes), seed=5)
        log_probs = output.log_probs.detach().double()
        if output.log_weights is not None:
            assert output.log_weights.std() > 0.01
            log_probs = log_probs + output.log_weights
        log_probs = log_probs if marginal == "token" else log_probs.sum(-1, keepdim=True)
        events[name] = (log_probs + log_chances[:, None, None]).logsumexp(0)
    # fp32 log-probs
    torch.testing.assert_close(events["gradient"], events["prior"], rtol=0, atol=1e-4)


def test_a_label_that_sees_two_latents_has_the_weights_of_both(monkeypatch):
    """Row ids change inside one document, so its later labels depend on the latents of both ids."""
    lm = proposing(scope="sequence")
    inputs = {**batch(length=5, size=1), "rows": torch.tensor([[0, 0, 1, 1, 1]])}
    line = torch.linspace(-7, 7, 141, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)  # of ids 0 and 1
    log_chances = (-points.square() / 2).sum(-1).log_softmax(0)

    def noise(seed, m, b, t, **options):
        return points[m[:, 0]][:, b[0]].float()[:, None, :, None]

    monkeypatch.setattr("fastperturb.noise.draw_latent", noise)
    marginals = []
    for name in ("gradient", "prior"):
        with lm.overriding(proposal=name), dispatch.only("torch"), torch.no_grad():
            output = lm(**inputs, num_samples=len(points), seed=5)
        weights = 0.0 if output.log_weights is None else output.log_weights.double()
        log_probs = output.log_probs.double() + weights + log_chances[:, None, None]
        marginals.append(log_probs.logsumexp(0))
    torch.testing.assert_close(*marginals, rtol=0, atol=2e-4)  # fp32 log-probs, a coarse grid


def test_more_steps_end_where_the_labels_are_more_likely():
    lm = proposing(scope="sequence", marginal="sequence", latent_dim=8)
    values = []
    for steps in (1, 16):
        with lm.overriding(proposal_steps=steps), torch.no_grad():
            mean = _mean(lm, batch(length=12))
        e = lm.base.get_input_embeddings()(batch(length=12)["input_ids"])
        with lm.exact(), torch.no_grad():
            out = lm(inputs_embeds=lm.transform(e, mean), labels=batch(length=12)["labels"])
        values.append(out.log_probs[0].sum(-1) - mean[:, 0].square().sum(-1) / 2)
    assert (values[-1] > values[0]).all()


def _mean(lm, inputs):
    """Return mu [B, T, R] of a call."""
    means = []

    def fitted_mean(*arguments, fit=proposal.fitted_mean):
        means.append(fit(*arguments))
        return means[-1]

    with mock.patch.object(proposal, "fitted_mean", fitted_mean):
        lm(**inputs, seed=5)
    return means[0]


@pytest.mark.parametrize("estimator", ["iwae", "jvi_clip", "resample", "mlmc"])
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_plans_and_chunks_have_one_loss_and_one_gradient(scope, estimator):
    base = llama()
    first = proposing(base)
    results = []
    for plan, size in (("batched", None), ("chunked", 1), ("chunked", 3)):
        if estimator == "resample":
            plan = "auto"
        lm = proposing(
            base,
            scope=scope,
            estimator=estimator,
            plan=plan,
            chunk_size=size,
            sampling="independent",
        )
        lm.transform.load_state_dict(first.transform.state_dict())
        out = lm(**batch(length=6), seed=5)
        out.loss.backward()
        results.append((out.loss.detach(), lm.transform.U.grad))
        assert base.lm_head.weight.grad is not None
        base.zero_grad()
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_packed_documents_have_the_weights_of_documents_alone(scope):
    lm = proposing(scope=scope, latent_dim=3)
    ids = batch(length=5)["input_ids"]
    labels = ids.clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(5).repeat(2)[None]
    rows = torch.tensor([[0] * 5 + [1] * 5])
    mean = torch.randn(2, 5, 3) if scope == "token" else torch.randn(2, 1, 3).expand(-1, 5, -1)

    def weights(inputs, mean):
        with mock.patch.object(proposal, "fitted_mean", lambda *arguments: mean):
            return lm(**inputs, seed=5)

    alone = weights({"input_ids": ids, "labels": labels}, mean)
    packed = weights(
        {
            "input_ids": ids.view(1, -1),
            "labels": labels.view(1, -1),
            "position_ids": positions,
            "rows": rows,
        },
        mean.reshape(1, 10, 3),
    )
    for name in ("log_probs", "log_weights"):
        both = getattr(packed, name)[:, 0]
        torch.testing.assert_close(both[:, :4], getattr(alone, name)[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[:, 5:], getattr(alone, name)[:, 1], rtol=1e-4, atol=1e-5)


def test_positions_that_are_not_perturbed_have_no_weight():
    lm = proposing(latent_dim=3)
    mask = torch.tensor([[False, True, False, True], [False, False, False, False]])
    out = lm(**batch(length=4), perturb_mask=mask, seed=5)
    assert (out.log_weights[:, 0, 0] == 0).all() and (out.log_weights[:, 1] == 0).all()
    assert (out.log_weights[:, 0, 1] == out.log_weights[:, 0, 2]).all()
    assert (out.log_weights[:, 0, 1] != 0).all()


def test_the_parameters_keep_no_gradient_and_no_grad_stays_off():
    lm = proposing(scope="sequence", marginal="sequence")
    with torch.no_grad():
        out = lm(**batch(), seed=5)
    assert not out.loss.requires_grad and not out.log_weights.requires_grad
    assert all(value.grad is None for value in lm.parameters())
    assert "4 passes of one sample before, for the proposal" in str(lm.plan_report())


def test_score_takes_the_proposal_for_sequences_and_the_prior_for_tokens():
    inputs = batch(length=12)
    options = {"scope": "sequence", "latent_dim": 8, "init_scale": 0.3, "sampling": "independent"}
    prior = proposing(**options, marginal="sequence", proposal="prior")
    ours = proposing(prior.base, **options, marginal="sequence")
    ours.transform.load_state_dict(prior.transform.state_dict())
    few = ours.score(**inputs, num_samples=512, seed=5)
    many = prior.score(**inputs, num_samples=8192, seed=6)
    error = (few.standard_error.square() + many.standard_error.square()).sqrt()
    assert ((few.jackknife - many.jackknife).abs() < 4 * error).all()
    token = proposing(prior.base, **options)
    token.transform.load_state_dict(prior.transform.state_dict())
    with prior.overriding(marginal="token"):
        expected = prior.score(**inputs, num_samples=8, seed=5)
    assert torch.equal(token.score(**inputs, num_samples=8, seed=5).nll, expected.nll)


@pytest.mark.parametrize("num_samples", [8, 16])
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"proposal": "prior"}, "use proposal='gradient' or more samples"),
        ({"proposal": "prior", "latent": "uniform"}, "too small; use more samples"),
        ({"proposal_steps": 1}, "use more proposal_steps or more samples"),
    ],
)
def test_a_sequence_score_of_few_effective_samples_warns_with_what_helps(
    options, remedy, num_samples
):
    lm = proposing(scope="sequence", marginal="sequence", init_scale=6.0, **options)
    with pytest.warns(UserWarning, match=f"of {num_samples} samples have .*{remedy}"):
        lm.score(**batch(length=12), num_samples=num_samples, seed=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": "uniform"}, "moves a gaussian latent, got latent='uniform'"),
        ({"deterministic": True}, "deterministic=True has only one"),
        ({"estimator": "quadratic"}, "the quadratic estimator takes whole distributions"),
        ({"estimator": {"iwae": 1.0, "quadratic": 0.1}}, "takes whole distributions"),
        ({"proposal_steps": 0}, "proposal_steps must be a positive int"),
        ({"proposal": "posterior"}, "proposal must be one of"),
    ],
)
def test_a_config_that_has_no_proposal_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PerturbConfig(**{"proposal": "gradient", **options})


def test_a_call_that_has_no_proposal_is_named(tmp_path):
    lm = proposing()
    with pytest.raises(ValueError, match="draws latents by the labels, and the call has none"):
        lm(batch()["input_ids"])
    with pytest.raises(ValueError, match="logits that know the labels"):
        lm(**batch(), return_logits=True)
    with pytest.raises(ValueError, match="inference_mode"), torch.inference_mode():
        lm(**batch())
    with pytest.raises(ValueError, match="standard errors are of samples from the prior"):
        lm.standard_errors([batch()])
    with pytest.raises(ValueError, match="not after edits"):
        perturb = PerturbConfig(proposal="gradient")
        tiny_run.options(tmp_path, method="discrete", perturb=perturb)


def test_a_row_id_that_comes_back_is_named():
    lm = proposing(scope="sequence")
    ids = batch(length=6)["input_ids"][:1]
    positions, rows = torch.arange(3).repeat(2)[None], torch.tensor([[0, 1, 1, 0, 0, 0]])
    with pytest.raises(ValueError, match="documents that lie in one piece"):
        lm(ids, labels=ids, rows=rows, position_ids=positions)
    lm(ids, labels=ids, rows=rows.sort().values, position_ids=positions)
    with lm.overriding(proposal="prior"):
        lm(ids, labels=ids, rows=rows, position_ids=positions)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_re_entrant_checkpointing_is_named():
    lm = proposing(scope="sequence")
    enable = "activation_checkpointing_enable"  # older transformers have the other name
    name = enable if hasattr(lm.base, enable) else "gradient_checkpointing_enable"
    getattr(lm.base, name)({"use_reentrant": True})
    lm.train()
    ids = batch(length=6)["input_ids"]
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        lm(ids, labels=ids)


def test_a_base_without_gradients_to_its_embeddings_is_named():
    lm = proposing()
    forward = lm.base.model.forward

    def detached(*arguments, inputs_embeds, **options):
        return forward(*arguments, inputs_embeds=inputs_embeds.detach(), **options)

    lm.base.model.forward = detached
    with pytest.raises(ValueError, match="LlamaForCausalLM gives none; use proposal='prior'"):
        lm.base.requires_grad_(False)
        lm(**batch(), seed=5)


def test_generation_is_unaffected():
    ours = proposing(scope="sequence")
    ids = batch()["input_ids"]
    tokens = ours.generate(ids, seed=5, max_new_tokens=4, do_sample=False)
    with ours.overriding(proposal="prior"):
        assert torch.equal(ours.generate(ids, seed=5, max_new_tokens=4, do_sample=False), tokens)
