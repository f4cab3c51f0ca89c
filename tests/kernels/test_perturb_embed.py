"""The Triton perturb_embed against torch in fp64, judged by the error of naive torch."""

import math
import mmap
import tempfile
import zlib

import pytest
import torch
from kernel_oracle import (
    DEVICE,
    HALF,
    INTERPRETED,
    MARKS,
    assert_as_good,
    interpreted_only,
    nan_in_new_memory,
    skip_without_memory,
)

from fastperturb import noise
from fastperturb.config import TRANSFORMS, PerturbConfig
from fastperturb.kernels import launch
from fastperturb.kernels import perturb_embed as kernels
from fastperturb.kernels import perturb_embed_backward as backward
from fastperturb.kernels import perturb_embed_call as call_layout
from fastperturb.kernels import perturb_embed_forward as forward
from fastperturb.kernels import perturb_embed_outer as outer
from fastperturb.kernels.perturb_embed_call import Layout
from fastperturb.ops.calls import EmbedCall
from fastperturb.ops.torch import embed as torch_embed
from fastperturb.transforms import FAMILIES, make_transform

DTYPES = (torch.float32, HALF)
OTHER_HALF = () if INTERPRETED else (torch.float16,)  # beside HALF
pytestmark = MARKS

# Latents may differ by 4e-6; a 16-bit result of one element has no naive error to compare with.
EPS = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = {  # M B T D R H
    "ragged": (3, 2, 5, 24, 5, 7),
    "ones": (2, 1, 1, 1, 1, 1),
    "two tiles of tokens": (1, 2, 17, 20, 16, 16),
}
BIG = {
    "several blocks of everything": (2, 1, 3, 264, 70, 70),
    "tiles of tokens and columns": (2, 3, 23, 272, 16, 64),
    "one long row": (3, 1, 67, 40, 3, 20),
}
VARIANTS = ("plain", "sequence", "explicit")
# Stratified latents; latents with a mean for each token; with one for each batch row.
STRATIFIED_VARIANTS = ("stratified", "mean", "mean of sequences")


def make_call(family, dtype, shape, variant="plain", vocab=13):
    """A call on the CPU in `dtype`; `variant` chooses its distribution, counters and mask."""
    torch.manual_seed(zlib.crc32(f"{family} {dtype} {shape} {variant}".encode()))
    M, B, T, D, R, H = shape
    latent, scope = {
        "explicit": ("rademacher", "token"),
        "sequence": ("uniform", "sequence"),
        "mean of sequences": ("gaussian", "sequence"),
    }.get(variant, ("gaussian", "token"))
    config = PerturbConfig(
        transform=family, latent=latent, scope=scope, latent_dim=R, hidden_dim=H, init_scale=0.6
    )
    transform = make_transform(config, D, embed_rms=0.7)
    if family == "gated":
        torch.nn.init.normal_(transform.C, std=H**-0.5)
    table = (0.7 * torch.randn(vocab, D)).to(dtype)
    ids = torch.randint(0, vocab, (B, T))
    antithetic = variant == "sequence" and M % 2 == 0
    samples, rows, positions, mask = M, None, None, None
    if variant != "plain":
        mask = torch.rand(B, T) < 0.7
    strata, mean, std = 1, None, 1.0
    if variant in STRATIFIED_VARIANTS:
        strata = 8 if variant == "stratified" else 2
        samples = torch.randint(0, 2**32, (M, B))
        samples[1:] = samples[0] + 1  # maybe of the same group
    if variant == "mean":
        mean, std = torch.randn(transform.latent_dim, T, B).permute(2, 1, 0), 0.8
    if variant == "mean of sequences":
        mean, std = torch.randn(B, 1, transform.latent_dim).expand(-1, T, -1), 0.8
    if variant == "explicit":
        samples = torch.randint(0, 2**32, (M, B))
        rows = torch.randint(0, 2**40, (T, 2 * B))[:, ::2].T
        positions = torch.randint(0, 2**20, (B, 2 * T))[:, ::2]
    numbers = noise.counters(
        samples, rows, positions, (B, T), antithetic=antithetic, device=torch.device("cpu")
    )
    return EmbedCall(
        None if variant == "sequence" else ids,
        table[ids] if variant == "sequence" else table,
        [value.detach() for value in transform.op_parameters()],
        transform.embed_rms,
        torch.tensor(-8613303245920329199),
        *numbers,
        mask,
        mean,
        2 * torch.rand(B, T, R) if family == "context" else None,
        family,
        latent,
        scope,
        antithetic,
        strata,
        std,
    )


