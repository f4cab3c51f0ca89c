"""The heads against the fp64 oracle, with random upstream gradients, chunked at every size."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fastperturb import ops
from fastperturb.ops import reference, torch_head

HEADS = {"logprob": "linear_logprob", "quadratic": "linear_quadratic"}
OPTIONS = {
    "plain": {},
    "soft-capped": {"softcap": 5.0},
    "scaled": {"logit_scale": 0.3},
    "padded": {"valid_vocab": 23},
    "everything": {"softcap": 4.0, "logit_scale": 1.7, "valid_vocab": 23, "ignore_index": -1},
}


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"{rows} rows a chunk")
def chunk(request, monkeypatch):
    monkeypatch.setattr(torch_head, "CHUNK_BYTES", request.param * 30 * 8)


def head_inputs(kind, *, dtype=torch.float64, tokens=9, bias=True, ignore_index=-100):
    torch.manual_seed(0)
    shape = (tokens, 8) if kind == "logprob" else (3, tokens, 8)
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(30, 8).to(dtype).requires_grad_()
    offset = torch.randn(30).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, 23, (tokens,))
    target[1::4] = ignore_index
    return hidden, weight, offset, target


def value_and_gradients(op, hidden, weight, bias, target, **options):
    value = op(hidden, weight, target, bias=bias, **options)
    torch.manual_seed(1)
    upstream = torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    return [value, *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradients_are_the_oracles(kind, options, bias):
    given = head_inputs(kind, bias=bias, ignore_index=options.get("ignore_index", -100))
    ours = value_and_gradients(getattr(ops, HEADS[kind]), *given, **options)
    oracle = value_and_gradients(getattr(reference, HEADS[kind]), *given, **options)
    for mine, right in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_low_precision_errs_no_more_than_naive_torch(kind, dtype):
    hidden, weight, bias, target = head_inputs(kind, dtype=dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    right = value_and_gradients(getattr(reference, HEADS[kind]), *exact, target)
    ours = value_and_gradients(getattr(ops, HEADS[kind]), hidden, weight, bias, target)

    def naive(hidden, weight, target, *, bias):
        scores = hidden @ weight.T + bias
        kept = target != -100
        index = target.clamp_min(0)
        if kind == "logprob":
            return -F.cross_entropy(scores, target, reduction="none")
        probs = scores.softmax(-1)
        hit = probs.gather(2, index.expand(3, -1)[..., None])[..., 0]
        pairs = [(probs[i] * probs[j]).sum(-1) for i, j in itertools.permutations(range(3), 2)]
        return (2 * hit.mean(0) - sum(pairs) / 6).where(kept, 0.0)

    plain = value_and_gradients(naive, hidden, weight, bias, target)
    for mine, other, truth in zip(ours, plain, right, strict=True):
        size = truth.norm()
        error, allowance = (mine - truth).norm() / size, (other - truth).norm() / size
        assert error <= 2 * allowance + torch.finfo(dtype).eps
    assert ours[0].dtype == torch.float32


def test_the_log_probs_of_the_quadratic_op_are_differentiable_too():
    hidden, weight, bias, target = head_inputs("quadratic")
    value, log_probs = ops.linear_quadratic(
        hidden, weight, target, bias=bias, return_log_probs=True
    )
    each = [reference.linear_logprob(sample, weight, target, bias=bias) for sample in hidden]
    expected = torch.stack(each)
    torch.testing.assert_close(log_probs, expected)
    upstream, pull = torch.randn_like(value), torch.randn_like(log_probs)
    leaves = [hidden, weight, bias]
    ours = torch.autograd.grad([value, log_probs], leaves, [upstream, pull])
    plain = reference.linear_quadratic(hidden, weight, target, bias=bias)
    right = torch.autograd.grad([plain, expected], leaves, [upstream, pull])
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", HEADS)
def test_frozen_weights_get_no_gradient_and_the_same_hidden_gradient(kind):
    hidden, weight, bias, target = head_inputs(kind)
    op = getattr(ops, HEADS[kind])
    upstream = torch.randn(9, dtype=torch.float64)
    full = torch.autograd.grad(op(hidden, weight, target, bias=bias), hidden, upstream)[0]
    frozen = op(hidden, weight.detach(), target, bias=bias.detach())
    frozen.backward(upstream)
    torch.testing.assert_close(hidden.grad, full)
    assert weight.grad is None and bias.grad is None


@pytest.mark.parametrize("kind", HEADS)
def test_ignored_rows_are_zero_and_pass_no_gradient(kind):
    hidden, weight, bias, target = head_inputs(kind)
    value = getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias)
    value.backward(torch.randn_like(value))
    ignored = target == -100
    assert (value[ignored] == 0).all()
    assert (hidden.grad[..., ignored, :] == 0).all()
    assert (hidden.grad[..., ~ignored, :] != 0).any(-1).all()


@pytest.mark.parametrize("kind", HEADS)
def test_a_batch_without_labels_gives_zeros(kind):
    hidden, weight, bias, target = head_inputs(kind)
    value = getattr(ops, HEADS[kind])(hidden, weight, target.fill_(-100), bias=bias)
    value.sum().backward()
    assert (value == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("kind", HEADS)
def test_no_tokens_and_one_token_work(kind, tokens):
    hidden, weight, bias, target = head_inputs(kind, tokens=tokens)
    results = value_and_gradients(getattr(ops, HEADS[kind]), hidden, weight, bias, target)
    assert results[0].shape == (tokens,)
    assert all(torch.isfinite(result).all() for result in results)


def test_huge_logits_stay_finite_and_no_log_prob_is_positive():
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.eye(4)[torch.tensor([0, 0, 1, 2])] * torch.tensor([[1.0], [1], [-1], [1]])
    value = ops.linear_logprob(hidden, weight, torch.tensor([0, 2]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(hidden.grad).all()
    assert (value <= 0).all()


def test_adding_a_constant_to_all_logits_changes_nothing():
    hidden, weight, bias, target = head_inputs("logprob")
    shifted = ops.linear_logprob(hidden, weight, target, bias=bias + 3.0)
    torch.testing.assert_close(shifted, ops.linear_logprob(hidden, weight, target, bias=bias))


def test_quadratic_does_not_depend_on_the_order_of_samples():
    hidden, weight, bias, target = head_inputs("quadratic")
    one = ops.linear_quadratic(hidden, weight, target, bias=bias)
    other = ops.linear_quadratic(hidden[[2, 0, 1]], weight, target, bias=bias)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", HEADS)
def test_autocast_outside_does_not_lower_the_precision_inside(kind):
    given = head_inputs(kind, dtype=torch.float32)
    op = getattr(ops, HEADS[kind])
    plain = value_and_gradients(op, *given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradients(op, *given)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_the_registration_passes_opcheck(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind)
    if frozen:
        weight, bias = weight.detach(), None
    op = getattr(torch.ops.fastperturb, HEADS[kind]).default
    torch.library.opcheck(op, (hidden, weight, target, bias, 0.7, 5.0, 23, -100))


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_it_compiles_into_one_graph_forward_and_backward(kind):
    given = head_inputs(kind, dtype=torch.float32)
    op = getattr(ops, HEADS[kind])
    eager = value_and_gradients(op, *given)
    compiled = value_and_gradients(torch.compile(op, fullgraph=True), *given)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(8)}, ValueError, "hidden must be floating point"),
        ({"weight": torch.zeros(30, 7)}, ValueError, r"weight must be .* D = 8.*\[30, 7\]"),
        ({"target": torch.zeros(9)}, ValueError, r"target must be int64 \[N\] = \[9\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target .*\[4\]"),
        ({"target": torch.full((9,), 30)}, IndexError, r"lie in \[0, 30\), got 30 at row 0"),
        ({"target": torch.full((9,), -1)}, IndexError, "got -1 at row 0"),
        ({"bias": torch.zeros(29)}, ValueError, r"bias must be floating point \[V\] = \[30\]"),
        ({"valid_vocab": 31}, ValueError, r"valid_vocab must lie in \[1, V = 30\], got 31"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0 or None, got 0.0"),
        ({"weight": torch.zeros(30, 8, device="meta")}, ValueError, "weight lies on meta"),
    ],
)
def test_bad_arguments_are_refused_by_name(kind, changes, error, message):
    hidden, weight, bias, target = head_inputs(kind)
    given = {"hidden": hidden, "weight": weight, "bias": bias, "target": target, **changes}
    with pytest.raises(error, match=message):
        getattr(ops, HEADS[kind])(**given)


def test_the_quadratic_equation_refuses_a_single_sample():
    hidden, weight, bias, target = head_inputs("quadratic")
    with pytest.raises(ValueError, match=r"M >= 2 independent samples.*\[1, 9, 8\]"):
        ops.linear_quadratic(hidden[:1], weight, target, bias=bias)
