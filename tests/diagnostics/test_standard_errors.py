"""Standard errors against closed forms, against autograd row by row, and against replications."""

import pytest
import tiny
import torch
from batches import IGNORED, row_of
from oracles import without_shared_prefix

from fastperturb import EditConfig, PerturbConfig, noise, wrap
from fastperturb.diagnostics.standard_errors import _inverse, _rotations, _without
from fastperturb.engine.edit_layout import KINDS

VOCAB, DIM = 12, 3
TRUTH = torch.tensor([[0.4, 0.84, -0.72]], dtype=torch.float64)


def one_layer(**changes):
    return tiny.llama(
        seed=3,
        vocab_size=31,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=0.3,
        pad_token_id=None,
        **changes,
    )


def one_sign(**options):
    """Return a model without layers whose z is one sign.

    Its p(y | x) is the mean over +-U of softmax(norm(e +- rho U) W^T)[y]. Two antithetic samples
    are the whole distribution of z, so the model has no Monte-Carlo noise.
    """
    defaults = {"antithetic": True, "num_samples": 2, "latent": "rademacher", "latent_dim": 1}
    model = tiny.llama(
        seed=3,
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=DIM,
        initializer_range=1.0,
        pad_token_id=None,  # else the embedding of token 0 is zero
    )
    return wrap(model.requires_grad_(False), PerturbConfig(**{**defaults, **options}))


def log_prob(lm, U, x, z):
    """Return log p(. | x, z) in fp64: x [...] and z [..., 1] to [..., V]."""
    rho, table = lm.transform.embed_rms.double(), lm.base.model.embed_tokens.weight.double()
    perturbed = table[x] + rho * z * U[0]
    scale = torch.rsqrt(perturbed.square().mean(-1, keepdim=True) + lm.base.config.rms_norm_eps)
    return (perturbed * scale @ lm.base.lm_head.weight.double().T).log_softmax(-1)


def exact(lm, U, x):
    """Return log p(. | x), the two signs summed out."""
    both = torch.stack([log_prob(lm, U, x, z * torch.ones(1)) for z in (-1.0, 1.0)])
    return both.logsumexp(0) - torch.log(torch.tensor(2.0))


def sampled(lm, examples, *, seed=0):
    """Draw prefixes and continuations from the model at TRUTH."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(VOCAB, (examples,), generator=generator)
    return x, torch.multinomial(exact(lm, TRUTH, x).exp(), 1, generator=generator)[:, 0]


def rows_of(x, y, *, times=1):
    """Return a batch with each (x, y) as a row, or `times` times in it."""
    ids = torch.stack([x, y], dim=1).repeat(1, times)
    labels = ids.clone()
    labels[:, ::2] = IGNORED
    return {"input_ids": ids, "labels": labels}


def loader(batch, size):
    """Return the batch in parts of `size` rows."""
    parts = [value.split(size) for value in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


def solve(values, *, steps=8):
    """Maximise the sum over rows of values(U) by Newton's method from TRUTH."""
    U = TRUTH.clone()
    for _ in range(steps):
        slope = torch.func.jacrev(lambda U: values(U).sum())(U).flatten()
        curve = torch.func.hessian(lambda U: values(U).sum())(U).view(DIM, DIM)
        U = U - torch.linalg.solve(curve, slope).view_as(U).clamp(-0.2, 0.2)
    return U


def sandwich(values, U):
    """Return the covariances by sandwich and by outer products, from autograd row by row."""
    psi = torch.func.jacrev(values)(U).flatten(1)
    A = -torch.func.hessian(lambda U: values(U).sum())(U).view(DIM, DIM)
    B = psi.T @ psi
    return A.inverse() @ B @ A.inverse(), B.inverse()


def at(lm, U):
    """Set the parameters of a model and return it."""
    with torch.no_grad():
        lm.transform.U.copy_(U)
    return lm


