"""A context transform: the state of its tokens, in every way that a call lays tokens out."""

import batches
import pytest
import tiny
import torch
from oracles import assert_same_gradients, label_log_probs, loss_and_gradients

import fastperturb
from fastperturb import PerturbConfig, noise, ops, wrap
from fastperturb.transforms import context_states, make_transform

SOURCES = ("embedding", "trunk")


def contextual(*, base=None, strength=1.0, **options):
    """Return a model whose context matters from the start."""
    options = {"num_samples": 4, "latent_dim": 3, "hidden_dim": 5, "init_scale": 0.7, **options}
    lm = wrap(base or tiny.llama(), PerturbConfig(transform="context", **options))
    torch.manual_seed(3)
    with torch.no_grad():
        lm.transform.G.normal_(0, strength)
    return lm


def states_by_hand(inputs, retain, starts, real, initial):
    """Walk the recurrence token by token."""
    state, states = initial, []
    for t in range(inputs.shape[1]):
        before = torch.where(starts[:, t, None], 0.0, state)
        new = retain * before + (1 - retain) * inputs[:, t]
        state = torch.where(real[:, t, None], new, state)
        states.append(state)
    return torch.stack(states, dim=1)


def naive_log_probs(lm, inputs, *, seed, num_samples):
    """Return each sample's label log-probs [M, B, T-1] by a loop over rows, samples and tokens."""
    transform, embed = lm.transform, lm.base.get_input_embeddings()
    U, A, G, decay = (getattr(transform, name) for name in transform.parameter_names)
    rho, retain, logits = transform.embed_rms, torch.sigmoid(decay), []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = batches.positions_of(mask)
    z = noise.latent(seed, (num_samples, *ids.shape, transform.latent_dim), positions=positions)
    for sample in z:
        rows = []
        for b in range(len(ids)):
            e = embed(ids[b])
            sources = e / rho
            if transform.context_source == "trunk":
                with torch.no_grad():
                    hidden = lm.base.model(
                        inputs_embeds=e[None], attention_mask=mask[b : b + 1]
                    ).last_hidden_state[0]
                sources = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
            state, perturbed = torch.zeros_like(decay), []
            for t in range(len(e)):
                if not mask[b, t]:
                    perturbed.append(e[t])
                    continue
                state = retain * state + (1 - retain) * (sources[t] @ A)
                scale = 1 + torch.tanh(state @ G)
                perturbed.append(e[t] + rho * ((sample[b, t] * scale) @ U))
            rows.append(torch.stack(perturbed))
        out = lm.base(inputs_embeds=torch.stack(rows), attention_mask=mask, position_ids=positions)
        logits.append(out.logits)
    return label_log_probs(torch.stack(logits), inputs["labels"])


@pytest.mark.parametrize("source", SOURCES)
def test_the_loss_and_all_gradients_are_a_naive_loops(source):
    lm = contextual(context_source=source)
    inputs = batches.batch(left=2)
    out, gradients = loss_and_gradients(lm, inputs)
    lm.zero_grad()
    log_probs, is_labelled = naive_log_probs(lm, inputs, seed=5, num_samples=4)
    mean = log_probs.logsumexp(0) - torch.tensor(4.0).log()
    loss = -mean[is_labelled].sum() / is_labelled.sum()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    parameters = dict(lm.named_parameters())
    names = [f"transform.{name}" for name in lm.transform.parameter_names]
    names.append("base.model.embed_tokens.weight")
    assert_same_gradients(
        [gradients[name] for name in names],
        [parameters[name].grad for name in names],
        rel=2e-4,
        floor=1e-6,
        names=names,
    )


@pytest.mark.parametrize("seed", range(5))
def test_states_are_those_of_the_recurrence(seed):
    torch.manual_seed(seed)
    B, T, H = 3, int(torch.randint(1, 40, ())), 4
    inputs, retain = torch.randn(B, T, H).double(), torch.rand(H).double()
    starts, real = torch.rand(B, T) < 0.2, torch.rand(B, T) < 0.8
    initial = torch.randn(B, H).double()
    ours = context_states(inputs, retain, starts, real, initial)
    expected = states_by_hand(inputs, retain, starts, real, initial)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_without_a_gate_it_is_lowrank_bit_for_bit():
    lm, plain = contextual(strength=0.0), tiny.perturbed(tiny.llama(), latent_dim=3, num_samples=4)
    with torch.no_grad():
        plain.transform.U.copy_(lm.transform.U)
    inputs = batches.batch()
    for name in ("loss", "log_probs", "shift"):
        ours, theirs = (getattr(model(**inputs, seed=5), name) for model in (lm, plain))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("source", SOURCES)
