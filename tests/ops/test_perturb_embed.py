"""The registered op against the fp64 oracle, with random upstream gradients."""

import copy
import itertools

import pytest
import torch
from torch.autograd import forward_ad

from fastperturb import PerturbConfig, noise, ops
from fastperturb.config import LATENTS, TRANSFORMS
from fastperturb.ops import reference
from fastperturb.ops.calls import EmbedCall
from fastperturb.transforms import make_transform


def transform_of(family, *, embed_dim=12, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"latent_dim": 6, "hidden_dim": 5, "init_scale": 0.5, **options}
    transform = make_transform(PerturbConfig(transform=family, **options), embed_dim, embed_rms=0.5)
    with torch.no_grad():
        for value in transform.parameters():
            value += 0.1 * torch.randn_like(value)
    return transform.to(dtype)


def inputs(source, *, dtype=torch.float64, shape=(2, 7), embed_dim=12):
    """Draw (ids, table) or (embeddings, None), and return also the leaf that takes the gradient."""
    torch.manual_seed(1)
    if source == "ids":
        table = torch.randn(20, embed_dim).to(dtype).requires_grad_()
        return (torch.randint(0, 20, shape), table), table
    embeddings = torch.randn(*shape, embed_dim).to(dtype).requires_grad_()
    return (embeddings, None), embeddings


def value_and_gradients(op, arguments, leaves, transform, **options):
    out = op(*arguments, transform, 5, options.pop("samples", 4), **options)
    torch.manual_seed(2)
    upstream = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("source", ["ids", "embeddings"])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_value_and_gradients_are_the_oracles(family, source, scope, antithetic):
    transform = transform_of(family, scope=scope, min_scale=0.5)
    arguments, leaf = inputs(source)
    leaves = [leaf, *transform.parameters()]
    options = {"antithetic": antithetic, "perturb_mask": torch.rand(2, 7) > 0.3}
    ours = value_and_gradients(ops.perturb_embed, arguments, leaves, transform, **options)
    oracle = value_and_gradients(reference.perturb_embed, arguments, leaves, transform, **options)
    for mine, right in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_low_precision_errs_no_more_than_naive_torch(family, dtype):
    """Check err(ours) <= 2 err(plain torch in that dtype) + eps, both against fp64."""
    transform = transform_of(family, dtype=torch.float32)
    arguments, leaf = inputs("embeddings", dtype=dtype)
    leaves = [leaf, *transform.parameters()]
    ours = value_and_gradients(ops.perturb_embed, arguments, leaves, transform)

    exact_transform = transform_of(family)
    exact_leaf = leaf.detach().double().requires_grad_()
    exact = value_and_gradients(
        reference.perturb_embed,
        (exact_leaf, None),
        [exact_leaf, *exact_transform.parameters()],
        exact_transform,
    )

    naive_transform = transform_of(family, dtype=dtype)
    z = noise.latent(5, (4, 2, 7, transform.latent_dim)).to(dtype)
    naive = value_and_gradients(
        lambda e, _, transform, seed, samples: transform(e, z),
        arguments,
        [leaf, *naive_transform.parameters()],
        naive_transform,
    )
    eps = torch.finfo(dtype).eps
    for mine, plain, right in zip(ours, naive, exact, strict=True):
        size = right.norm()
        error, allowance = (mine - right).norm() / size, (plain - right).norm() / size
        assert error <= 2 * allowance + eps


@pytest.mark.parametrize("latent", LATENTS)
def test_the_op_adds_the_contracts_noise(latent):
    transform = transform_of("lowrank", latent=latent)
    (embeddings, _), _ = inputs("embeddings")
    z = noise.latent(5, (4, 2, 7, 6), latent=latent).double()
    torch.testing.assert_close(
        ops.perturb_embed(embeddings, None, transform, 5, 4), embeddings + 0.5 * z @ transform.U
    )


@pytest.mark.parametrize("family", TRANSFORMS)
def test_a_masked_position_is_the_plain_embedding_bit_for_bit(family):
    transform = transform_of(family, dtype=torch.float32)
    (ids, table), _ = inputs("ids", dtype=torch.bfloat16)
    mask = torch.rand(ids.shape) > 0.5
    out = ops.perturb_embed(ids, table, transform, 5, 3, perturb_mask=mask)
    assert torch.equal(out[:, ~mask], table[ids][~mask].expand(3, -1, -1))
    assert (out[:, mask] != table[ids][mask]).any(-1).all()