def test_both_breads_match_the_closed_form_of_a_known_marginal():
    lm = one_sign()
    x, y = sampled(lm, 300)

    def values(U):
        return exact(lm, U, x).gather(1, y[:, None])[:, 0]

    U = solve(values)
    expected, outer = sandwich(values, U)
    before = at(lm, U).transform.U.clone()
    result = lm.standard_errors(loader(rows_of(x, y), 64), seed=1)
    assert (result.bread, result.examples) == ("information", 300)
    torch.testing.assert_close(result.covariance, expected, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(
        result.errors["U"], expected.diagonal().sqrt().view(1, DIM), rtol=3e-3, atol=0.0
    )
    assert result.newton_step < 0.01
    assert torch.equal(lm.transform.U, before)
    by_outer = lm.standard_errors(loader(rows_of(x, y), 100), bread="outer", seed=2)
    torch.testing.assert_close(by_outer.covariance, outer, rtol=1e-3, atol=1e-6)


def test_labels_repeated_in_their_row_change_the_outer_bread_only():
    lm = one_sign()
    x, y = sampled(lm, 300)
    at(lm, solve(lambda U: exact(lm, U, x).gather(1, y[:, None])[:, 0]))
    once, twice = ([rows_of(x, y, times=times)] for times in (1, 2))
    for bread, factor in (("information", 1.0), ("outer", 0.25)):
        one, two = (lm.standard_errors(rows, bread=bread).covariance for rows in (once, twice))
        torch.testing.assert_close(two, factor * one, rtol=5e-3, atol=1e-6)


def iwae(log_p, y):
    index = y[None, :, None].expand(len(log_p), -1, 1)
    return log_p.gather(2, index)[..., 0].logsumexp(0)


def quadratic(log_p, y):
    p, M = log_p.exp(), len(log_p)
    hit = p.gather(2, y[None, :, None].expand(M, -1, 1))[..., 0].mean(0)
    cross = p.sum(0).square().sum(-1) - p.square().sum((0, 2))
    return 2 * hit - cross / (M * (M - 1))


@pytest.mark.parametrize("estimator", [iwae, quadratic])
def test_sandwich_is_that_of_the_estimator_at_its_own_samples(estimator):
    lm = one_sign(antithetic=False, num_samples=6, estimator=estimator.__name__)
    x, y = sampled(lm, 400)
    z = noise.latent(5, (6, 400, 2, 1), latent="rademacher")[:, :, 0].double()

    def values(U):
        return estimator(log_prob(lm, U, x.expand(6, -1), z), y)

    U = solve(values)
    expected, _ = sandwich(values, U)
    result = at(lm, U).standard_errors(loader(rows_of(x, y), 128), seed=5)
    torch.testing.assert_close(result.covariance, expected, rtol=1e-2, atol=1e-5)
    assert result.newton_step < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_errors_match_the_spread_of_estimates_over_replications(times):
    lm, examples, replications = one_sign(), 1000, 300
    entries = torch.arange(VOCAB)
    estimates, errors = [], []
    for seed in range(replications):
        x, y = sampled(lm, examples, seed=seed)
        counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
        counts.index_put_((x, y), torch.ones(examples, dtype=torch.float64), accumulate=True)
        U = solve(lambda U, counts=counts: counts * exact(lm, U, entries))
        estimates.append(U)
        if seed < 40:
            data = [rows_of(x, y, times=times)]
            errors.append(at(lm, U).standard_errors(data).errors["U"])
    spread = torch.stack(estimates).std(0)
    assert (torch.stack(errors).mean(0) / spread - 1).abs().max() < 0.15


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("min_scale", [0.0, 1.0])
@pytest.mark.parametrize("unperturbed_prefix", [0, 2])
@pytest.mark.parametrize("edits", [None, EditConfig(rate=0.5, kinds=KINDS)], ids=["", "edits"])
def test_scores_of_batch_rows_are_their_own_gradients(
    marginal, min_scale, unperturbed_prefix, edits
):
    config = PerturbConfig(
        transform="diagonal", min_scale=min_scale, marginal=marginal, estimator="jvi_clip"
    )
    lm = wrap(one_layer(), config, edits=edits)
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(31, (12, 6)), "attention_mask": torch.ones(12, 6)}
    batch["attention_mask"][::2, :2] = 0
    batch["perturb_mask"] = torch.rand(12, 6) < 0.7
    batch["perturb_mask"][:, :unperturbed_prefix] = False
    batch["labels"] = batch["input_ids"].where(torch.rand(12, 6) < 0.8, IGNORED)
    psi = []
    for row in range(12):
        loss = lm(**row_of(batch, row), rows=torch.tensor([row]), seed=5, num_items_in_batch=1).loss
        psi.append(-torch.autograd.grad(loss, lm.transform.s)[0].double())
    psi = torch.stack(psi)
    # The floor takes the direction of s out of its gradient.
    expected = torch.linalg.pinv(psi.T @ psi, rtol=1e-4, hermitian=True)
    lm.transform.requires_grad_(False)
    if min_scale:
        with pytest.warns(UserWarning, match="1 of 4 directions"):
            result = lm.standard_errors(loader(batch, 5), bread="outer", seed=5)
    else:
        result = lm.standard_errors(loader(batch, 5), bread="outer", seed=5)
    torch.testing.assert_close(result.covariance, expected, rtol=1e-2, atol=1e-3)


