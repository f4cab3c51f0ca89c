"""The Triton row passes, and the heads on top of them, judged by the error of torch in fp32.

Runs on a GPU, or with TRITON_INTERPRET=1 on the CPU (see test_interpreter.py), where the 16-bit
buffers are fp16: the interpreter truncates bf16.
"""

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastperturb.kernels import head_rows
from fastperturb.kernels import perturb_embed_tiles as tiles
from fastperturb.ops import head_blocks, reference
from fastperturb.ops.head_blocks import Head, Logits, Running
from fastperturb.ops.torch import rows as torch_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
OUT = {"in place": None, "fp32": torch.float32, "16-bit": HALF}
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

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
    options: Logits
    weight: Tensor  # [v, D]


def options_of(name, v, start=START):
    bias, scale, softcap = OPTIONS[name]
    return Logits(start, torch.randn(v) if bias else None, scale, softcap)


def targets(n, v, start=START):
    """Half in the block; others just before or after it, within its last tile, or nowhere."""
    inside = torch.randint(start, start + v, (n,))
    outside = torch.tensor([start - 1, start + v, start + v + 13, -100, -(2**40), 2**40])
    return torch.where(torch.arange(n) % 2 == 0, inside, outside[torch.randint(6, (n,))])


def converted(value, dtype, device):
    """A copy of tensors, lists and named tuples, with floating point in `dtype`."""
    if isinstance(value, list):
        return [converted(each, dtype, device) for each in value]
    if isinstance(value, tuple):
        return value._make(converted(each, dtype, device) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None, copy=True)


def buffer_for(products, dtype):
    """Where a pass writes: over the products (None), or over NaN."""
    return products if dtype is None else torch.full_like(products, torch.nan, dtype=dtype)


def three_ways(run, given, out_dtype=None):
    """run(rows, given, out_dtype): ours, torch's in fp64, and torch's in fp32."""
    ours = run(head_rows, converted(given, torch.float32, DEVICE), out_dtype)
    exact = run(torch_rows, converted(given, torch.float64, "cpu"), None)
    naive = run(torch_rows, converted(given, torch.float32, "cpu"), out_dtype)
    return converted(ours, None, "cpu"), exact, naive


def assert_close(ours, exact, naive):
    for mine, truth, other in zip(ours, exact, naive, strict=True):
        assert mine.shape == truth.shape and mine.dtype == other.dtype
        assert torch.equal(mine.isnan(), truth.isnan())
        error, limit = ((x.double() - truth).abs().nan_to_num().max() for x in (mine, other))
        eps = EPS[other.dtype] * truth.abs().nan_to_num().max()
        assert error <= 2 * limit + eps, f"error {error:.2e}, torch {limit:.2e}, eps {eps:.2e}"


def gathered(rows, given, out_dtype):
    """The running state, total, and each block's weights after all blocks."""
    target, total, entropy, *blocks = given
    running = Running.start(len(target), blocks[0].products, entropy=entropy)
    all_weights = []
    for block in blocks:
        weights = buffer_for(block.products, out_dtype)
        rows.gather(block.products, block.options, target, running, weights, total)
        total += weights.to(total.dtype) @ block.weight
        all_weights.append(weights)
    return [each for each in running if each is not None] + [total] + all_weights


def pulled(rows, given, out_dtype):
    out = buffer_for(given[0], out_dtype)
    rows.pull(*given, out)
    return [out]


def coupled(rows, given, out_dtype):
    rows.couple(*given)
    return [given[-1]]


def quadratic_pulled(rows, given, out_dtype):
    out = buffer_for(given[0], out_dtype)
    rows.quadratic_pull(*given, out)
    return [out]


