"""The Triton row passes, and the heads on top of them, judged by the error of torch in fp32."""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

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
from torch import Tensor
from torch.nn import functional as F

from fastperturb.kernels import head_rows, launch
from fastperturb.ops import gemm, head_blocks, head_geometry, head_gradients, reference
from fastperturb.ops.calls import LogitOptions, LogProbs, RunningSoftmax
from fastperturb.ops.head_blocks import Head
from fastperturb.ops.head_gradients import Wanted
from fastperturb.ops.head_labels import Labels
from fastperturb.ops.torch import rows as torch_rows

OUT = {"in place": None, "fp32": torch.float32, "16-bit": HALF}
pytestmark = MARKS

EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPTIONS = {  # bias, scale, softcap
    "plain": (False, 1.0, None),
    "biased": (True, 1.0, None),
    "soft-capped": (False, -0.7, 3.0),
    "everything": (True, 1.3, 20.0),
}
START = 100
ROW_SHAPES = [(1, 1), (5, 63), (3, 2064), (2, 16400)]  # n, v; the last two take several tiles
SAMPLE_SHAPES = [(2, 1, 1), (3, 5, 70), (8, 2, 530), (33, 2, 140)]  # M, n, v


class Block(NamedTuple):
    products: Tensor  # [n, v]
    options: LogitOptions
    weight: Tensor  # [v, D]


class Rows(NamedTuple):
    """The inputs of grad_logits, in its order."""

    products: Tensor  # [n, v]
    options: LogitOptions
    target: Tensor
    lse: Tensor
    upstream: Tensor


class Samples(NamedTuple):
    """The inputs of quadratic_grad_logits, in its order."""

    products: Tensor  # [M, n, v]
    options: LogitOptions
    target: Tensor
    lse: Tensor
    row_weights: Tensor
    dot: Tensor
    upstream: Tensor


def options_of(name, v, start=START):
    bias, scale, softcap = OPTIONS[name]
    return LogitOptions(start, torch.randn(v) if bias else None, scale, softcap)


def targets(n, v, start=START):
    """Half lie in the block; others just before or after it, in its last tile, or nowhere."""
    inside = torch.randint(start, start + v, (n,))
    outside = torch.tensor([start - 1, start + v, start + v + 13, -100, -(2**40), 2**40])
    return torch.where(torch.arange(n) % 2 == 0, inside, outside[torch.randint(6, (n,))])


def blocks_of(n, widths, options, D=24, size=3.0):
    """Blocks of one vocabulary, one after the other."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [
        Block(size * torch.randn(n, v), options_of(options, v, start), torch.randn(v, D))
        for v, start in zip(widths, starts)
    ]


def some_rows(n, v, options, size=3.0):
    """Rows of which one in three has no upstream gradient."""
    products, options, target = size * torch.randn(n, v), options_of(options, v), targets(n, v)
    lse = torch_rows._logits(products, options)[0].logsumexp(-1) + torch.rand(n)
    lse = torch.stack([lse, torch.randn(n) / 100])
    upstream = torch.randn(n) * (torch.arange(n) % 3 != 1)
    return Rows(products, options, target, lse, upstream)


def some_samples(M, n, v, options, size=3.0):
    """All samples of tokens of which one in three has no upstream gradient."""
    products, options = size * torch.randn(M, n, v), options_of(options, v)
    lse = torch_rows._logits(products, options)[0].logsumexp(-1) + torch.rand(M, n)
    lse = torch.stack([lse, torch.randn(M, n) / 100])
    row_weights, dot = torch.rand(M, n) + 0.5, torch.randn(M, n)
    upstream = torch.randn(n) * (torch.arange(n) % 3 != 1)
    return Samples(products, options, targets(n, v), lse, row_weights, dot, upstream)


def converted(value, dtype, device):
    """A copy of tensors, lists and named tuples, with floating point in `dtype`."""
    if isinstance(value, list):
        return [converted(element, dtype, device) for element in value]
    if isinstance(value, tuple):
        return value._make(converted(field, dtype, device) for field in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None, copy=True)


def buffer_for(products, dtype):
    """The memory that a pass writes: the products' own (None), or some full of NaN."""
    return products if dtype is None else torch.full_like(products, torch.nan, dtype=dtype)