def test_shared_prefix_changes_no_standard_error(monkeypatch):
    lm = wrap(one_layer(), PerturbConfig(transform="diagonal"))
    torch.manual_seed(1)
    ids = torch.randint(31, (40, 8))
    data = [{"input_ids": ids, "labels": ids, "perturb_mask": torch.arange(8).expand(40, 8) >= 3}]
    once = lm.standard_errors(data, bread="outer", seed=5)
    without_shared_prefix(monkeypatch)
    expected = lm.standard_errors(data, bread="outer", seed=5)
    torch.testing.assert_close(once.covariance, expected.covariance, rtol=1e-3, atol=1e-6)


def test_randomised_estimators_have_the_errors_of_iwae():
    x, y = sampled(one_sign(), 50)
    models = [
        one_sign(estimator=estimator, antithetic=False, num_samples=4)
        for estimator in ("iwae", "resample", "sumo", "mlmc")
    ]
    first, *others = (
        at(lm, TRUTH).standard_errors([rows_of(x, y)], bread="outer", seed=5).covariance
        for lm in models
    )
    for other in others:
        assert torch.equal(other, first)


def test_examples_keep_their_latents_in_any_order_and_as_embeddings():
    lm = at(one_sign(antithetic=False, num_samples=4), TRUTH)
    data = rows_of(*sampled(lm, 60))
    expected = lm.standard_errors(loader(data, 7), bread="outer", seed=5).covariance
    order = torch.randperm(60)
    shuffled = {
        "inputs_embeds": lm.base.get_input_embeddings()(data["input_ids"])[order],
        "labels": data["labels"][order],
        "rows": order,
    }
    result = lm.standard_errors(loader(shuffled, 25), bread="outer", seed=5).covariance
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_chosen_parameters_have_the_errors_with_the_others_held_fixed():
    lm = one_sign(transform="affine")
    x, y = sampled(lm, 300)
    both = lm.standard_errors([rows_of(x, y)], bread="outer")
    assert list(both.errors) == ["Ua", "Ub"]
    assert both.covariance.shape == (2 * DIM, 2 * DIM)
    one = lm.standard_errors([rows_of(x, y)], bread="outer", parameters=["Ub"])
    assert one.errors["Ub"].shape == (1, DIM)
    # With the others known, the covariance inverts one block of the information.
    block = both.covariance.inverse()[DIM:, DIM:].inverse()
    torch.testing.assert_close(one.covariance, block, rtol=1e-3, atol=1e-5)


def test_directions_without_information_are_left_out_with_a_warning():
    lm = one_sign()
    x, y = sampled(lm, 2)
    with pytest.warns(UserWarning, match="about 1 of 3 directions .* fewer examples than param"):
        result = at(lm, TRUTH).standard_errors([rows_of(x, y)], bread="outer")
    assert torch.linalg.matrix_rank(result.covariance) == 2
    assert result.errors["U"].isinf().any()


@pytest.mark.parametrize("width", [32, 128])
def test_a_direction_that_the_base_ignores_leaves_no_finite_error_at_any_width(width):
    """A layer norm takes the mean out of every embedding, and so out of U."""
    base = tiny.gpt2(vocab_size=31, n_embd=width)
    lm = wrap(base, PerturbConfig(latent_dim=1, num_samples=2, init_scale=0.6))
    ids = torch.randint(31, (3 * width, 4))
    with pytest.warns(UserWarning, match=f"about 1 of {width} directions"):
        result = lm.standard_errors([{"input_ids": ids, "labels": ids}], bread="outer", seed=1)
    assert result.errors["U"].isinf().all()
    contrast = torch.zeros(width, dtype=torch.float64)
    contrast[:2] = torch.tensor([1.0, -1.0])
    assert contrast @ result.covariance @ contrast > 0


