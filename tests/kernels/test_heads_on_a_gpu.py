"""The heads on a GPU: what no CPU can stand in for, cuBLAS and torch's settings of it."""

import os

import pytest
import torch
from head_cases import HEADS, value_and_gradients

from fastperturb import ops
from fastperturb.ops import gemm, head, reference

# cuBLAS gives the same bits, and torch believes it, only if this is set before the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = pytest.mark.gpu
matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def settings():
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    matmul.fp32_precision = "none"
    matmul.allow_fp16_accumulation = False


def inputs_of(kind, dtype, *, vocab, frozen, tokens=150, dim=128, samples=3):
    """hidden, weight, bias and target of a head on the GPU, with three of five targets ignored."""
    shape = (tokens, dim) if kind == "logprob" else (samples, tokens, dim)
    hidden = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    weight = (3 * torch.randn(vocab, dim, device="cuda") / dim**0.5).to(dtype)
    bias = torch.randn(vocab, device="cuda").to(dtype).requires_grad_(not frozen)
    target = torch.randint(vocab, (tokens,), device="cuda")
    target[torch.arange(tokens, device="cuda") % 5 < 3] = -100
    return hidden, weight.requires_grad_(not frozen), bias, target


def oracle(kind, hidden, weight, bias, target, **options):
    exact = [
        leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (hidden, weight, bias)
    ]
    return value_and_gradients(getattr(reference, HEADS[kind]), *exact, target, **options)


def assert_near(results, exact, tolerance):
    for result, truth in zip(results, exact, strict=True):
        assert (result.double() - truth).norm() <= tolerance * truth.norm()


def set_legacy():
    torch.set_float32_matmul_precision("high")


def set_for_everything():
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("set_tf32", [set_legacy, set_for_everything], ids=lambda f: f.__name__)
def test_fp32_heads_have_the_error_of_fp32_where_the_model_may_use_tf32(set_tf32):
    set_tf32()
    for kind in HEADS:
        inputs = inputs_of(kind, torch.float32, vocab=3001, frozen=False)
        results = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
        assert_near(results, oracle(kind, *inputs), 2e-5)
    left, right = (torch.randn(512, 512, device="cuda") for _ in range(2))
    exact = left.double() @ right.double()
    assert (gemm.product(left, right) - exact).norm() <= 3e-6 * exact.norm()
    assert ((left @ right) - exact).norm() > 2e-5 * exact.norm()  # the model's own
    assert matmul.fp32_precision == "tf32"


def test_16_bit_products_run_while_tunable_ops_are_on():
    left, right = (torch.randn(64, 64, device="cuda").bfloat16() for _ in range(2))
    plain = gemm.product(left, right)
    torch.cuda.tunable.enable(True)
    try:
        again = gemm.product(left, right)
        total = gemm.add_product(plain.clone(), left, right)
        assert torch.cuda.tunable.is_enabled()
    finally:
        torch.cuda.tunable.enable(False)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(total, 2 * plain)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_fp16_heads_sum_in_fp32_where_the_model_may_sum_in_fp16(kind, frozen):
    inputs = inputs_of(kind, torch.float16, vocab=3001, frozen=frozen)
    plain = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
    matmul.allow_fp16_accumulation = True
    again = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
    assert all(map(torch.equal, plain, again))
    assert matmul.allow_fp16_accumulation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_add_up_over_the_blocks(rows, dtype):
    """cuBLASLt, which takes a total of one row for a bias, is not to add it twice or not at all."""
    left, right = (torch.randn(shape, device="cuda").to(dtype) for shape in ((rows, 64), (64, 128)))
    total = gemm.add_product(gemm.add_product(None, left, right), left, right)
    exact = 2 * (left.double() @ right.double())
    assert (total - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_the_labelled_tokens_alone_give_the_same_results(kind, dtype, frozen):
    inputs = inputs_of(kind, dtype, vocab=3001, frozen=frozen)
    labelled = (inputs[-1] != -100).nonzero()[:, 0]
    op, exact = getattr(ops, HEADS[kind]), oracle(kind, *inputs)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert_near(value_and_gradients(op, *inputs), exact, tolerance)
    assert_near(value_and_gradients(op, *inputs, labelled=labelled), exact, tolerance)


@pytest.mark.parametrize("kind", HEADS)
def test_fp16_gradients_survive_tiny_upstream_gradients(kind):
    hidden, weight, bias, target = inputs_of(kind, torch.float16, vocab=3001, frozen=False)
    value = getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    exact_value = getattr(reference, HEADS[kind])(*exact[:2], target, bias=exact[2])
    upstream = torch.randn_like(value) / 64
    results = torch.autograd.grad(value, (hidden, weight, bias), upstream)
    right = torch.autograd.grad(exact_value, exact, upstream.double())
    # Many lie where fp16's own step, 6e-8, would be an error of several percent.
    assert_near(results, [truth.half().double() for truth in right], 5e-3)


@pytest.mark.parametrize("kind", HEADS)
def test_under_autocast_one_cast_serves_many_calls_and_the_gradient_is_fp32(kind):
    hidden, weight, bias, target = inputs_of(kind, torch.float32, vocab=1000, frozen=False)
    op = getattr(ops, HEADS[kind])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = head.cast_weight(weight)
        results = value_and_gradients(op, hidden, weight, bias, target, cast_weight=cast)
        alone = value_and_gradients(op, hidden, weight, bias, target)
    assert cast.dtype == torch.bfloat16
    assert all(result.dtype == torch.float32 for result in results)
    rounded = [value.detach().bfloat16().float() for value in (hidden, weight)]
    rounded = [value.requires_grad_() for value in rounded]
    assert_near(results, oracle(kind, *rounded, bias, target), 1e-2)
    assert all(map(torch.equal, results, alone))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_deterministic_algorithms_raise_nothing_and_give_the_same_bits(kind, frozen):
    inputs = inputs_of(kind, torch.bfloat16, vocab=3001, frozen=frozen)
    labelled = (inputs[-1] != -100).nonzero()[:, 0]
    torch.use_deterministic_algorithms(True)
    for options in ({}, {"labelled": labelled}):
        first, again = (
            value_and_gradients(getattr(ops, HEADS[kind]), *inputs, **options) for _ in range(2)
        )
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_real_odd_vocabulary_in_several_parts_and_blocks_matches_the_oracle(frozen):
    inputs = inputs_of("logprob", torch.bfloat16, vocab=50257, frozen=frozen, tokens=13000, dim=256)
    hidden, weight, bias, target = inputs
    results = value_and_gradients(ops.linear_logprob, *inputs)
    kept = (target != -100).nonzero()[:300, 0]  # the oracle keeps all logits
    exact = reference.linear_logprob(
        hidden.double()[kept], weight.double(), target[kept], bias=bias.double()
    )
    assert (results[0][kept] - exact).norm() <= 1e-3 * exact.norm()
    assert all(torch.isfinite(result).all() for result in results)
    if not frozen:  # each row of the softmax sums to 1, so the gradients of the logits to 0
        assert results[3].double().sum().abs() <= 1e-2 * results[3].double().abs().sum()
