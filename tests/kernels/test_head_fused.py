"""linear_logprob by the fused GEMM, judged by the error of the row passes against the oracle."""

import pytest
import torch
from kernel_oracle import DEVICE, HALF, INTERPRETED, MARKS, assert_as_good

from fastperturb.kernels import head_gemm, head_rows, launch
from fastperturb.ops import head_blocks, head_gradients, reference
from fastperturb.ops.head_blocks import Head
from fastperturb.ops.head_geometry import Geometry
from fastperturb.ops.head_gradients import Wanted
from fastperturb.ops.head_labels import Labels

pytestmark = MARKS

# Three parts of the rows and several blocks, all of them padded.
GEOMETRY = Geometry(
    block_bytes=4 * 32 * 128,
    most_rows=32,
    most_entries=128,
    held_bytes=2**20,
    gathered_rows=50,
    padding=64,
    narrow=True,
)
OPTIONS = {
    "plain": {},
    "everything": {"softcap": 20.0, "logit_scale": 1.3, "valid_vocab": 353, "ignore_index": -1},
}
# Weights of a softmax in fp16, the interpreter's dtype, are never fused.
FUSES_WEIGHTS = not INTERPRETED


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(head_blocks, "_FIRST_ENTRIES", 64)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that have been launched."""
    names, start = [], launch.start

    def record(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        start(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "start", record)
    return names


def inputs_of(options, size=1.0):
    """hidden, weight and bias, targets of which some are ignored, and upstream gradients."""
    target = torch.randint(0, 350, (80,))
    target[::7] = options.get("ignore_index", -100)
    weight = size * torch.randn(360, 72) / 72**0.5
    matrices = [value.to(DEVICE, HALF) for value in (torch.randn(80, 72), weight)]
    return [*matrices, *(x.to(DEVICE) for x in (torch.randn(360), target, torch.randn(80)))]


def by_the_head(
    fused, inputs, *, logit_scale=1.0, softcap=None, valid_vocab=360, ignore_index=-100, **want
):
    """Values and what is wanted of the forward, and all gradients of the backward."""
    hidden, weight, bias, target, upstream = inputs
    options = logit_scale, softcap, valid_vocab, torch.float32, GEOMETRY, fused
    head, labels = Head(head_rows, weight, bias, *options), Labels.of(target, ignore_index, None)
    want = {"want_grad_hidden": False, "want_entropy": False} | want
    result = head_blocks.linear_logprob(head, hidden, labels, **want)
    wanted = Wanted(True, True, True)
    rows = upstream.clone(), hidden, labels, result.lse, wanted
    grads = head_gradients.linear_logprob_backward(head, *rows)
    values = [result.log_probs, result.entropy, result.grad_hidden, *grads]
    return [value.cpu() for value in values if value is not None]


def by_the_oracle(inputs, options):
    *leaves, target, upstream = (x.double() if x.is_floating_point() else x for x in inputs)
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    value = reference.linear_logprob(hidden, weight, target, bias=bias, **options)
    grads = torch.autograd.grad(value, [hidden, weight, bias], upstream, retain_graph=True)
    own = torch.autograd.grad(value.sum(), hidden)
    return [x.detach().cpu() for x in (value, *own, *grads)]


@pytest.mark.parametrize("want_grad_hidden", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_fused_head_is_as_close_to_the_oracle_as_the_row_passes(
    options, want_grad_hidden, launched
):
    inputs = inputs_of(options)
    want = {"want_grad_hidden": want_grad_hidden}
    naive = by_the_head(None, inputs, **options, **want)
    assert "head_gemm_kernel" not in launched
    launched.clear()
    ours = by_the_head(head_gemm, inputs, **options, **want)
    assert "grad_logits_kernel" not in launched
    assert ("merge_kernel" in launched) == (FUSES_WEIGHTS or not want_grad_hidden)
    exact = by_the_oracle(inputs, options)
    if not want_grad_hidden:
        del exact[1]
    for result, truth, other in zip(ours, exact, naive, strict=True):
        assert_as_good(result, truth, other, eps=2e-6 if result is ours[0] else 1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_rows_whose_logits_rise_too_far_are_done_again_by_the_row_passes(launched):
    inputs = inputs_of({}, size=0.1)
    inputs[0][:20] *= 10
    inputs[1][150:] *= 50
    expected = by_the_head(None, inputs)[0]
    launched.clear()
    values = by_the_head(head_gemm, inputs)[0]
    assert torch.equal(values[:20], expected[:20])
    assert launched.count("online_softmax_kernel") > launched.count("finish_logprob_kernel")
    torch.testing.assert_close(values, expected)


def test_an_entropy_is_not_fused(launched):
    by_the_head(head_gemm, inputs_of({}), want_entropy=True)
    assert "merge_kernel" not in launched
