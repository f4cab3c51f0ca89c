"""The heads' GEMM with its epilogues, judged by the error of torch in fp32 on the same inputs."""

from typing import NamedTuple

import pytest
import torch
from kernel_oracle import (
    DEVICE,
    HALF,
    INTERPRETED,
    MARKS,
    assert_as_good,
    skip_without_memory,
)
from torch import Tensor

from fastperturb.kernels import head_gemm, launch
from fastperturb.ops.calls import LogitOptions, RunningSoftmax
from fastperturb.ops.torch import rows as torch_rows

pytestmark = MARKS
# The interpreter's numpy, where a GPU makes inf or NaN without a word.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = {torch.float64: 0, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPTIONS = {  # bias, scale, softcap
    "plain": (False, 1.0, None),
    "biased": (True, 1.0, None),
    "soft-capped": (False, -0.7, 3.0),
    "everything": (True, 1.3, 20.0),
}
# Rows, D and the widths of the blocks, of which the first goes by the row pass. A tile has 128 rows
# and 256 entries, in quarters of 64; one step of its products has 64 dimensions.
WANTED = {"weights": HALF, "statistics only": None}
SHAPES = [(1, 8, [1, 1]), (5, 24, [63, 128, 5]), (130, 72, [40, 300, 257]), (260, 64, [64, 520])]


class Block(NamedTuple):
    weight: Tensor  # [v, D]
    options: LogitOptions


class Inputs(NamedTuple):
    hidden: Tensor  # [n, D]
    target: Tensor  # [n]
    blocks: list[Block]


class Results(NamedTuple):
    """The statistics after all blocks, total, and the weights of all blocks but the first."""

    running: RunningSoftmax
    total: Tensor | None  # without weights None
    weights: list[Tensor]
    overflow: bool

    def tensors(self):
        values = [*self.running, self.total, *self.weights]
        return [value.cpu() for value in values if value is not None]


def options_of(name, v, start=0):
    bias, scale, softcap = OPTIONS[name]
    return LogitOptions(start, torch.randn(v) if bias else None, scale, softcap)


def targets(n, v, start=0):
    """Half lie in the block; others just before or after it, in its last tile, or nowhere."""
    inside = torch.randint(start, start + v, (n,))
    outside = torch.tensor([start - 1, start + v, start + v + 13, -100, -(2**40), 2**40])
    return torch.where(torch.arange(n) % 2 == 0, inside, outside[torch.randint(6, (n,))])