def blocks_of(n, widths, options, D=24, size=3.0):
    """Blocks of one vocabulary, one after the other."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [
        Block(size * torch.randn(n, v), options_of(options, v, start), torch.randn(v, D))
        for v, start in zip(widths, starts)
    ]


def some_rows(n, v, options, size=3.0):
    """products, options, target, lse and an upstream gradient that is 0 for one row in three."""
    given = size * torch.randn(n, v), options_of(options, v), targets(n, v)
    lse = torch_rows._logits(*given[:2])[0].logsumexp(-1) + torch.rand(n)
    lse = torch.stack([lse, torch.randn(n) / 100])
    return [*given, lse, torch.randn(n) * (torch.arange(n) % 3 != 1)]


def some_samples(M, n, v, options, size=3.0):
    """products, options, target, lse, row weights, dots and upstream gradients."""
    products, logits = size * torch.randn(M, n, v), options_of(options, v)
    lse = torch_rows._logits(products, logits)[0].logsumexp(-1) + torch.rand(M, n)
    lse = torch.stack([lse, torch.randn(M, n) / 100])
    rest = torch.rand(M, n) + 0.5, torch.randn(M, n), torch.randn(n) * (torch.arange(n) % 3 != 1)
    return [products, logits, targets(n, v), lse, *rest]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(1, [1]), (7, [63, 128, 5]), (3, [300, 16400])], ids=str)
def test_gather_takes_in_block_after_block_as_well_as_torch(shape, options, entropy, out):
    n, widths = shape
    blocks = blocks_of(n, widths, options)
    given = [targets(n, sum(widths), 0), torch.zeros(n, 24), entropy, *blocks]
    assert_close(*three_ways(gathered, given, out))


def test_without_buffers_gather_finds_the_same_statistics():
    (block,) = blocks_of(5, [600], "everything")
    target = targets(5, 600, 0).to(DEVICE)
    found = []
    for want in (True, False):
        products, options, _ = converted(block, torch.float32, DEVICE)
        running = Running.start(5, products, entropy=True)
        buffers = (torch.empty_like(products), products.new_zeros(5, 24)) if want else (None, None)
        head_rows.gather(products, options, target, running, *buffers)
        found.append(running)
    for one, other in zip(*found):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_blocks_of_minus_infinity_weigh_nothing_before_and_after_others():
    """Whole blocks, all words but one, and all words but the target."""
    blocks = blocks_of(4, [40, 40, 40], "plain")
    for block in blocks:
        block.products[:3] = -torch.inf
    blocks[1].products[0] = torch.randn(40)
    blocks[1].products[1, 7] = 5.0
    blocks[2].products[2, 9] = -5.0
    given = [torch.tensor([45, 3, 89, 100]), torch.zeros(4, 24), True, *blocks]
    ours, exact, naive = three_ways(gathered, given)
    assert_close(ours, exact, naive)
    assert all(each[[0, 2, 3]].isfinite().all() for each in ours)
    assert ours[2].tolist()[1] == -torch.inf and (ours[5][:3] == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_stay_finite(size):
    blocks = blocks_of(6, [70, 70], "plain", size=size)
    given = [torch.randint(0, 140, (6,)), torch.zeros(6, 24), True, *blocks]
    results = three_ways(gathered, given)
    assert_close(*results)
    assert all(each.isfinite().all() for each in results[0])


def test_a_nan_logit_reaches_all_that_depends_on_it_and_no_other_row():
    blocks = blocks_of(4, [40, 40], "plain")
    blocks[0].products[0, 3] = torch.nan
    blocks[1].products[1, 3] = torch.nan
    blocks[0].products[2, 3] = torch.nan  # the target's
    given = [torch.tensor([50, 50, 3, 9]), torch.zeros(4, 24), True, *blocks]
    peak, others, at_target, spread, total, *_ = three_ways(gathered, given)[0]
    log_probs, _, sums = Running(peak, others, at_target, spread).finish()
    assert log_probs.isnan().tolist() == sums.isnan().tolist() == [True, True, True, False]
    assert (at_target >= peak).tolist()[:3] == [False] * 3
    assert total.isnan().any(1)[[0, 1, 3]].tolist() == [True, True, False]


def test_a_tie_with_the_target_is_a_hit_and_a_higher_logit_is_not():
    products = torch.randn(3, 500)
    products[:, 480] = products[:, 77] = 9.0
    products[1, 3], products[2, 200] = 9.1, 8.9
    for _, scale, softcap in OPTIONS.values():
        signed = products if scale > 0 else -products
        block = Block(signed, Logits(0, None, scale, softcap), torch.zeros(500, 24))
        given = [torch.tensor([77, 77, 480]), torch.zeros(3, 24), False, block]
        peak, _, at_target, *_ = three_ways(gathered, given)[0]
        assert (at_target >= peak).tolist() == [True, False, True]


@pytest.mark.parametrize("softcap", [1e-2, 5.0, 1e5])
def test_soft_caps_cost_no_precision_whatever_their_size(softcap):
    block = blocks_of(6, [900], "plain")[0]._replace(options=Logits(0, None, 1.0, softcap))
    block.products[:, ::2] *= 1e-3
    given = [torch.randint(0, 900, (6,)), torch.zeros(6, 24), True, block]
    assert_close(*three_ways(gathered, given))


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_pull_is_as_good_as_torch(shape, options, out):
    assert_close(*three_ways(pulled, some_rows(*shape, options), out))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_couple_adds_what_torch_adds(shape, options):
    given = some_samples(*shape, options)
    crossed = torch.rand(shape[:2])
    assert_close(*three_ways(coupled, [*given[:2], *given[3:5], crossed]))


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_quadratic_pull_is_as_good_as_torch(shape, options, out):
    assert_close(*three_ways(quadratic_pulled, some_samples(*shape, options), out))


@pytest.mark.parametrize("options", ["plain", "soft-capped"])
def test_rows_without_upstream_gradients_give_zeros_whatever_their_logits(options):
    rows, samples = some_rows(3, 70, options, 1e4), some_samples(3, 3, 70, options, 1e4)
    for run, given in ((pulled, rows), (quadratic_pulled, samples)):
        given[3][..., [0, 2]] = 0.0  # lse, as of ignored rows
        given[-1] = torch.tensor([0.0, torch.nan, 0.0])
        out = run(head_rows, converted(given, torch.float32, DEVICE), None)[0]
        assert (out[..., [0, 2], :] == 0).all() and out[..., 1, :].isnan().all()


def test_the_same_inputs_give_the_same_bits():
    blocks = blocks_of(5, [700, 16400], "everything")
    cases = [
        (gathered, [targets(5, 17100, 0), torch.zeros(5, 24), True, *blocks]),
        (pulled, some_rows(5, 2500, "everything")),
        (quadratic_pulled, some_samples(5, 3, 2500, "everything")),
        (coupled, [*(given := some_samples(5, 3, 2500, "plain"))[:2], *given[3:5], given[5]]),
    ]
    for run, given in cases:
        first, again = (run(head_rows, converted(given, torch.float32, DEVICE), None) for _ in "ab")
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, again))


def test_no_rows_and_no_tokens_are_fine():
    blocks, samples = blocks_of(0, [40], "plain"), some_samples(3, 0, 40, "plain")
    cases = [
        (gathered, [torch.empty(0, dtype=torch.int64), torch.zeros(0, 24), True, *blocks]),
        (pulled, some_rows(0, 40, "plain")),
        (quadratic_pulled, samples),
        (coupled, [*samples[:2], *samples[3:6]]),
    ]
    for run, given in cases:
        run(head_rows, converted(given, torch.float32, DEVICE), None)


HEADS = {
    "plain": {},
    "everything": {"softcap": 4.0, "logit_scale": 1.7, "valid_vocab": 253, "ignore_index": -1},
}


@pytest.fixture(params=["one block", "many"])
def budget(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setitem(head_blocks.BLOCK_BYTES, DEVICE, 64 * 4 * 16)
        monkeypatch.setitem(head_blocks.BLOCK_ROWS, DEVICE, 16)
        monkeypatch.setitem(head_blocks.HELD_BYTES, DEVICE, 3 * 4 * 260 * 5)


def head_of(
    rows, weight, bias, *, softcap=None, logit_scale=1.0, valid_vocab=260, ignore_index=-100
):
    return Head(rows, weight, bias, logit_scale, softcap, valid_vocab, ignore_index)


def through_the_head(rows, given, options):
    """Values, the frozen head's pull times the upstream gradient, and all gradients."""
    hidden, weight, bias, target, upstream, row_weights = given
    head, wanted = head_of(rows, weight, bias, **options), (True, True, True)
    if hidden.ndim == 2:
        found = head_blocks.linear_logprob(head, hidden, target, want_pull=True, want_entropy=False)
        saved = hidden, target, found.lse
        grads = head_blocks.linear_logprob_backward(head, upstream, *saved, wanted)
        return [found.log_probs, found.pull * upstream[:, None], *grads]
    found = head_blocks.linear_quadratic(head, hidden, target, row_weights, want_pull=True)
    saved = hidden, target, row_weights, found.lse, found.dots
    grads = head_blocks.linear_quadratic_backward(head, upstream, *saved, wanted)
    return [found.values, found.pull * upstream[:, None], *grads]