@pytest.mark.parametrize(
    ("options", "rotated"),
    [
        ({"latent_dim": 2}, ["U"]),
        ({"latent_dim": 2, "transform": "affine"}, ["Ua", "Ub"]),
        ({"latent_dim": 2, "transform": "mlp", "hidden_dim": 4}, ["B"]),
        ({"latent_dim": 1}, []),
        ({"latent_dim": 2, "latent": "rademacher"}, []),
        ({"transform": "diagonal"}, []),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the information about 1 of")
def test_errors_of_parameters_that_rotate_gaussian_latents_are_infinite(options, rotated):
    lm = wrap(one_layer(), PerturbConfig(num_samples=4, init_scale=0.6, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in lm.transform.parameters():
            value += 0.3 * torch.randn_like(value)
    directions = _rotations(lm, dict(lm.transform.named_parameters()))
    assert len(directions) == (1 if rotated else 0)
    sizes = [value.numel() for value in lm.transform.parameters()]
    names = [name for name, _ in lm.transform.named_parameters()]
    random = torch.randn(sum(sizes), sum(sizes), dtype=torch.float64)
    full = random @ random.T + torch.eye(sum(sizes))
    _, unidentified = _inverse(_without(directions, full), 1e-5)
    parts = dict(zip(names, unidentified.split(sizes), strict=True))
    assert [name for name, part in parts.items() if part.any()] == rotated
    for name in rotated:
        assert parts[name].all()


def test_a_rotation_of_gaussian_latents_is_a_direction_of_the_parameters():
    lm = wrap(one_layer(), PerturbConfig(transform="affine", latent_dim=3))
    parameters = dict(lm.transform.named_parameters())
    directions = _rotations(lm, parameters)
    turn = torch.zeros(3, 3, dtype=torch.float64)
    turn[0, 2], turn[2, 0] = 1.0, -1.0
    turned = torch.cat([(turn @ value.double()).flatten() for value in parameters.values()])
    torch.testing.assert_close(directions[1], turned.detach())
    assert len(_rotations(lm, {"Ub": parameters["Ub"]})) == 0  # Ua is held


def test_held_samples_do_not_identify_a_rotation():
    lm = wrap(one_layer(), PerturbConfig(latent_dim=2, num_samples=4, init_scale=0.6))
    ids = torch.randint(31, (100, 4))
    with pytest.warns(UserWarning, match="about 1 of 8 directions"):
        result = lm.standard_errors([{"input_ids": ids, "labels": ids}], bread="outer", seed=1)
    assert result.errors["U"].isinf().all()
    # The shift's covariance U^T U has errors.
    U = lm.transform.U.detach().double()
    slope = torch.zeros_like(U)
    slope[:, 0] = 2 * U[:, 0]
    assert slope.flatten() @ result.covariance @ slope.flatten() > 0


def test_newton_step_is_large_away_from_a_solution():
    lm = one_sign()
    x, y = sampled(lm, 300)
    result = at(lm, TRUTH + 0.3).standard_errors([rows_of(x, y)], bread="outer")
    assert result.newton_step > 1


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"parameters": ["V"]}, r"parameters must be of \['U'\], got 'V'"),
        ({}, {"parameters": []}, "parameters must be a list of names"),
        ({}, {"parameters": "U"}, "parameters must be a list of names"),
        ({}, {"bread": "white"}, "bread must be one of"),
        ({"estimator": "jensen"}, {"bread": "outer"}, "use bread='information'"),
        ({"latent_dim": 3000}, {}, "choose some with parameters"),
        ({"latent_dim": 100, "estimator": "jensen"}, {}, "runs the data 600 times"),
        ({}, {"dataloader": []}, "dataloader yielded no batch"),
        ({}, {"dataloader": [{"input_ids": torch.zeros(1, 2).long()}]}, "every batch needs labels"),
    ],
)
def test_bad_standard_errors_argument_is_rejected_by_name(config, changes, message):
    data = [rows_of(torch.tensor([1]), torch.tensor([2]))]
    with pytest.raises(ValueError, match=message):
        one_sign(**config).standard_errors(**{"dataloader": data, **changes})


def test_exact_bf16_and_dropout_models_are_rejected():
    data = [rows_of(torch.tensor([1]), torch.tensor([2]))]
    lm = one_sign()
    with lm.exact(), pytest.raises(ValueError, match=r"lm.exact\(\) perturbs nothing"):
        lm.standard_errors(data)
    with pytest.raises(ValueError, match="drown in the rounding of torch.bfloat16"):
        lm.bfloat16().standard_errors(data)
    dropping = wrap(one_layer(attention_dropout=0.1).train(), PerturbConfig())
    with pytest.raises(ValueError, match=r"dropout is active in .* call lm.eval\(\)"):
        dropping.standard_errors(data)


def test_autocast_is_rejected_wherever_it_is_switched_on():
    lm, data = one_sign(), [rows_of(torch.tensor([1]), torch.tensor([2]))]
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast, pytest.raises(ValueError, match="bfloat16: .* outside of torch.autocast"):
        lm.standard_errors(data)
    lm.forward = autocast(lm.forward)  # as Accelerate does
    with pytest.raises(ValueError, match="accelerator.unwrap_model"):
        lm.standard_errors(data)