def some_inputs(n, D, widths, options="plain", size=2.0):
    """Rows of 16-bit matrices whose logits have so large a standard deviation."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    blocks = [
        Block((size * torch.randn(v, D) / D**0.5).to(HALF), options_of(options, v, start))
        for v, start in zip(widths, starts)
    ]
    return Inputs(torch.randn(n, D).to(HALF), targets(n, sum(widths)), blocks)


def inputs_of_logits(first, *others, target, scale=1.0):
    """Inputs whose blocks have these products [n, v]; a hidden state picks one dimension."""
    n, widths = len(first), [block.shape[1] for block in (first, *others)]
    inputs = some_inputs(n, -(-n // 8) * 8, widths)
    hidden = torch.eye(*inputs.hidden.shape).to(HALF)
    blocks = []
    for block, logits in zip(inputs.blocks, (first, *others)):
        block.weight[:, :n] = logits.T.to(HALF)
        blocks.append(block._replace(options=block.options._replace(scale=scale)))
    return Inputs(hidden, torch.tensor(target), blocks)


def products(hidden, weight, dtype):
    """hidden weight^T in a dtype.

    Long rows in fp32 by a GPU's tensor cores, as the heads do: those truncate as they accumulate.
    """
    is_narrow = hidden.dtype == weight.dtype == HALF
    if hidden.is_cuda and is_narrow and dtype == torch.float32 and hidden.shape[1] > 1000:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.to(dtype) @ weight.to(dtype).T


def on_device(options, dtype):
    bias = None if options.bias is None else options.bias.to(DEVICE, dtype)
    return options._replace(bias=bias)


class RowPass:
    """A block by its products and the row pass of torch, as without a fused kernel."""

    @staticmethod
    def add_block(hidden, weight, options, target, running, weights, total, overflow):
        logits = products(hidden, weight, running.peak.dtype)
        torch_rows.online_softmax(logits, options, target, running, logits, total)
        if total is not None:
            total += products(logits, weight.T, total.dtype)


class Fused:
    """A block by the fused kernels."""

    @staticmethod
    def add_block(hidden, weight, options, target, running, weights, total, overflow):
        block = head_gemm.online_softmax(hidden, weight, options, target, running, weights)
        if total is not None:
            assert (weights[:, len(weight) :].nan_to_num() == 0).all()
            total += products(weights[:, : len(weight)], weight.T, total.dtype)
        head_gemm.merge(block, running, total, overflow)


class Defined:
    """A block by the definition of the fused kernels, in any dtype."""

    @staticmethod
    def add_block(hidden, weight, options, target, running, weights, total, overflow):
        logits, slope = torch_rows._logits(products(hidden, weight, running.peak.dtype), options)
        here, index = torch_rows._in_block(target, options.start, len(weight))
        target_logit = logits.gather(1, index)[:, 0]
        running.target_logit.copy_(target_logit.where(here, running.target_logit))
        logits.scatter_(1, index, target_logit.where(~here, -torch.inf)[:, None])
        q = torch.exp(logits - running.peak[:, None])
        if weights is not None:
            weights.zero_()[:, : len(weight)] = q if slope is None else q * slope
            total += products(weights[:, : len(weight)], weight.T, total.dtype)
        peak = torch.maximum(running.peak, logits.amax(1))
        peak = torch.fmax(peak, running.target_logit)
        rescale = torch.exp(running.peak - peak)
        running.other_sum.add_(q.sum(1)).mul_(rescale)
        running.peak.copy_(peak)
        if total is not None:
            total.mul_(rescale[:, None])


def run_softmax(way, inputs, dtype, weights_dtype):
    """All blocks' softmax, the first by its row pass; without weights_dtype only statistics.

    The fused blocks' weights have columns of padding, up to a multiple of 64.
    """
    hidden, target = inputs.hidden.to(DEVICE), inputs.target.to(DEVICE)
    running = RunningSoftmax.start(len(hidden), hidden.new_empty(0, dtype=dtype))
    total = weights = None
    if weights_dtype is not None:
        total = torch.zeros_like(hidden, dtype=dtype)
    overflow = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    kept = []
    for index, (weight, options) in enumerate(inputs.blocks):
        weight, options, v = weight.to(DEVICE), on_device(options, dtype), len(weight)
        if weights_dtype is not None:
            weights = hidden.new_full((len(hidden), v + -v % 64), torch.nan, dtype=weights_dtype)
        add_block = way.add_block if index else RowPass.add_block
        add_block(hidden, weight, options, target, running, weights, total, overflow)
        if weights is not None:
            kept.append(weights)
    return Results(running, total, kept[1:], bool(overflow))


def normalised(results):
    """The log-probs, and total as a mean in the dtype of a gradient: no block's peak matters."""
    log_probs, _, sums = results.running.finish()
    if results.total is None:
        return [log_probs.cpu()]
    dtype = HALF if results.total.dtype == torch.float32 else None
    return [log_probs.cpu(), (results.total / sums[:, None]).to(dtype).cpu()]