def test_packed_documents_have_the_log_probs_of_each_alone(source):
    lm = contextual(context_source=source)
    ids = batches.batch(size=1, length=12, right=0)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    rows = torch.tensor([[3] * 5 + [8] * 7])
    labels = ids.clone()
    labels[:, 5] = -100  # no document predicts the first token of the next
    packed = lm(ids, labels=labels, position_ids=positions, rows=rows, seed=5).log_probs
    for part, row in ((slice(0, 5), 3), (slice(5, 12), 8)):
        alone = lm(ids[:, part], labels=ids[:, part], rows=torch.tensor([row]), seed=5).log_probs
        within = slice(part.start, part.stop - 1)
        torch.testing.assert_close(packed[..., within], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(source, side):
    lm = contextual(context_source=source)
    ids = batches.batch(size=2, length=8, right=0)["input_ids"]
    pad = torch.full((2, 3), 7)  # the model's own has an embedding of 0, which adds nothing
    parts = [pad, ids] if side == "left" else [ids, pad]
    mask = torch.cat([torch.full_like(part, part is ids) for part in parts], dim=1)
    padded = torch.cat(parts, dim=1)
    plain, other = lm.score(ids, seed=5), lm.score(padded, attention_mask=mask, seed=5)
    torch.testing.assert_close(other.nll, plain.nll, rtol=1e-5, atol=0)


def test_a_masked_token_within_a_row_is_no_context():
    lm = contextual(strength=3.0)
    ids = batches.batch(size=1, length=8, right=0)["input_ids"]
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, 4] = 0
    longer = torch.cat([ids[:, :4], torch.tensor([[7]]), ids[:, 4:]], dim=1)
    labels = longer.where(mask.bool(), -100)
    plain = lm(ids, labels=ids, seed=5).log_probs
    other = lm(longer, labels=labels, attention_mask=mask, seed=5).log_probs
    torch.testing.assert_close(other[..., 5:], plain[..., 4:], rtol=1e-4, atol=1e-5)


def test_a_prefix_that_is_held_counts_as_context():
    lm = contextual(strength=3.0)
    ids = batches.batch(size=1, length=8, right=0)["input_ids"]
    other = ids.clone()
    other[0, 0] = 50
    mask = torch.arange(8)[None] >= 3
    embed = lm.base.get_input_embeddings()
    shifts = []
    for tokens in (ids, other):
        e = embed(tokens)
        perturbed = lm.perturb(
            e, torch.tensor(5), 4, rows=torch.zeros(1, dtype=torch.int64), perturb_mask=mask
        )
        assert torch.equal(perturbed[:, :, :3], e[None, :, :3].expand(4, -1, -1, -1))
        shifts.append(perturbed[:, :, 3:] - e[:, 3:])
    assert (shifts[0] - shifts[1]).abs().amax(-1).min() > 1e-5  # at every perturbed position


def test_no_token_changes_an_earlier_logit():
    lm = contextual(strength=3.0)
    ids = batches.batch(size=1, length=8, right=0)["input_ids"]
    other = ids.clone()
    other[0, 6] = 50
    one, two = (lm(tokens, seed=5, return_logits=True).logits for tokens in (ids, other))
    assert torch.equal(one[:, :6], two[:, :6]) and not torch.equal(one[:, 6:], two[:, 6:])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("estimator", ["iwae", "jensen", "jvi_clip", "quadratic", "sumo", "mlmc"])
@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_every_plan_has_the_loss_and_gradients_of_all_samples_at_once(source, estimator, sampling):
    results = []
    for plan in ({"plan": "batched"}, {"plan": "chunked", "chunk_size": 1}):
        lm = contextual(context_source=source, estimator=estimator, sampling=sampling, **plan)
        results.append(loss_and_gradients(lm, batches.batch()))
    (one, ones), (two, twos) = results
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(list(twos.values()), list(ones.values()), rel=1e-4, floor=1e-6)