def through_the_oracle(given, options):
    hidden, weight, bias, target, upstream, row_weights = given
    leaves = [each.double().requires_grad_() for each in (hidden, weight, bias)]
    if hidden.ndim == 2:
        value = reference.linear_logprob(*leaves[:2], target, bias=leaves[2], **options)
    else:
        weighted = {**options, "row_weights": row_weights.double()}
        value = reference.linear_quadratic(*leaves[:2], target, bias=leaves[2], **weighted)
    grads = torch.autograd.grad(value, leaves, upstream.double())
    return [value.detach(), grads[0], *grads]


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lead", [(37,), (5, 11)], ids=["logprob", "quadratic"])
def test_the_heads_are_as_close_to_the_oracle_as_torchs(lead, options):
    target = torch.randint(0, 253, (lead[-1],))
    target[1::4] = options.get("ignore_index", -100)
    given = [torch.randn(*lead, 16), torch.randn(260, 16), torch.randn(260), target]
    given += [torch.randn(lead[-1]), torch.rand(lead) + 0.5]
    ours, naive = (
        through_the_head(rows, converted(given, torch.float32, device), options)
        for rows, device in ((head_rows, DEVICE), (torch_rows, "cpu"))
    )
    assert_close(converted(ours, None, "cpu"), through_the_oracle(given, options), naive)