def run_grad_logits(by_triton, inputs, lse, upstream, dtype, out_dtype):
    """out of the inputs' last block."""
    (weight, options), hidden = inputs.blocks[-1], inputs.hidden.to(DEVICE)
    weight, options = weight.to(DEVICE), on_device(options, dtype)
    v = len(weight)
    out = hidden.new_full((len(hidden), v + -v % 64), torch.nan, dtype=out_dtype)
    rows = inputs.target.to(DEVICE), lse.to(DEVICE, dtype), upstream.to(DEVICE, dtype)
    if by_triton:
        head_gemm.grad_logits(hidden, weight, options, *rows, out)
        assert (out[:, v:].nan_to_num() == 0).all()
    else:
        torch_rows.grad_logits(products(hidden, weight, dtype), options, *rows, out[:, :v])
    return out[:, :v].cpu()


def some_statistics(inputs):
    """lse of the last block, and upstream gradients, of which one in three is 0."""
    weight, options = inputs.blocks[-1]
    logits = torch_rows._logits(products(inputs.hidden, weight, torch.float32), options)[0]
    n = len(logits)
    lse = torch.stack([logits.logsumexp(-1) + torch.rand(n), torch.randn(n) / 100])
    return lse, torch.randn(n) * (torch.arange(n) % 3 != 1)


def assert_all_as_good(ours, exact, naive):
    for result, truth, other in zip(ours, exact, naive, strict=True):
        assert_as_good(result, truth, other, eps=EPS[result.dtype])