def run_online_softmax(row_passes, inputs, out_dtype):
    """The running statistics, total, and each block's weights after all blocks."""
    target, entropy, *blocks = inputs
    n, D = len(target), blocks[0].weight.shape[1]
    running = RunningSoftmax.start(n, blocks[0].products, entropy=entropy)
    total = blocks[0].products.new_zeros(n, D)
    all_weights = []
    for block in blocks:
        weights = buffer_for(block.products, out_dtype)
        row_passes.online_softmax(block.products, block.options, target, running, weights, total)
        weight = F.pad(block.weight, (0, 0, 0, block.options.padding))
        # In fp64: a GPU may add up 16,384 products one by one, with ten times a CPU's error.
        product = weights.double() @ weight.double() / gemm.lift(weights.dtype)
        total += product.to(total.dtype)
        all_weights.append(weights / gemm.lift(weights.dtype))
    return [value for value in running if value is not None] + [total] + all_weights


def run_grad_logits(row_passes, rows, out_dtype):
    out = buffer_for(rows.products, out_dtype)
    row_passes.grad_logits(*rows, out)
    return [out]


def run_quadratic_dot(row_passes, samples, out_dtype, strata=1):
    """The samples' `dot` with the block's part added."""
    row_passes.quadratic_dot(
        samples.products, samples.options, samples.lse, samples.row_weights, samples.dot, strata
    )
    return [samples.dot]


def run_quadratic_grad_logits(row_passes, samples, out_dtype, strata=1):
    out = buffer_for(samples.products, out_dtype)
    row_passes.quadratic_grad_logits(*samples, out, strata)
    return [out]


def by_triton(run, inputs, out_dtype=None):
    return run(head_rows, converted(inputs, torch.float32, DEVICE), out_dtype)


def three_ways(run, inputs, out_dtype=None):
    """The results of our kernels, of torch in fp64, and of torch in fp32."""
    ours = converted(by_triton(run, inputs, out_dtype), None, "cpu")
    exact = run(torch_rows, converted(inputs, torch.float64, "cpu"), None)
    naive = run(torch_rows, converted(inputs, torch.float32, "cpu"), out_dtype)
    return ours, exact, naive


def assert_all_as_good(ours, exact, naive):
    for result, truth, other in zip(ours, exact, naive, strict=True):
        assert result.dtype == other.dtype
        assert_as_good(result, truth, other, eps=EPS[other.dtype])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(1, [1]), (7, [63, 128, 5]), (3, [300, 16400])], ids=str)
def test_the_online_softmax_of_several_blocks_is_as_good_as_torch(shape, options, entropy, out):
    n, widths = shape
    blocks = blocks_of(n, widths, options)
    inputs = [targets(n, sum(widths), 0), entropy, *blocks]
    assert_all_as_good(*three_ways(run_online_softmax, inputs, out))


def test_the_statistics_of_the_online_softmax_are_the_same_without_weights_and_total():
    (block,) = blocks_of(5, [600], "everything")
    target = targets(5, 600, 0).to(DEVICE)
    results = []
    for want_weights in (True, False):
        products, options, _ = converted(block, torch.float32, DEVICE)
        running = RunningSoftmax.start(5, products, entropy=True)
        weights = torch.empty_like(products) if want_weights else None
        total = products.new_zeros(5, 24) if want_weights else None
        head_rows.online_softmax(products, options, target, running, weights, total)
        results.append(running)
    for with_weights, without in zip(*results):
        assert torch.equal(with_weights.nan_to_num(), without.nan_to_num())