def on_device(value):
    if isinstance(value, list):
        return [on_device(element) for element in value]
    if isinstance(value, EmbedCall):
        return EmbedCall(*map(on_device, value))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def output_of(call):
    return kernels.perturb_embed(call, False).out


def results_of(call):
    out, squared_shift, projected = kernels.perturb_embed(call, True)
    return [out, squared_shift, torch.empty(0) if projected is None else projected]


def check_shift_and_projection(squared_shift, projected, exact, dtype):
    """Compare both with fp64: they are fp32, of operands that a 16-bit table rounds."""
    _, expected_shift, expected_projected = torch_embed.perturb_embed(exact, True)
    assert squared_shift.dtype == projected.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    largest = float(expected_shift.max())
    torch.testing.assert_close(
        squared_shift.double(), expected_shift, rtol=0, atol=tolerance * largest
    )
    if exact.mask is not None:
        assert (squared_shift[:, ~exact.mask] == 0).all()
    if expected_projected is None:
        assert projected.numel() == 0
    else:
        assert_as_good(
            projected, expected_projected, expected_projected, eps=1e-4, name="projection"
        )


def gradients_of(grad, call, want_table, module=kernels):
    """The gradients of [table, *parameters], from the projection of the forward."""
    projected = module.perturb_embed(call, False).projected
    return module.perturb_embed_backward(grad, call, projected, want_table)


def run(function, grad, call, *options):
    """The result of one of the kernels' functions, on the CPU."""
    inputs = [on_device(call), *options]
    with nan_in_new_memory():
        result = function(*inputs) if grad is None else function(grad.to(DEVICE), *inputs)
    return [value.cpu() for value in result] if isinstance(result, list) else result.cpu()


def in_fp64(call):
    parameters = [value.double() for value in call.parameters]
    scale = None if call.latent_scale is None else call.latent_scale.double()
    return call._replace(
        table=call.table.double(),
        parameters=parameters,
        embed_rms=call.embed_rms.double(),
        latent_scale=scale,
    )