@pytest.mark.skipif(not INTERPRETED, reason="the next test does it in full")
def test_rows_beyond_2_to_the_31_elements_are_reached(tmp_path, monkeypatch):
    """A lazily mapped block, of which only the last program runs."""
    from triton.runtime.interpreter import interpreter_builder

    n, v, D = 2**20 + 1, 2048, 2049  # total's last row lies beyond 2^31 as well
    products = torch.from_file(str(tmp_path / "products"), shared=True, size=n * v).view(n, v)
    total = torch.from_file(str(tmp_path / "total"), shared=True, size=n * D).view(n, D)
    launch = tiles.launch

    def launch_last(kernel, grid, arguments, **options):
        last = grid[0] - 1
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *grid: None)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *index: None)
        interpreter_builder.grid_dim, interpreter_builder.grid_idx = (last + 1, 1, 1), (last, 0, 0)
        launch(kernel, (1,), arguments, **options)

    monkeypatch.setattr(tiles, "launch", launch_last)
    logits = torch.randn(v)
    q = (logits - logits.max()).exp()
    options, target = Logits(0, None, 1.0, None), torch.full((n,), -100)
    products[-1], total[-1] = logits, 1.0
    running = Running.start(n, products)
    running.peak[-1] = logits.max() - 1
    head_rows.gather(products, options, target, running, products, total)
    torch.testing.assert_close(products[-1], q)
    torch.testing.assert_close(total[-1], torch.full((D,), -1.0).exp())

    products[-1] = logits
    lse, ones = torch.stack([logits.logsumexp(0).expand(n), torch.zeros(n)]), torch.ones(n)
    head_rows.pull(products, options, target, lse, ones, products)
    torch.testing.assert_close(products[-1], -logits.softmax(0))

    tokens = n // 2  # two samples of half the rows
    products = products[: 2 * tokens].view(2, tokens, v)
    products[:, -1] = torch.stack([logits, logits.flip(0)])
    p = products[:, -1].softmax(-1)
    ones, lse = torch.ones(2, tokens), lse[:, : 2 * tokens].reshape(2, 2, tokens)
    given = products, options, target[:tokens], lse, ones
    crossed = torch.zeros(2, tokens)
    head_rows.couple(*given[:2], *given[3:], crossed)
    head_rows.quadratic_pull(*given, 0 * ones, ones[0], products)
    torch.testing.assert_close(products[:, -1], -p[0] * p[1] * ones[:, :1])
    torch.testing.assert_close(crossed[:, -1], (p[0] * p[1]).sum() * ones[:, 0])


@pytest.mark.skipif(INTERPRETED, reason="too big to interpret")
@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.gpu
def test_real_blocks_are_as_good_as_torch(options, out):
    blocks = blocks_of(2048, [16384, 21376], options, D=512)
    given = [targets(2048, 37760, 0), torch.zeros(2048, 512), True, *blocks]
    assert_close(*three_ways(gathered, given, out))
    assert_close(*three_ways(pulled, some_rows(2048, 16384, options), out))
    assert_close(*three_ways(quadratic_pulled, some_samples(8, 40, 16384, options), out))
    given = some_samples(8, 40, 16384, options)
    assert_close(*three_ways(coupled, [*given[:2], *given[3:6]]))


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
@pytest.mark.gpu
def test_blocks_of_more_than_2_to_the_31_elements():
    n, v = 2**17 + 3, 16400
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    products = torch.zeros(n, v, device=DEVICE)
    tail = torch.randn(3, v, device=DEVICE)
    options = Logits(0, None, 1.0, None)
    target = torch.randint(0, v, (n,), device=DEVICE)
    for run in (gathered, pulled):
        products[-3:] = tail
        states = []
        for block, y in ((products, target), (tail.clone(), target[-3:])):
            if run is gathered:
                state = Running.start(len(y), block)
                head_rows.gather(block, options, y, state, block, None)
                states.append([block[-3:], state.peak[-3:], state.others[-3:]])
            else:
                ones = block.new_ones(len(y))
                head_rows.pull(block, options, y, 10 * ones, ones, block)
                states.append([block[-3:]])
        assert all(torch.equal(x, y) for x, y in zip(*states))