def test_entries_of_minus_infinity_have_no_weight_whichever_blocks_they_fill():
    """Whole blocks, all entries but one, and all entries but the target."""
    blocks = blocks_of(4, [40, 40, 40], "plain")
    for block in blocks:
        block.products[:3] = -torch.inf
    blocks[1].products[0] = torch.randn(40)
    blocks[1].products[1, 7] = 5.0
    blocks[2].products[2, 9] = -5.0
    inputs = [torch.tensor([45, 3, 89, 100]), True, *blocks]
    ours, exact, naive = three_ways(run_online_softmax, inputs)
    assert_all_as_good(ours, exact, naive)
    assert all(value[[0, 2, 3]].isfinite().all() for value in ours)
    _, _, target_logit, _, _, first_weights, *_ = ours
    assert target_logit[1] == -torch.inf and (first_weights[:3] == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_stay_finite(size):
    blocks = blocks_of(6, [70, 70], "plain", size=size)
    ours, exact, naive = three_ways(
        run_online_softmax, [torch.randint(0, 140, (6,)), True, *blocks]
    )
    assert_all_as_good(ours, exact, naive)
    assert all(value.isfinite().all() for value in ours)


def test_a_nan_logit_reaches_the_results_of_its_row_and_no_others():
    blocks = blocks_of(4, [40, 40], "plain")
    blocks[0].products[0, 3] = torch.nan
    blocks[1].products[1, 3] = torch.nan
    blocks[0].products[2, 3] = torch.nan  # the target's
    inputs = [torch.tensor([50, 50, 3, 9]), True, *blocks]
    *statistics, total, _, _ = three_ways(run_online_softmax, inputs)[0]
    running = RunningSoftmax(*statistics)
    log_probs, _, sums = running.finish()
    assert log_probs.isnan().tolist() == sums.isnan().tolist() == [True, True, True, False]
    assert (running.target_logit >= running.peak).tolist()[:3] == [False] * 3
    assert total.isnan().any(1)[[0, 1, 3]].tolist() == [True, True, False]


def test_the_target_reaches_the_peak_where_it_ties_and_not_where_a_logit_is_higher():
    products = torch.randn(3, 500)
    products[:, 480] = products[:, 77] = 9.0
    products[1, 3], products[2, 200] = 9.1, 8.9
    for _, scale, softcap in OPTIONS.values():
        signed = products if scale > 0 else -products
        block = Block(signed, LogitOptions(0, None, scale, softcap), torch.zeros(500, 24))
        inputs = [torch.tensor([77, 77, 480]), False, block]
        peak, _, target_logit, *_ = three_ways(run_online_softmax, inputs)[0]
        assert (target_logit >= peak).tolist() == [True, False, True]


@pytest.mark.parametrize("softcap", [1e-2, 5.0, 1e5])
def test_a_soft_cap_of_any_size_costs_no_precision(softcap):
    block = blocks_of(6, [900], "plain")[0]._replace(options=LogitOptions(0, None, 1.0, softcap))
    block.products[:, ::2] *= 1e-3
    inputs = [torch.randint(0, 900, (6,)), True, block]
    assert_all_as_good(*three_ways(run_online_softmax, inputs))


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_grad_logits_is_as_good_as_torch(shape, options, out):
    assert_all_as_good(*three_ways(run_grad_logits, some_rows(*shape, options), out))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_quadratic_dot_is_as_good_as_torch(shape, options):
    assert_all_as_good(*three_ways(run_quadratic_dot, some_samples(*shape, options)))


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_quadratic_grad_logits_is_as_good_as_torch(shape, options, out):
    assert_all_as_good(*three_ways(run_quadratic_grad_logits, some_samples(*shape, options), out))


@pytest.mark.parametrize(("num_samples", "strata"), [(4, 2), (12, 4), (16, 8)])
def test_quadratic_passes_compare_samples_of_different_groups(num_samples, strata):
    for run in (run_quadratic_dot, run_quadratic_grad_logits):
        samples = some_samples(num_samples, 3, 70, "plain")
        assert_all_as_good(*three_ways(functools.partial(run, strata=strata), samples))


@pytest.mark.parametrize("options", ["plain", "soft-capped"])
def test_rows_without_upstream_gradients_give_zeros_whatever_their_logits(options):
    rows, samples = some_rows(3, 70, options, 1e4), some_samples(3, 3, 70, options, 1e4)
    for run, inputs in ((run_grad_logits, rows), (run_quadratic_grad_logits, samples)):
        inputs.lse[..., [0, 2]] = 0.0  # as of ignored rows
        inputs = inputs._replace(upstream=torch.tensor([0.0, torch.nan, 0.0]))
        (out,) = by_triton(run, inputs)
        assert (out[..., [0, 2], :] == 0).all() and out[..., 1, :].isnan().all()


def cases_of(n, widths, M, v, options):
    """(run, inputs) of all four passes."""
    samples = some_samples(M, n, v, options)
    return [
        (run_online_softmax, [targets(n, sum(widths), 0), True, *blocks_of(n, widths, options)]),
        (run_grad_logits, some_rows(n, v, options)),
        (run_quadratic_dot, samples),
        (run_quadratic_grad_logits, samples),
    ]


def padded(block):
    """A block, or the inputs of a pass, with columns of NaN that are no entries."""
    padding = 5
    columns = torch.full((*block.products.shape[:-1], padding), torch.nan)
    products = torch.cat([block.products, columns], -1)
    return block._replace(products=products, options=block.options._replace(padding=padding))


def with_padding(inputs):
    if isinstance(inputs, list):
        return [padded(value) if isinstance(value, Block) else value for value in inputs]
    return padded(inputs)


@pytest.mark.parametrize("out", ["fp32", "16-bit"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_padding_does_not_count_and_the_next_product_gets_0_for_it(options, out):
    for run, inputs in cases_of(5, [70, 2100], 3, 70, options):
        for row_passes in (head_rows, torch_rows):
            plain, wide = (
                run(row_passes, converted(x, torch.float32, DEVICE), OUT[out])
                for x in (inputs, with_padding(inputs))
            )
            for value, padded_value in zip(plain, wide, strict=True):
                columns = value.shape[-1]
                torch.testing.assert_close(padded_value[..., :columns], value, equal_nan=True)
                assert (padded_value[..., columns:] == 0).all()


def test_the_same_inputs_give_the_same_bits():
    for run, inputs in cases_of(5, [700, 16400], 5, 2500, "everything"):
        first, again = by_triton(run, inputs), by_triton(run, inputs)
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, again))


def test_without_rows_the_results_are_empty():
    for run, inputs in cases_of(0, [40], 3, 40, "plain"):
        assert all(value.numel() == 0 for value in by_triton(run, inputs))


HEADS = {
    "plain": {},
    "everything": {"softcap": 4.0, "logit_scale": 1.7, "valid_vocab": 253, "ignore_index": -1},
}


# One block; many; and as on a GPU, in memory that is reused and padded, with 16-bit products.
GEOMETRIES = {
    "one block": head_geometry.CPU,
    "many": dataclasses.replace(
        head_geometry.CPU, most_rows=16, block_bytes=64 * 4 * 16, held_bytes=3 * 4 * 260 * 5
    ),
    "as on a GPU": head_geometry.Geometry(
        block_bytes=64 * 4 * 16,
        most_rows=16,
        most_entries=128,
        held_bytes=3 * 4 * 260 * 5,
        gathered_rows=32,
        padding=64,
        narrow=True,
    ),
}


class HeadInputs(NamedTuple):
    hidden: Tensor  # [N, D] or [M, N, D]
    weight: Tensor
    bias: Tensor
    target: Tensor
    upstream: Tensor
    row_weights: Tensor


def head_of(
    row_passes,
    inputs,
    geometry,
    *,
    softcap=None,
    logit_scale=1.0,
    valid_vocab=260,
    ignore_index=-100,
):
    """A head, and the labels."""
    options = logit_scale, softcap, valid_vocab, torch.float32
    head = Head(row_passes, inputs.weight, inputs.bias.float(), *options, geometry)
    if geometry.narrow:  # a GPU that does not know the labelled tokens computes all
        target = inputs.target
        return head, Labels(target, len(target), None, target == ignore_index)
    return head, Labels.of(inputs.target, ignore_index, None)


def by_the_head(row_passes, inputs, geometry, options):
    """Values, grad_hidden of the frozen head times the upstream gradient, and all gradients."""
    hidden, upstream, wanted = inputs.hidden, inputs.upstream, Wanted(True, True, True)
    head, labels = head_of(row_passes, inputs, geometry, **options)
    if hidden.ndim == 2:
        result = head_blocks.linear_logprob(
            head, hidden, labels, want_grad_hidden=True, want_entropy=False
        )
        saved = hidden, labels, result.lse
        grads = head_gradients.linear_logprob_backward(head, upstream, *saved, wanted)
        return [result.log_probs, result.grad_hidden * upstream[:, None], *grads]
    result = head_blocks.linear_quadratic(
        head, hidden, labels, inputs.row_weights, want_grad_hidden=True
    )
    saved = hidden, labels, inputs.row_weights, 1, result.lse, result.dot
    grads = head_gradients.linear_quadratic_backward(head, upstream, *saved, wanted)
    return [result.values, result.grad_hidden * upstream[:, None], *grads]


def by_the_oracle(inputs, options):
    leaves = [value.double().requires_grad_() for value in inputs[:3]]
    hidden, weight, bias = leaves
    if hidden.ndim == 2:
        value = reference.linear_logprob(hidden, weight, inputs.target, bias=bias, **options)
    else:
        weighted = {**options, "row_weights": inputs.row_weights.double()}
        value = reference.linear_quadratic(hidden, weight, inputs.target, bias=bias, **weighted)
    grads = torch.autograd.grad(value, leaves, inputs.upstream.double())
    return [value.detach(), grads[0], *grads]


LEADS = {"logprob": (37,), "quadratic": (5, 11)}


def head_inputs(lead, options, upstream=1.0):
    target = torch.randint(0, 253, (lead[-1],))
    target[1::4] = options.get("ignore_index", -100)
    return HeadInputs(
        torch.randn(*lead, 16),
        torch.randn(260, 16),
        torch.randn(260),
        target,
        upstream * torch.randn(lead[-1]),
        torch.rand(lead) + 0.5,
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
def test_the_heads_are_as_close_to_the_oracle_as_torchs(lead, options, geometry):
    inputs = head_inputs(lead, options)
    naive = converted(inputs, torch.float32, "cpu")
    naive = by_the_head(torch_rows, naive, GEOMETRIES["one block"], options)
    # cuBLAS raises there without an environment variable: test_heads_on_a_gpu has it.
    with nan_in_new_memory() if INTERPRETED else contextlib.nullcontext():
        ours = converted(inputs, torch.float32, DEVICE)
        ours = by_the_head(head_rows, ours, GEOMETRIES[geometry], options)
    assert_all_as_good(converted(ours, None, "cpu"), by_the_oracle(inputs, options), naive)


@pytest.mark.parametrize("upstream", [1e-9, 1.0 / 1024, 1e6])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
def test_fp16_gradients_err_by_fp16s_rounding_whatever_the_upstream(lead, options, upstream):
    """Unscaled, most gradients of logits would be 0 in fp16, and those of 1e6 infinite."""
    inputs = converted(head_inputs(lead, options, upstream), torch.float16, "cpu")
    inputs = inputs._replace(upstream=upstream * torch.randn(lead[-1]))
    right = by_the_oracle(inputs, options)
    for row_passes, device in ((head_rows, DEVICE), (torch_rows, "cpu")):
        on_device = converted(inputs, torch.float16, device)
        on_device = on_device._replace(
            upstream=inputs.upstream.to(device), row_weights=inputs.row_weights.float().to(device)
        )
        results = by_the_head(row_passes, on_device, GEOMETRIES["as on a GPU"], options)
        _, grad_hidden, *gradients = converted(results, None, "cpu")
        in_fp32 = [(grad_hidden, right[1]), (gradients[1], right[3]), (gradients[2], right[4])]
        for result, exact in in_fp32:
            assert (result.double() - exact).norm() <= 1e-3 * exact.norm()
        # In hidden's own dtype, in which it may be 0 or infinite.
        rounded = right[2].to(torch.float16).double()
        fits = rounded.abs() < 6e4
        error = (gradients[0].double() - rounded)[fits]
        assert error.norm() <= 1e-3 * right[2].norm() + 1e-7


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_upstream_gradients_of_nan_infinity_and_0_stay_in_their_rows_in_fp16():
    inputs = converted(head_inputs(LEADS["logprob"], {}, 1e-4), torch.float16, "cpu")
    upstream = 1e-4 * torch.randn(37)
    upstream[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    target = inputs.target.where(torch.arange(37) > 3, 7)
    inputs = inputs._replace(upstream=upstream, target=target)
    on_device = converted(inputs, torch.float16, DEVICE)._replace(upstream=upstream.to(DEVICE))
    *_, grad_hidden, _, _ = by_the_head(head_rows, on_device, GEOMETRIES["as on a GPU"], {})
    grad_hidden = grad_hidden.cpu().double()
    assert not grad_hidden[:2].isfinite().any() and (grad_hidden[2] == 0).all()
    right = by_the_oracle(inputs._replace(upstream=upstream.nan_to_num(0.0, 0.0)), {})[2]
    assert (grad_hidden - right)[3:].norm() <= 2e-3 * right[3:].norm()


@interpreted_only
def test_rows_beyond_2_to_the_31_elements_are_reached(tmp_path, monkeypatch):
    """A lazily mapped block, of which only the last program runs."""
    from triton.runtime.interpreter import interpreter_builder

    n, v, D = 2**20 + 1, 2048, 2049  # total's last row lies beyond 2^31 as well
    products = torch.from_file(str(tmp_path / "products"), shared=True, size=n * v).view(n, v)
    total = torch.from_file(str(tmp_path / "total"), shared=True, size=n * D).view(n, D)
    start = launch.start

    def start_last(kernel, grid, arguments, **options):
        last = grid[0] - 1
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *grid: None)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *index: None)
        interpreter_builder.grid_dim, interpreter_builder.grid_idx = (last + 1, 1, 1), (last, 0, 0)
        start(kernel, (1,), arguments, **options)

    monkeypatch.setattr(launch, "start", start_last)
    logits = torch.randn(v)
    q = (logits - logits.max()).exp()
    options, target = LogitOptions(0, None, 1.0, None), torch.full((n,), -100)
    products[-1], total[-1] = logits, 1.0
    running = RunningSoftmax.start(n, products)
    running.peak[-1] = logits.max() - 1
    head_rows.online_softmax(products, options, target, running, products, total)
    torch.testing.assert_close(products[-1], q)
    torch.testing.assert_close(total[-1], torch.full((D,), -1.0).exp())

    products[-1] = logits
    lse, ones = torch.stack([logits.logsumexp(0).expand(n), torch.zeros(n)]), torch.ones(n)
    head_rows.grad_logits(products, options, target, lse, ones, products)
    torch.testing.assert_close(products[-1], -logits.softmax(0))

    tokens = n // 2  # two samples of half the rows
    products = products[: 2 * tokens].view(2, tokens, v)
    products[:, -1] = torch.stack([logits, logits.flip(0)])
    p = products[:, -1].softmax(-1)
    weights, lse = torch.ones(2, tokens), lse[:, : 2 * tokens].reshape(2, 2, tokens)
    zeros = torch.zeros(2, tokens)
    dot = zeros.clone()
    head_rows.quadratic_dot(products, options, lse, weights, dot)
    head_rows.quadratic_grad_logits(
        products, options, target[:tokens], lse, weights, zeros, weights[0], products
    )
    torch.testing.assert_close(products[:, -1], (-p[0] * p[1]).expand(2, v))
    torch.testing.assert_close(dot[:, -1], (p[0] * p[1]).sum().expand(2))


@interpreted_only
def test_a_weight_stored_by_columns_may_have_more_than_2_to_the_31_elements(tmp_path):
    """A lazily mapped weight, of which only the target's row is read."""
    V, D = 2**28, 12
    memory = torch.from_file(str(tmp_path / "weight"), shared=True, size=V * D, dtype=torch.float16)
    weight = memory.view(D, V).T
    weight[7] = torch.arange(D)
    running = RunningSoftmax.start(1, torch.empty(0))
    for value, start in zip(running, (0.0, 1.0, 0.0)):
        value.fill_(start)
    results = LogProbs.empty(memory.new_empty(1, D), torch.float32, entropy=False, grad_hidden=True)
    target, options = torch.tensor([7]), LogitOptions(0, None, 1.0, None)
    head_rows.finish_logprob(options, target, running, weight, torch.zeros(1, D), 1.0, results)
    torch.testing.assert_close(results.grad_hidden[0], torch.arange(D) / 2)


@pytest.mark.skipif(INTERPRETED, reason="too big to interpret")
@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.gpu
def test_real_blocks_are_as_good_as_torch(options, out):
    blocks = blocks_of(2048, [16384, 21376], options, D=512)
    inputs = [targets(2048, 37760, 0), True, *blocks]
    assert_all_as_good(*three_ways(run_online_softmax, inputs, out))
    assert_all_as_good(*three_ways(run_grad_logits, some_rows(2048, 16384, options), out))
    samples = some_samples(8, 40, 16384, options)
    assert_all_as_good(*three_ways(run_quadratic_dot, samples))
    assert_all_as_good(*three_ways(run_quadratic_grad_logits, samples, out))


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
@pytest.mark.gpu
def test_the_last_rows_of_more_than_2_to_the_31_elements_are_as_of_a_small_block():
    skip_without_memory(20)
    n, v = 2**17 + 3, 16400
    tail = torch.randn(3, v, device=DEVICE)
    target = torch.randint(0, v, (n,), device=DEVICE)
    options = LogitOptions(0, None, 1.0, None)

    def online_softmax(products, target):
        running = RunningSoftmax.start(len(target), products)
        head_rows.online_softmax(products, options, target, running, products, None)
        return products[-3:], running.peak[-3:], running.other_sum[-3:]

    def grad_logits(products, target):
        ones = products.new_ones(len(target))
        lse = torch.stack([10 * ones, 0 * ones])
        head_rows.grad_logits(products, options, target, lse, ones, products)
        return (products[-3:],)

    products = torch.zeros(n, v, device=DEVICE)
    for run in (online_softmax, grad_logits):
        products[-3:] = tail
        large, small = run(products, target), run(tail.clone(), target[-3:])
        assert all(map(torch.equal, large, small))