def test_resample_has_the_gradient_of_iwae_on_average():
    lm, inputs = contextual(num_samples=2, backward_samples=1), batches.batch(size=1, right=0)
    _, exact = loss_and_gradients(lm, inputs)
    with lm.overriding(estimator="resample"):
        _, drawn = loss_and_gradients(lm, inputs)
    assert drawn.keys() == exact.keys()  # the context's parameters have one too


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_proposal_moves_scaled_latents(scope):
    options = {"scope": scope, "marginal": "sequence", "num_samples": 8, "init_scale": 1.0}
    lm = contextual(**options, strength=2.0)
    ids = batches.batch(size=2, length=6, right=0)["input_ids"]
    with torch.no_grad():
        exact = lm(ids, labels=ids, num_samples=8192, seed=5).log_marginal
        with lm.overriding(proposal="gradient"):
            ours = lm(ids, labels=ids, num_samples=1024, seed=6).log_marginal
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.3)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", ["sequence", "token", "mixture"])
def test_decoding_with_a_cache_gives_the_tokens_of_decoding_without(mode, source):
    lm = contextual(context_source=source, strength=2.0).eval()
    inputs = batches.batch(size=3, length=7, right=0, left=2)
    options = {
        **{"attention_mask": inputs["attention_mask"], "mode": mode, "seed": 5},
        **{"max_new_tokens": 9, "do_sample": False, "eos_token_id": None},
    }
    cached, plain = (
        lm.generate(inputs["input_ids"], use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape == (3, 16)


def test_decoded_tokens_are_those_that_scoring_finds_most_likely():
    lm = contextual(strength=2.0).eval()
    ids = batches.batch(size=2, length=5, right=0)["input_ids"]
    text = lm.generate(ids, seed=5, max_new_tokens=6, do_sample=False, eos_token_id=None)
    logits = lm(text, seed=5, num_samples=1, return_logits=True).logits
    assert torch.equal(logits[:, 4:-1].argmax(-1), text[:, 5:])


def test_saving_keeps_the_context_and_its_source(tmp_path):
    lm = contextual(context_source="trunk").eval()
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(tiny.llama(), tmp_path).eval()
    ids = batches.batch()["input_ids"]
    assert loaded.config == lm.config
    assert torch.equal(loaded.score(ids, seed=5).nll, lm.score(ids, seed=5).nll)


def test_a_checkpoint_of_another_family_is_named(tmp_path):
    lm = contextual()
    lm.config = PerturbConfig(transform="gated", latent_dim=3, hidden_dim=5)
    with pytest.raises(ValueError, match="transform"):
        lm.save_pretrained(tmp_path)


def test_standard_errors_reach_the_contexts_parameters():
    lm = contextual().eval()
    for value in lm.base.parameters():
        value.requires_grad_(False)
    data = [batches.batch(size=8, right=0, seed=seed) for seed in range(3)]
    errors = lm.standard_errors(data, parameters=["decay"], bread="outer", seed=5).errors["decay"]
    # The same from each row's gradient by autograd.
    lm.transform.decay.requires_grad_()
    scores = []
    for number, inputs in enumerate(data):
        for b in range(8):
            row = batches.row_of(inputs, b)
            rows = torch.tensor([8 * number + b])
            loss = lm(**row, rows=rows, seed=5, num_items_in_batch=1).loss
            scores.append(torch.autograd.grad(-loss, lm.transform.decay)[0].double())
    information = torch.stack(scores).T @ torch.stack(scores)
    torch.testing.assert_close(errors, information.inverse().diag().sqrt(), rtol=1e-3, atol=0)


def test_per_sample_gradients_sum_to_the_gradient_of_every_parameter():
    transform = contextual(min_scale=0.9).transform.double()
    torch.manual_seed(0)
    embeddings, grad = torch.randn(2, 7, 32).double(), torch.randn(4, 2, 7, 32).double()
    out = ops.perturb_embed(embeddings, None, transform, 5, 4)
    whole = torch.autograd.grad(out, list(transform.parameters()), grad)
    psi = ops.perturb_embed_per_sample_grad(grad, embeddings, None, transform, 5, 4)
    for name, expected in zip(transform.parameter_names, whole, strict=True):
        assert psi[name].shape == (4, 2, *expected.shape)
        torch.testing.assert_close(psi[name].sum((0, 1)), expected, rtol=1e-6, atol=1e-8)


def test_the_scale_counts_the_gate():
    lm = contextual(strength=3.0, init_scale=0.3)
    torch.manual_seed(0)
    e = lm.transform.embed_rms * torch.randn(200, 64, 32)
    perturbed = ops.perturb_embed(e, None, lm.transform, 5, 2)
    measured = (perturbed - e).square().mean().sqrt() / lm.transform.embed_rms
    assert lm.transform.scale().item() == pytest.approx(measured.item(), rel=0.1)
    assert lm.transform.scale() > 0.33  # more than that of U alone


def test_rows_of_documents_that_do_not_restart_are_named():
    lm, ids = contextual(), batches.batch(size=1, length=8, right=0)["input_ids"]
    rows = torch.tensor([[0] * 4 + [1] * 4])
    with pytest.raises(ValueError, match="position_ids that restart"):
        lm(ids, labels=ids, rows=rows)
    restarting = torch.arange(4).repeat(2)[None]
    lm(ids, labels=ids, rows=rows, position_ids=restarting)


@pytest.mark.parametrize("name", ["latent_dim", "hidden_dim"])
def test_an_empty_dimension_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive int"):
        PerturbConfig(transform="context", **{name: 0})


def test_a_scale_that_the_op_cannot_take_is_named():
    config = PerturbConfig(transform="context", latent_dim=3)
    transform, e = make_transform(config, 8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"latent_scale must be torch.float32 \[B, T, R\]"):
        ops.perturb_embed(e, None, transform, 5, 4, latent_scale=torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match="latent_scale is of transform='context'"):
        lowrank = make_transform(PerturbConfig(latent_dim=3), 8)
        ops.perturb_embed(e, None, lowrank, 5, 4, latent_scale=torch.ones(2, 5, 3))
    of_trunk = make_transform(
        PerturbConfig(transform="context", context_source="trunk", latent_dim=3), 8
    )
    with pytest.raises(ValueError, match="give latent_scale"):
        ops.perturb_embed(e, None, of_trunk, 5, 4)
    with pytest.raises(ValueError, match="context_source must be one of"):
        PerturbConfig(transform="context", context_source="tokens")