def shift_of_the_oracle(arguments, transform, seed, samples, **options):
    """Return |T(e, z) - e| [M, B, T] in fp64."""
    ids, table = arguments
    exact = copy.deepcopy(transform).double()
    e = (ids if table is None else table[ids]).double()
    perturbed = reference.perturb_embed(e, None, exact, seed, samples, **options)
    return (perturbed - e).norm(dim=-1)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", ["ids", "embeddings"])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_returned_shift_is_the_oracles_in_at_least_fp32(family, source, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    transform = transform_of(family, dtype=wide)
    arguments, _ = inputs(source, dtype=dtype)
    mask = torch.rand(2, 7) > 0.3
    options = {"antithetic": True, "perturb_mask": mask}
    out, shift = ops.perturb_embed(*arguments, transform, 5, 4, **options, return_shift=True)
    assert shift.dtype == wide and out.dtype == dtype
    assert torch.equal(out, ops.perturb_embed(*arguments, transform, 5, 4, **options))
    assert (shift[:, ~mask] == 0).all()
    expected = shift_of_the_oracle(arguments, transform, 5, 4, **options)
    rtol = 1e-10 if wide == torch.float64 else 1e-5
    torch.testing.assert_close(shift.double(), expected.detach(), rtol=rtol, atol=0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("family", TRANSFORMS)
def test_a_shift_too_small_for_the_outputs_dtype_is_measured_all_the_same(family):
    transform = transform_of(family, dtype=torch.float32, init_scale=1e-6)
    with torch.no_grad():
        for name in transform.outer:
            getattr(transform, name).mul_(1e-6)
    arguments, _ = inputs("embeddings", dtype=torch.bfloat16)
    out, shift = ops.perturb_embed(*arguments, transform, 5, 4, return_shift=True)
    assert torch.equal(out, arguments[0].expand_as(out))
    expected = shift_of_the_oracle(arguments, transform, 5, 4)
    torch.testing.assert_close(shift.double(), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_results_do_not_depend_on_torchs_default_dtype(family, default):
    transform = transform_of(family, dtype=torch.float32)
    arguments, leaf = inputs("ids", dtype=torch.float32)
    upstream = torch.randn(4, 2, 7, 12)
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            out, shift = ops.perturb_embed(*arguments, transform, 5, 4, return_shift=True)
            leaves = [leaf, *transform.parameters()]
            psi = ops.perturb_embed_per_sample_grad(upstream, *arguments, transform, 5, 4)
            gradients = torch.autograd.grad(out, leaves, upstream)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([out, shift, *gradients, *psi.values()])
    for expected, ours in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_the_shift_has_no_gradient_and_changes_none():
    transform = transform_of("mlp")
    arguments, leaf = inputs("embeddings")
    leaves = [leaf, *transform.parameters()]
    plain = value_and_gradients(ops.perturb_embed, arguments, leaves, transform)
    shifts = []

    def with_shift(*call, **options):
        out, shift = ops.perturb_embed(*call, **options, return_shift=True)
        shifts.append(shift)
        return out

    measured = value_and_gradients(with_shift, arguments, leaves, transform)
    assert not shifts[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("family", ["gated", "mlp"])
def test_the_forward_keeps_the_projection_and_the_backward_reads_it(family):
    transform = transform_of(family, dtype=torch.float32)
    arguments, leaf = inputs("embeddings", dtype=torch.float32)
    out = ops.perturb_embed(*arguments, transform, 5, 4)
    kept = [value for value in out.grad_fn.saved_tensors if value is not None and value.ndim == 2]
    (projected,) = (value for value in kept if value.shape == (2 * 7, 5))
    expected = leaf.flatten(0, 1) @ transform.A / 0.5
    torch.testing.assert_close(projected, expected if family == "gated" else expected + transform.b)
    projected.data.fill_(torch.nan)
    assert torch.autograd.grad(out.sum(), transform.C)[0].isnan().all()


@pytest.mark.parametrize("family", [family for family in TRANSFORMS if family != "context"])
def test_any_split_of_samples_rows_and_positions_gives_the_same_rows(family):
    transform = transform_of(family)
    (ids, table), _ = inputs("ids", shape=(4, 6))
    whole = ops.perturb_embed(ids, table, transform, 5, 6)
    samples, rows = torch.tensor([4, 1]), torch.tensor([3, 1])
    positions = torch.arange(2, 6).expand(2, -1)
    part = ops.perturb_embed(
        ids[rows, 2:], table, transform, 5, samples, rows=rows, positions=positions
    )
    torch.testing.assert_close(part, whole[samples][:, rows, 2:], rtol=1e-12, atol=1e-12)


def test_no_table_gradient_is_made_for_a_frozen_table():
    transform = transform_of("gated")
    (ids, table), _ = inputs("ids")
    out = ops.perturb_embed(ids, table.detach(), transform, 5, 2)
    out.sum().backward()
    assert table.grad is None and transform.A.grad is not None


@pytest.mark.parametrize(("shape", "samples"), [((0, 5), 3), ((2, 1), 1), ((1, 0), 2)])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_empty_and_single_shapes_work(family, shape, samples):
    transform = transform_of(family)
    arguments, leaf = inputs("ids", shape=shape)
    results = value_and_gradients(
        ops.perturb_embed, arguments, [leaf, *transform.parameters()], transform, samples=samples
    )
    assert results[0].shape == (samples, *shape, 12)
    assert all(torch.isfinite(result).all() for result in results)


def test_autocast_outside_does_not_lower_the_precision_inside():
    transform = transform_of("mlp", dtype=torch.float32)
    arguments, leaf = inputs("embeddings", dtype=torch.float32)
    leaves = [leaf, *transform.parameters()]
    plain = value_and_gradients(ops.perturb_embed, arguments, leaves, transform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradients(ops.perturb_embed, arguments, leaves, transform)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("source", ["ids", "embeddings"])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_registration_passes_opcheck(family, source):
    transform = transform_of(family)
    arguments, leaf = inputs(source)
    ids = arguments[0] if source == "ids" else None
    numbers = noise.counters(4, None, None, (2, 7), antithetic=False, device=leaf.device)
    call = EmbedCall(
        ids,
        leaf,
        transform.op_parameters(),
        transform.embed_rms,
        torch.tensor(5),
        *(number.contiguous() for number in numbers),
        torch.rand(2, 7) > 0.3,
        torch.randn(2, 7, transform.latent_dim),
        torch.rand(2, 7, 6).double().requires_grad_() if family == "context" else None,
        family,
        "gaussian",
        "token",
        False,
        4,
        0.9,
    )
    for want_shift in (False, True):
        arguments = (*call, want_shift)
        torch.library.opcheck(torch.ops.fastperturb.perturb_embed.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", TRANSFORMS)
def test_it_compiles_into_one_graph_forward_and_backward(family):
    transform = transform_of(family, dtype=torch.float32)
    arguments, leaf = inputs("ids", dtype=torch.float32)
    leaves = [leaf, *transform.parameters()]
    seed = torch.tensor(5)

    def with_shift(ids, table, _transform, _seed, samples):
        arguments = ids, table, transform, seed, samples
        out, shift = ops.perturb_embed(*arguments, return_shift=True)
        return torch.cat([ops.perturb_embed(*arguments), out * shift[..., None]])

    eager = value_and_gradients(with_shift, arguments, leaves, transform)
    compiled = torch.compile(with_shift, fullgraph=True)
    fused = value_and_gradients(compiled, arguments, leaves, transform)
    for a, b in zip(eager, fused, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_and_accumulation_see_identical_noise():
    transform = transform_of("mlp")
    (embeddings, _), leaf = inputs("embeddings", shape=(4, 5))
    rows = torch.arange(4)

    def loss(part):
        out = ops.perturb_embed(embeddings[part], None, transform, 5, 3, rows=rows[part])
        return out.square().sum()

    leaves = [leaf, *transform.parameters()]
    whole = torch.autograd.grad(loss(slice(0, 4)), leaves)
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(loss, slice(0, 4), use_reentrant=False), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    parts = [torch.autograd.grad(loss(slice(i, i + 2)), leaves) for i in (0, 2)]
    for total, *pieces in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(pieces), total)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": torch.zeros(2, 7)}, ValueError, r"ids must be int64 \[B, T\]"),
        ({"ids": torch.full((2, 7), 20)}, IndexError, r"ids must lie in \[0, 20\), got 20..20"),
        ({"table": torch.zeros(20, 11)}, ValueError, r"table must be .* D = 12.*\[20, 11\]"),
        ({"table": torch.zeros(20, 12, dtype=torch.int64)}, ValueError, "table must be floating"),
        ({"samples": 0}, ValueError, "samples must number at least 1, got 0"),
        ({"samples": 3, "antithetic": True}, ValueError, "samples must be even"),
        ({"rows": torch.arange(3)}, ValueError, r"rows must be int64 \[B\] or \[B, T\]"),
        ({"perturb_mask": torch.ones(2, 7)}, ValueError, r"perturb_mask must be bool \[B, T\]"),
        ({"seed": "7"}, ValueError, "seed must be an int of 64 bits"),
        ({"table": torch.zeros(20, 12, device="meta")}, ValueError, "on the table's device meta"),
    ],
)
def test_bad_arguments_raise_by_name(changes, error, message):
    (ids, table), _ = inputs("ids")
    arguments = {"ids": ids, "table": table, "seed": 5, "samples": 4, **changes}
    with pytest.raises(error, match=message):
        ops.perturb_embed(transform=transform_of("lowrank"), **arguments)


@pytest.mark.parametrize("min_scale", [0.0, 0.5])
@pytest.mark.parametrize("source", ["ids", "embeddings"])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_per_sample_gradients_are_those_of_each_sample_and_row_alone(family, source, min_scale):
    transform = transform_of(family, min_scale=min_scale)
    arguments, _ = inputs(source)
    mask = torch.rand(2, 7) > 0.3
    out = ops.perturb_embed(*arguments, transform, 5, 3, perturb_mask=mask)
    upstream = torch.randn_like(out)
    psi = ops.perturb_embed_per_sample_grad(
        upstream, *arguments, transform, 5, 3, perturb_mask=mask
    )
    parameters = dict(transform.named_parameters())
    assert list(psi) == list(parameters)
    for m, b in itertools.product(range(3), range(2)):
        alone = torch.autograd.grad(
            out[m, b], list(parameters.values()), upstream[m, b], retain_graph=True
        )
        for name, expected in zip(parameters, alone, strict=True):
            torch.testing.assert_close(psi[name][m, b], expected, rtol=1e-9, atol=1e-12)


def test_per_sample_gradients_need_neither_grad_mode_nor_trainable_parameters():
    transform = transform_of("mlp", min_scale=0.5)
    arguments, _ = inputs("embeddings")
    upstream = torch.randn(3, 2, 7, 12, dtype=torch.float64)
    expected = ops.perturb_embed_per_sample_grad(upstream, *arguments, transform, 5, 3)
    transform.requires_grad_(False)
    with torch.no_grad():
        psi = ops.perturb_embed_per_sample_grad(upstream, *arguments, transform, 5, 3)
    assert all(torch.equal(psi[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("implementation")
def test_the_gradient_of_a_frequent_token_does_not_stop_growing_in_16_bits():
    transform = transform_of("lowrank", dtype=torch.float32)
    table = torch.randn(3, 12).bfloat16().requires_grad_()
    ids, grad = torch.ones(2, 2000, dtype=torch.int64), torch.rand(2, 2, 2000, 12).bfloat16()
    out = ops.perturb_embed(ids, table, transform, 5, 2)
    (grad_table,) = torch.autograd.grad(out, table, grad)
    expected = grad.double().sum((0, 1, 2))
    torch.testing.assert_close(grad_table[1].double(), expected, rtol=4e-3, atol=0)


@pytest.mark.usefixtures("implementation")
def test_the_gradient_of_the_table_has_the_same_bits_for_any_number_of_threads():
    transform = transform_of("lowrank", embed_dim=64, dtype=torch.float32)
    table = torch.randn(5, 64).requires_grad_()
    ids, grad = torch.randint(0, 5, (2, 1000)), torch.randn(2, 2, 1000, 64)

    def grad_table(threads):
        torch.set_num_threads(threads)
        return torch.autograd.grad(ops.perturb_embed(ids, table, transform, 5, 2), table, grad)[0]

    before = torch.get_num_threads()
    try:
        alone, *threaded = (grad_table(threads) for threads in (1, 4, 4, 4, 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(value, alone) for value in threaded)


@pytest.mark.parametrize("tangent", ["table", "U"])
def test_a_forward_mode_derivative_raises(tangent):
    transform, table = transform_of("lowrank"), torch.randn(20, 12, dtype=torch.float64)
    with forward_ad.dual_level():
        if tangent == "table":
            table = forward_ad.make_dual(table, table)
        else:
            start = transform.U.detach()
            del transform.U
            transform.U = forward_ad.make_dual(start, start)
        with pytest.raises(RuntimeError, match="perturb_embed has no forward-mode derivative"):
            ops.perturb_embed(torch.randint(0, 20, (2, 7)), table, transform, 5, 4)


def test_an_upstream_gradient_of_the_wrong_shape_raises():
    (ids, table), _ = inputs("ids")
    with pytest.raises(ValueError, match=r"grad must be .* \[M, B, T, D\] = \[3, 2, 7, 12\]"):
        ops.perturb_embed_per_sample_grad(
            torch.zeros(2, 2, 7, 12), ids, table, transform_of("lowrank"), 5, 3
        )


def test_permuted_samples_permute_the_output():
    transform = transform_of("affine")
    (embeddings, _), _ = inputs("embeddings")
    out = ops.perturb_embed(embeddings, None, transform, 5, 3)
    for order in itertools.permutations(range(3)):
        numbers = torch.tensor(order)
        permuted = ops.perturb_embed(embeddings, None, transform, 5, numbers)
        torch.testing.assert_close(permuted, out[numbers], rtol=1e-12, atol=1e-12)