def limit_of(weights_dtype):
    """The largest l - peak that the fused kernels take."""
    return 11 if weights_dtype == torch.float16 else 60


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Let each program make several tiles, as on a GPU with more tiles than multiprocessors."""
    if INTERPRETED:
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("want", WANTED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_softmax_of_several_blocks_is_as_good_as_its_definition(shape, options, want):
    inputs = some_inputs(*shape, options)
    ours = run_softmax(Fused, inputs, torch.float32, WANTED[want])
    exact = run_softmax(Defined, inputs, torch.float64, WANTED[want] and torch.float64)
    naive = run_softmax(Defined, inputs, torch.float32, WANTED[want])
    assert not ours.overflow
    assert_all_as_good(ours.tensors(), exact.tensors(), naive.tensors())


@pytest.mark.parametrize("want", WANTED)
@pytest.mark.parametrize("options", OPTIONS)
def test_it_gives_the_log_probs_and_gradients_of_the_row_passes(options, want):
    inputs = some_inputs(70, 40, [64, 300, 130], options)
    ours = run_softmax(Fused, inputs, torch.float32, WANTED[want])
    exact = run_softmax(RowPass, inputs, torch.float64, WANTED[want] and torch.float64)
    naive = run_softmax(RowPass, inputs, torch.float32, WANTED[want])
    assert_all_as_good(*(normalised(results) for results in (ours, exact, naive)))
    for statistic, truth in zip(ours.running[:3], exact.running[:3], strict=True):
        torch.testing.assert_close(statistic, truth.float(), equal_nan=True)


def test_every_tile_is_made_where_groups_of_16_row_tiles_are_not_full():
    inputs = some_inputs(17 * 128 + 5, 8, [8, 300], size=1.0)
    ours = run_softmax(Fused, inputs, torch.float32, HALF)
    exact = run_softmax(Defined, inputs, torch.float64, torch.float64)
    naive = run_softmax(Defined, inputs, torch.float32, HALF)
    assert_all_as_good(ours.tensors(), exact.tensors(), naive.tensors())


def test_a_peak_that_rises_in_every_block_rescales_what_came_before():
    inputs = some_inputs(40, 24, [64, 100, 100, 100], size=1.0)
    for index, (weight, _) in enumerate(inputs.blocks):
        weight.mul_(1 + index)
    ours = run_softmax(Fused, inputs, torch.float32, HALF)
    exact = run_softmax(RowPass, inputs, torch.float64, torch.float64)
    naive = run_softmax(RowPass, inputs, torch.float32, HALF)
    assert_all_as_good(*(normalised(results) for results in (ours, exact, naive)))


@pytest.mark.parametrize("column", [0, 63, 64, 127, 128, 191, 192, 255, 256, 319, 320])
def test_a_target_is_found_in_every_quarter_of_a_tile(column):
    first, block = torch.randn(3, 64), torch.randn(3, 321)
    inputs = inputs_of_logits(first, block, target=[64 + column, 63, 64 + 321])
    running, _, (weights,), _ = run_softmax(Fused, inputs, torch.float32, HALF)
    assert (weights[:, :321] == 0).nonzero().tolist() == [[0, column]]
    expected = torch.stack([block[0, column], first[1, 63]]).to(HALF).float()
    assert torch.equal(running.target_logit[:2].cpu(), expected)
    assert running.target_logit[2].isnan()


@NUMPY_WARNS
@pytest.mark.parametrize("want", WANTED)
@pytest.mark.parametrize("step", [-0.5, 0.5])
def test_logits_too_far_above_the_earlier_peak_are_reported(step, want):
    first, block = torch.zeros(3, 64), torch.randn(3, 300)
    block[1, 270] = limit_of(WANTED[want]) + step
    inputs = inputs_of_logits(first, block, target=[7, 7, 7])
    results = run_softmax(Fused, inputs, torch.float32, WANTED[want])
    assert results.overflow == (step > 0)
    if step < 0:
        assert all(value.isfinite().all() for value in results.tensors())


def test_a_target_far_above_the_earlier_peak_is_no_overflow():
    first, block = torch.zeros(2, 64), torch.randn(2, 300)
    block[:, 270] = 500.0
    inputs = inputs_of_logits(first, block, target=[64 + 270, 64 + 270])
    results = run_softmax(Fused, inputs, torch.float32, HALF)
    assert not results.overflow
    assert (normalised(results)[0] == 0).all() and (normalised(results)[1] == 0).all()


@NUMPY_WARNS
@pytest.mark.parametrize("higher", [False, True])
def test_huge_logits_stay_finite_below_the_earlier_peak_and_are_reported_above_it(higher):
    first, block = torch.full((2, 64), 2.0), torch.rand(2, 300)
    block[1, 5] = 3.0 if higher else 1.5
    inputs = inputs_of_logits(first, block, target=[1, 70], scale=1e30)
    results = run_softmax(Fused, inputs, torch.float32, HALF)
    assert results.overflow == higher
    assert higher or all(value.isfinite().all() for value in results.tensors())


def test_entries_of_minus_infinity_have_no_weight():
    inputs = some_inputs(4, 24, [40, 300], "biased")
    inputs = inputs._replace(target=torch.tensor([3, 50, 330, -100]))
    inputs.blocks[1].options.bias[7:290] = -torch.inf
    ours = run_softmax(Fused, inputs, torch.float32, HALF)
    exact = run_softmax(Defined, inputs, torch.float64, torch.float64)
    naive = run_softmax(Defined, inputs, torch.float32, HALF)
    assert not ours.overflow and (ours.weights[0][:, 7:290] == 0).all()
    assert_all_as_good(ours.tensors(), exact.tensors(), naive.tensors())


@NUMPY_WARNS
@pytest.mark.parametrize("all_blocks", [True, False])
def test_a_first_block_of_minus_infinity_is_reported_if_another_entry_follows(all_blocks):
    inputs = some_inputs(3, 24, [40, 300], "biased")
    inputs.blocks[0].options.bias[:] = -torch.inf
    if all_blocks:
        inputs.blocks[1].options.bias[:] = -torch.inf
    results = run_softmax(Fused, inputs, torch.float32, HALF)
    assert results.overflow == (not all_blocks)
    assert not all_blocks or (results.running.other_sum == 0).all()


@NUMPY_WARNS
def test_a_nan_logit_reaches_the_results_of_its_row_and_no_others():
    inputs = some_inputs(4, 24, [40, 300])._replace(target=torch.tensor([50, 50, 3, 330]))
    inputs.hidden[1, 3] = torch.nan
    running, total, (weights,), overflow = run_softmax(Fused, inputs, torch.float32, HALF)
    log_probs, _, sums = running.finish()
    for value in (log_probs, sums, running.peak, total.sum(1), weights.sum(1)):
        assert value.isnan().tolist() == [False, True, False, False]
    assert not overflow and not (running.target_logit >= running.peak)[1]


@NUMPY_WARNS
def test_a_nan_logit_of_a_later_block_leaves_no_peak_that_a_target_could_reach():
    inputs = some_inputs(3, 24, [40, 300], "biased")._replace(target=torch.tensor([50, 3, 330]))
    inputs.blocks[1].options.bias[9] = torch.nan
    running = run_softmax(Fused, inputs, torch.float32, HALF).running
    assert running.peak.isnan().all() and running.finish()[0].isnan().all()


def test_the_target_reaches_the_peak_where_it_ties_and_not_where_a_logit_is_higher():
    first, block = torch.randn(3, 64), torch.randn(3, 500)
    block[:, 480] = block[:, 77] = 9.0
    block[1, 3], block[2, 200] = 9.5, 8.5
    inputs = inputs_of_logits(first, block, target=[64 + 77, 64 + 77, 64 + 480])
    peak, _, target_logit, _ = run_softmax(Fused, inputs, torch.float32, None).running
    assert (target_logit >= peak).tolist() == [True, False, True]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grad_logits_is_as_good_as_torch(shape, options):
    inputs = some_inputs(*shape, options)
    statistics = some_statistics(inputs)
    ours = run_grad_logits(True, inputs, *statistics, torch.float32, HALF)
    exact = run_grad_logits(False, inputs, *statistics, torch.float64, torch.float64)
    naive = run_grad_logits(False, inputs, *statistics, torch.float32, HALF)
    assert_all_as_good([ours], [exact], [naive])


@NUMPY_WARNS
@pytest.mark.parametrize("options", ["plain", "soft-capped"])
def test_rows_without_upstream_gradients_give_zeros_whatever_their_logits(options):
    inputs = some_inputs(4, 24, [300], options, size=1e4)
    inputs.hidden[3] = torch.nan
    lse = torch.tensor([[0.0, 0.0, torch.inf, torch.inf]] * 2)
    upstream = torch.tensor([0.0, torch.nan, 0.0, 0.0])
    out = run_grad_logits(True, inputs, lse, upstream, torch.float32, HALF)
    assert (out[[0, 2, 3]] == 0).all() and out[1].isnan().all()


def test_the_same_inputs_give_the_same_bits():
    inputs = some_inputs(150, 72, [64, 700, 300], "everything")
    first, again = (run_softmax(Fused, inputs, torch.float32, HALF).tensors() for _ in range(2))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, again))
    statistics = some_statistics(inputs)
    first, again = (
        run_grad_logits(True, inputs, *statistics, torch.float32, HALF) for _ in range(2)
    )
    assert torch.equal(first, again)


def test_without_rows_the_results_are_empty():
    inputs = some_inputs(0, 24, [40, 300])
    assert all(
        value.numel() == 0 for value in run_softmax(Fused, inputs, torch.float32, HALF).tensors()
    )
    lse, upstream = torch.empty(2, 0), torch.empty(0)
    assert run_grad_logits(True, inputs, lse, upstream, torch.float32, HALF).shape == (0, 300)


def test_nothing_is_written_beyond_the_columns_of_a_result():
    inputs = some_inputs(5, 24, [130])
    (weight, options), target = inputs.blocks[0], inputs.target.to(DEVICE)
    hidden, weight = inputs.hidden.to(DEVICE), weight.to(DEVICE)
    running = RunningSoftmax.start(5, hidden.new_empty(0, dtype=torch.float32))
    running.peak.zero_()
    statistics = torch.zeros(2, 5, device=DEVICE), torch.ones(5, device=DEVICE)
    memory = hidden.new_full((7, 192), torch.nan)
    out = memory[1:-1, :130]
    head_gemm.online_softmax(hidden, weight, options, target, running, out)
    assert not out.isnan().any() and memory.isnan().sum() == memory.numel() - out.numel()
    out.fill_(torch.nan)
    head_gemm.grad_logits(hidden, weight, options, target, *statistics, out)
    assert not out.isnan().any() and memory.isnan().sum() == memory.numel() - out.numel()


def test_it_runs_for_aligned_rows_of_16_bits_only():
    hidden, weight = torch.zeros(3, 24, dtype=HALF), torch.zeros(50, 24, dtype=HALF)
    hidden, weight = hidden.to(DEVICE), weight.to(DEVICE)
    assert head_gemm.can_run(hidden, weight) and head_gemm.can_run(hidden[1:], weight[7:])
    assert head_gemm.can_run(hidden, weight, want_weights=True) == (torch.bfloat16 == HALF)
    assert not head_gemm.can_run(hidden.float(), weight.float())
    assert not head_gemm.can_run(hidden, weight.float())
    assert not head_gemm.can_run(hidden[:, :20], weight[:, 4:])  # weight starts at 8 bytes
    assert not head_gemm.can_run(hidden[:, :20].contiguous(), weight[:, :20].contiguous())
    assert not head_gemm.can_run(hidden.T.contiguous().T, weight)


@pytest.mark.skipif(INTERPRETED, reason="too big to interpret")
@pytest.mark.parametrize("want", WANTED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.gpu
def test_real_blocks_are_as_good_as_their_definition(options, want):
    inputs = some_inputs(2500, 2056, [512, 16384, 5001], options)
    ours = run_softmax(Fused, inputs, torch.float32, WANTED[want])
    exact = run_softmax(Defined, inputs, torch.float64, WANTED[want] and torch.float64)
    naive = run_softmax(Defined, inputs, torch.float32, WANTED[want])
    assert not ours.overflow
    assert_all_as_good(ours.tensors(), exact.tensors(), naive.tensors())
    again = run_softmax(Fused, inputs, torch.float32, WANTED[want])
    assert all(map(torch.equal, *(map(Tensor.nan_to_num, r.tensors()) for r in (ours, again))))
    statistics = some_statistics(inputs)
    ours = run_grad_logits(True, inputs, *statistics, torch.float32, HALF)
    exact = run_grad_logits(False, inputs, *statistics, torch.float64, torch.float64)
    naive = run_grad_logits(False, inputs, *statistics, torch.float32, HALF)
    assert_all_as_good([ours], [exact], [naive])


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
@pytest.mark.gpu
def test_the_last_rows_of_more_than_2_to_the_31_elements_are_as_of_a_small_block():
    skip_without_memory(10)
    n, v, D = 2**17 + 128, 16448, 64
    hidden = torch.randn(n, D, device=DEVICE).to(HALF)
    weight = torch.randn(v, D, device=DEVICE).to(HALF)
    target = torch.randint(0, v, (n,), device=DEVICE)
    options, out = LogitOptions(0, None, 0.1, None), hidden.new_empty(n, v)

    def results(hidden, target, out):
        running = RunningSoftmax.start(len(target), hidden.new_empty(0, dtype=torch.float32))
        running.peak.zero_()
        overflow = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        block = head_gemm.online_softmax(hidden, weight, options, target, running, out)
        weights = out[-128:].clone()
        head_gemm.merge(block, running, None, overflow)
        lse = torch.stack([running.peak + 9, 0 * running.peak])
        head_gemm.grad_logits(hidden, weight, options, target, lse, 0 * lse[0] + 1, out)
        return [weights, out[-128:], *(value[-128:] for value in running[:3])]

    large = results(hidden, target, out)
    small = results(hidden[-128:], target[-128:], hidden.new_empty(128, v))
    assert all(map(torch.equal, large, small))