def naive(call, grad):
    """Output and gradients of [table, *parameters, scale] as written by a user, in the dtype."""
    dtype = call.table.dtype
    table = call.table.clone().requires_grad_()
    parameters = [value.to(dtype).requires_grad_() for value in call.parameters]
    e = table if call.ids is None else torch.nn.functional.embedding(call.ids, table)
    z = torch_embed._latent(call).to(dtype)
    leaves, formula = [table, *parameters], FAMILIES[call.family].formula
    if call.latent_scale is not None:
        scale = call.latent_scale.to(dtype).requires_grad_()
        leaves, z, formula = [*leaves, scale], z * scale, FAMILIES["lowrank"].formula
    out = formula(e, z, call.embed_rms.to(dtype), *parameters)
    if call.mask is not None:
        out = torch.where(call.mask[..., None], out, e)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def check(family, dtype, shape, variant):
    call = make_call(family, dtype, shape, variant)
    out, squared_shift, projected = run(results_of, None, call)
    grad = torch.randn(out.shape).to(dtype)
    exact = in_fp64(call)
    check_shift_and_projection(squared_shift, projected, exact, dtype)
    naive_out, naive_grads = naive(call, grad)
    eps = EPS[dtype]
    assert out.dtype == dtype
    assert_as_good(
        out, torch_embed.perturb_embed(exact, False).out, naive_out, eps=eps, name="output"
    )
    if call.mask is not None:
        e = call.table if call.ids is None else call.table[call.ids]
        assert torch.equal(out[:, ~call.mask], e[~call.mask].expand(len(out), -1, -1))

    expected = gradients_of(grad.double(), exact, True, torch_embed)
    names = ["table", *(f"parameter {i}" for i in range(len(call.parameters))), "scale"]
    for want_table in (True, False):
        grads = run(gradients_of, grad, call, want_table)
        assert grads[0].numel() == (call.table.numel() if want_table else 0)
        assert [value.dtype for value in grads[1:]] == [torch.float32] * (len(grads) - 1)
        first = 0 if want_table else 1
        for name, *gradients in list(zip(names, grads, expected, naive_grads))[first:]:
            assert_as_good(*gradients, eps=eps, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", TRANSFORMS)
def test_output_and_gradients_are_as_good_as_naive_torch(family, shape, variant, dtype):
    check(family, dtype, shape, variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", STRATIFIED_VARIANTS)
@pytest.mark.parametrize("family", TRANSFORMS)
def test_stratified_and_moved_latents_are_as_good_as_naive_torch(family, variant, dtype):
    check(family, dtype, (3, 2, 6, 24, 5, 7), variant)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_a_program_may_own_several_tiles_and_samples(family, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    check(family, DTYPES[1], (5, 1, 70, 24, 5, 7), "plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ("plain", "explicit"))
@pytest.mark.parametrize("shape", BIG.values(), ids=BIG)
@pytest.mark.parametrize("family", TRANSFORMS)
@(pytest.mark.slow if INTERPRETED else pytest.mark.gpu)
def test_several_tiles_are_as_good_as_naive_torch(family, shape, variant, dtype):
    check(family, dtype, shape, variant)


@pytest.mark.skipif(INTERPRETED, reason="too big to interpret")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", TRANSFORMS)
@pytest.mark.gpu
def test_a_real_size_is_as_good_as_naive_torch(family, dtype):
    check(family, dtype, (4, 2, 200, 4096, 16, 64), "plain")


@pytest.mark.parametrize("family", TRANSFORMS)
def test_per_sample_gradients_are_those_of_each_sample_and_row_and_sum_to_the_gradient(family):
    call = make_call(family, torch.float32, (3, 2, 9, 24, 5, 7), "explicit")
    grad = torch.randn(3, 2, 9, 24)
    parts = run(kernels.perturb_embed_per_sample_grad, grad, call)
    whole = run(gradients_of, grad, call, False)[1:]
    expected = torch_embed.perturb_embed_per_sample_grad(grad.double(), in_fp64(call))
    for psi, total, truth in zip(parts, whole, expected):
        torch.testing.assert_close(
            psi.double(), truth, rtol=0, atol=2e-5 * float(truth.abs().max())
        )
        summed = psi.flatten(0, psi.ndim - total.ndim - 1).sum(0)  # a scale has rows of its own
        torch.testing.assert_close(summed, total, rtol=0, atol=2e-5 * float(total.abs().max()))


@pytest.mark.parametrize("upstream", (torch.float32, torch.float64, *OTHER_HALF), ids=str)
@pytest.mark.parametrize("family", TRANSFORMS)
def test_an_upstream_gradient_may_have_another_dtype_than_the_table(family, upstream):
    call = make_call(family, HALF, (3, 2, 9, 24, 5, 7), "explicit")
    grad = torch.randn(3, 2, 9, 24).to(upstream)
    parts = run(kernels.perturb_embed_per_sample_grad, grad, call)
    expected = torch_embed.perturb_embed_per_sample_grad(grad.double(), in_fp64(call))
    for psi, truth in zip(parts, expected):
        torch.testing.assert_close(psi.double(), truth, rtol=0, atol=2e-2 * truth.abs().max())


@pytest.mark.parametrize("family", TRANSFORMS)
def test_wanting_the_shift_changes_the_output_by_rounding_at_most(family):
    dtype = DTYPES[1]
    call = make_call(family, dtype, SHAPES["ragged"], "plain")
    assert kernels.perturb_embed(on_device(call), False).squared_shift is None
    alone, with_shift = run(output_of, None, call), run(results_of, None, call)[0]
    torch.testing.assert_close(with_shift, alone, rtol=EPS[dtype], atol=EPS[dtype])


@pytest.mark.parametrize("family", ("gated", "mlp"))
def test_a_projection_made_again_gives_the_same_gradients(family):
    call = make_call(family, DTYPES[1], SHAPES["ragged"], "plain")
    grad = torch.randn(3, 2, 5, 24).to(DTYPES[1])
    kept = run(gradients_of, grad, call, True)
    again = run(kernels.perturb_embed_backward, grad, call, None, True)
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("tokens", (10, 3), ids=("batch rows", "parts of rows"))
@pytest.mark.parametrize("family", ("lowrank", "gated", "mlp"))
def test_a_call_cut_into_pieces_gives_what_a_whole_one_does(family, tokens, monkeypatch):
    M, B, T, D, R, H = 2, 3, 5, 24, 5, 7
    call = make_call(family, torch.float32, (M, B, T, D, R, H), "explicit")
    grad = torch.randn(M, B, T, D)

    def results():
        return [
            run(results_of, None, call),
            run(gradients_of, grad, call, True),
            run(kernels.perturb_embed_per_sample_grad, grad, call),
        ]

    whole = results()
    token_bytes = 4 * (H if family == "mlp" else R)
    monkeypatch.setattr(call_layout, "BUFFER_BYTES", tokens * M * token_bytes)
    assert len(list(call_layout.pieces(call, token_bytes))) > 1
    for values, cut in zip(whole, results(), strict=True):
        for value, other in zip(values, cut, strict=True):
            largest = float(value.abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(other, value, rtol=0, atol=1e-5 * largest)


def test_a_call_without_buffers_is_never_cut(monkeypatch):
    call = make_call("diagonal", torch.float32, SHAPES["ragged"])
    monkeypatch.setattr(call_layout, "BUFFER_BYTES", 1)
    assert len(list(call_layout.pieces(call, forward.token_bytes(Layout(call))))) == 1


@pytest.mark.parametrize("tokens", (40, 1025, 3072, 3073))  # another kernel sums few tokens
def test_the_table_gets_the_gradients_of_the_ids_in_range_in_a_fixed_order(tokens):
    vocab = 13
    ids = torch.randint(vocab, (tokens,))
    ids[::7] = torch.tensor([-1, -100, vocab, 2**40]).repeat(tokens)[: len(ids[::7])]
    grad = torch.randn(tokens, 20)
    known = (ids >= 0) & (ids < vocab)
    expected = torch.zeros(vocab, 20, dtype=torch.float64)
    expected.index_add_(0, ids[known], grad[known].double())
    ours, again = (
        run(lambda g, i: kernels._table_gradient(g, i, vocab), grad, ids) for _ in range(2)
    )
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_an_id_out_of_range_gives_nan_and_its_gradient_to_no_row(family):
    call = make_call(family, torch.float32, SHAPES["ragged"])
    bad = torch.zeros_like(call.ids, dtype=torch.bool)
    bad[0, 1], bad[1, 2], bad[1, 4] = True, True, True
    ids = call.ids.masked_scatter(bad, torch.tensor([-1, len(call.table), 2**40]))
    out, right = run(output_of, None, call._replace(ids=ids)), run(output_of, None, call)
    assert out[:, bad].isnan().all() and torch.equal(out[:, ~bad], right[:, ~bad])
    grad = torch.randn(out.shape)
    ours = run(gradients_of, grad, call._replace(ids=ids), True)[0]
    expected = run(gradients_of, grad * ~bad[..., None], call, True)[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", TRANSFORMS)
def test_parameters_that_are_nan_make_the_output_nan(family, dtype):
    call = make_call(family, dtype, SHAPES["ragged"])
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a GPU's own
    index = FAMILIES[family].latent_parameter
    call.parameters[index] = nan.expand_as(call.parameters[index])
    out, squared_shift, _ = run(results_of, None, call)
    assert out.isnan().all() and squared_shift.isnan().all()


@pytest.mark.parametrize("per_token", (False, True), ids=("one row id", "a row id a token"))
def test_the_tokens_of_a_sequence_share_their_latents_where_they_share_a_row_id(per_token):
    _, B, T, _ = shape = (4, 2, 19, 24)
    call = make_call("diagonal", torch.float32, (*shape, 5, 7), "sequence")
    if per_token:
        call = call._replace(rows=torch.arange(B * T).view(B, T) // 3)
    exact, grad = in_fp64(call), torch.randn(shape)
    expected = torch_embed.perturb_embed(exact, False).out
    torch.testing.assert_close(run(output_of, None, call).double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch_embed.perturb_embed_per_sample_grad(grad.double(), exact)[0]
    ours = run(kernels.perturb_embed_per_sample_grad, grad, call)[0]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_antithetic_samples_need_not_follow_each_other():
    call = make_call("diagonal", torch.float32, (6, 2, 5, 24, 5, 7), "plain")
    samples = torch.tensor([[4, 4], [5, 5], [0, 2], [1, 1], [3, 0], [2, 3]])
    call = call._replace(samples=samples, antithetic=True)
    grad = torch.randn(6, 2, 5, 24)
    exact = in_fp64(call)
    expected = torch_embed.perturb_embed(exact, False).out
    torch.testing.assert_close(run(output_of, None, call).double(), expected, rtol=1e-5, atol=1e-5)
    expected = gradients_of(grad.double(), exact, False, torch_embed)[1]
    ours = run(gradients_of, grad, call, False)[1]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_same_seed_gives_the_same_bits_run_after_run(family):
    call = make_call(family, DTYPES[1], (2, 2, 20, 24, 5, 7), "plain")
    grad = torch.randn(2, 2, 20, 24).to(DTYPES[1])
    first, again = [run(gradients_of, grad, call, True) for _ in range(2)]
    assert all(map(torch.equal, first, again))
    assert torch.equal(run(output_of, None, call), run(output_of, None, call))


def test_strided_gradients_tables_and_masks_give_what_contiguous_ones_do():
    call = make_call("affine", torch.float32, (2, 2, 5, 24, 5, 7), "explicit")
    grad = torch.randn(2, 2, 24, 5)
    strided = call._replace(
        table=torch.stack([call.table, call.table], -1)[..., 0],
        mask=torch.stack([call.mask, ~call.mask], -1)[..., 0],
        ids=call.ids.T.contiguous().T,
    )
    assert not strided.table.is_contiguous() and not strided.mask.is_contiguous()
    plain = run(gradients_of, grad.mT.contiguous(), call, True)
    assert all(map(torch.equal, run(gradients_of, grad.mT, strided, True), plain))
    padded = torch.cat([call.table, call.table], 1)[:, : call.table.shape[1]]
    out = run(output_of, None, call._replace(table=padded))
    assert torch.equal(out, run(output_of, None, call))


@pytest.mark.parametrize("family", TRANSFORMS)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(family):
    call = make_call(family, torch.float32, (2, 2, 5, 24, 5, 7), "plain")
    B, T = 0, 5
    empty = call._replace(
        ids=call.ids[:B],
        samples=call.samples[:, :B],
        rows=call.rows[:B],
        positions=call.positions[:B],
        latent_scale=None if call.latent_scale is None else call.latent_scale[:B],
    )
    assert run(output_of, None, empty).shape == (2, B, T, 24)
    grad = torch.empty(2, B, T, 24)
    table, *others = run(gradients_of, grad, empty, True)
    for gradient in (table, *others[: len(call.parameters)]):  # a scale's is empty
        assert gradient.numel() and (gradient == 0).all()
    for psi in run(kernels.perturb_embed_per_sample_grad, grad, empty):
        assert psi.shape[:2] == (2, B)


def test_parameters_in_the_tables_dtype_get_gradients_in_it():
    call = make_call("mlp", DTYPES[1], SHAPES["ragged"], "plain")
    rounded = call._replace(parameters=[value.to(DTYPES[1]) for value in call.parameters])
    widened = call._replace(parameters=[value.float() for value in rounded.parameters])
    grad = torch.randn(3, 2, 5, 24).to(DTYPES[1])
    _, *narrow = run(gradients_of, grad, rounded, False)
    _, *wide = run(gradients_of, grad, widened, False)
    assert all(torch.equal(ours, fp32.to(DTYPES[1])) for ours, fp32 in zip(narrow, wide))


@pytest.mark.parametrize("family", TRANSFORMS)
def test_parameters_in_fp64_give_what_they_give_in_fp32_and_get_gradients_in_fp64(family):
    call = make_call(family, DTYPES[1], SHAPES["ragged"], "plain")
    wide = call._replace(parameters=[value.double() for value in call.parameters])
    grad = torch.randn(3, 2, 5, 24).to(DTYPES[1])
    narrow, results = (
        [*run(results_of, None, case), *run(gradients_of, grad, case, False)[1:]]
        for case in (call, wide)
    )
    dtypes = [DTYPES[1], torch.float32, torch.float32, *([torch.float64] * len(call.parameters))]
    dtypes += [] if call.latent_scale is None else [torch.float32]
    assert [value.dtype for value in results] == dtypes
    for ours, expected in zip(results, narrow):
        if expected.numel():
            margin = EPS[DTYPES[1]] * float(expected.abs().max())
            torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=0, atol=margin)


def test_an_fp64_table_is_rejected_by_name():
    call = make_call("lowrank", torch.float64, SHAPES["ragged"], "plain")
    with pytest.raises(TypeError, match="table must have one of the dtypes"):
        output_of(call)


@interpreted_only
def test_rows_beyond_2_to_the_31_elements_are_reached(tmp_path, monkeypatch):
    """Rows so wide that one program, launched alone over lazily mapped tensors, crosses 2^31.

    Its tokens include the last ones of the table, of each sample of the output and the upstream
    gradient, and of the embeddings' gradient. It sees columns 0 to 63 of D, so a call with only
    those columns is the oracle.
    """
    M, N, D, columns = 2, 264, 2**23, 64
    dtype = torch.float16

    def lazy(*shape, dtype=dtype):
        size = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile(dir=tmp_path) as file:
            file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
        pages.madvise(mmap.MADV_RANDOM)  # else the system fills megabytes around every touch
        return torch.frombuffer(pages, dtype=dtype).view(shape)

    small = make_call("lowrank", dtype, (M, 1, N, columns, 1, 1), "explicit", vocab=N)
    assert N * D > 2**31 and (N - 8) * D == 2**31
    table, U = lazy(N, D), lazy(1, D, dtype=torch.float32)
    table[:, :columns], U[:, :columns] = small.table, small.parameters[0]
    ids = torch.arange(N).flip(0)[None].roll(N // 2)
    small = small._replace(ids=ids, mask=None)
    call = small._replace(table=table, parameters=[U])

    monkeypatch.setattr(forward, "tile_sizes", lambda *_: (512, columns, 16, 4))
    monkeypatch.setattr(outer, "tile_sizes", lambda *_: (32, columns, 16, 4, 1))
    start, wide = launch.start, (forward.forward_kernel, outer.outer_kernel)
    monkeypatch.setattr(
        launch, "start", lambda k, grid, *a, **o: start(k, (1,) if k in wide else grid, *a, **o)
    )
    layout = Layout(call)
    out, grad = lazy(M, 1, N, D), lazy(M, 1, N, D)
    forward.forward(layout, out, None, want_shift=False)
    exact = in_fp64(small)
    expected = torch_embed.perturb_embed(exact, False).out
    torch.testing.assert_close(out[..., :columns].double(), expected, rtol=2e-3, atol=2e-3)

    grad[..., :columns] = torch.randn(M, 1, N, columns)
    grad_e, grads, _ = backward.backward(call, grad, None, want_table=True, per_sample=False)
    part = grad[..., :columns].double()
    expected = gradients_of(part, exact, False, torch_embed)[1]
    ours = grads[0][0, 0, :, :columns].double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(grad_e[:, :columns].double(), part.sum((0, 1)), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
@pytest.mark.gpu
def test_the_last_tokens_of_more_than_2_to_the_31_elements_are_as_of_a_small_batch():
    D, T, tail = 4096, 2**18 + 24, 24
    M, dtype = 3, torch.bfloat16
    skip_without_memory(40)
    call = on_device(make_call("lowrank", dtype, (M, 1, T, D, 16, 16), "plain"))
    part = call._replace(
        ids=call.ids[:, -tail:], rows=call.rows[:, -tail:], positions=call.positions[:, -tail:]
    )
    out = output_of(call)
    assert out.numel() > 2**31
    assert torch.equal(out[:, :, -tail:], output_of(part))
    grad = torch.zeros_like(out)
    grad[:, :, -tail:] = torch.randn(M, 1, tail, D, device=DEVICE)
    del out
    whole = gradients_of(grad, call, False)[1]
    expected = gradients_of(grad[:, :, -tail:], part, False)[1]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
