"""The heads against the fp64 oracle, with random upstream gradients, in blocks of every size."""

import itertools

import pytest
import torch
from head_cases import HEADS, D, M, N, V, budget, head_inputs, small_geometry, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastperturb import ops
from fastperturb.ops import head_blocks, head_gradients, reference
from fastperturb.ops.head_labels import Labels
from fastperturb.ops.torch import rows as torch_rows

OPTIONS = {
    "plain": {},
    "soft-capped": {"softcap": 5.0},
    "scaled": {"logit_scale": 0.3},
    "padded": {"valid_vocab": 143},
    "everything": {"softcap": 4.0, "logit_scale": 1.7, "valid_vocab": 143, "ignore_index": -1},
}


@pytest.fixture(params=[(1, 64), (16, 64), (1000, 1000)], ids="{0[0]} x {0[1]} blocks".format)
def blocks(request):
    with budget(*request.param):
        yield


def naive(kind):
    """Return the op as a user would write it, in the dtype of its inputs."""

    def logits(hidden, weight, bias, logit_scale=1.0, softcap=None, valid_vocab=None):
        scores = F.linear(hidden, weight, bias)[..., :valid_vocab] * logit_scale
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    def logprob(hidden, weight, target, *, bias, ignore_index=-100, **options):
        scores = logits(hidden, weight, bias, **options)
        return -F.cross_entropy(scores, target, reduction="none", ignore_index=ignore_index)

    def quadratic(hidden, weight, target, *, bias, ignore_index=-100, **options):
        probs = logits(hidden, weight, bias, **options).softmax(-1)
        index = target.where(target != ignore_index, 0).expand(M, -1)[..., None]
        pairs = [(probs[i] * probs[j]).sum(-1) for i, j in itertools.permutations(range(M), 2)]
        value = 2 * probs.gather(2, index)[..., 0].mean(0) - sum(pairs) / (M * (M - 1))
        return value.where(target != ignore_index, 0.0)

    return logprob if kind == "logprob" else quadratic


def assert_as_good_as_naive(kind, inputs, **options):
    hidden, weight, bias, target = inputs
    exact = [
        None if leaf is None else leaf.detach().double().requires_grad_(leaf.requires_grad)
        for leaf in (hidden, weight, bias)
    ]
    right = value_and_gradients(getattr(reference, HEADS[kind]), *exact, target, **options)
    ours = value_and_gradients(getattr(ops, HEADS[kind]), *inputs, **options)
    plain = value_and_gradients(naive(kind), *inputs, **options)
    for mine, other, truth in zip(ours, plain, right, strict=True):
        error, allowance = (mine - truth).norm(), (other - truth).norm()
        assert error <= 2 * allowance + torch.finfo(hidden.dtype).eps * truth.norm()
    assert ours[0].dtype == torch.float32
    assert [grad.dtype for grad in ours[1:]] == [grad.dtype for grad in plain[1:]]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradients_are_the_oracles(kind, options, bias, frozen):
    inputs = head_inputs(kind, bias=bias, frozen=frozen)
    ours = value_and_gradients(getattr(ops, HEADS[kind]), *inputs, **options)
    oracle = value_and_gradients(getattr(reference, HEADS[kind]), *inputs, **options)
    for mine, right in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_fp32_errs_no_more_than_naive_torch(kind, options, frozen):
    inputs = head_inputs(kind, dtype=torch.float32, frozen=frozen, bias=bool(options))
    assert_as_good_as_naive(kind, inputs, **options)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_half_precision_errs_no_more_than_naive_torch(kind, dtype, frozen):
    assert_as_good_as_naive(kind, head_inputs(kind, dtype=dtype, frozen=frozen))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", HEADS)
def test_ignored_rows_are_zero_and_pass_no_gradient(kind, share, frozen):
    inputs = head_inputs(kind, dtype=torch.float32, frozen=frozen, ignored=share)
    value, grad, *others = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
    ignored = inputs[-1] == -100
    assert (value[ignored] == 0).all() and (grad[..., ignored, :] == 0).all()
    assert (value[~ignored] != 0).all() and (grad[..., ~ignored, :] != 0).any(-1).all()
    assert all((other == 0).all() == (share == 1.0) for other in others)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_no_tokens_and_one_token_work(kind, frozen, tokens):
    inputs = head_inputs(kind, dtype=torch.float32, tokens=tokens, frozen=frozen, ignored=0.0)
    results = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
    assert results[0].shape == (tokens,)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("kind", HEADS)
def test_only_what_requires_a_gradient_gets_one(kind):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32)
    op = getattr(ops, HEADS[kind])
    upstream = torch.randn(N)
    leaves = [hidden, weight, bias]
    full = torch.autograd.grad(op(hidden, weight, target, bias=bias), leaves, upstream)
    for wanted in itertools.product([True, False], repeat=3):
        if any(wanted):
            for leaf, want in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(want)
            chosen = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
            some = torch.autograd.grad(op(hidden, weight, target, bias=bias), chosen, upstream)
            right = itertools.compress(full, wanted)
            for one, other in zip(some, right, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "all"])
def test_metrics_come_from_the_same_pass(options):
    hidden, weight, bias, target = head_inputs("logprob", dtype=torch.float32)
    if "ignore_index" in options:
        target = target.where(target != -100, options["ignore_index"])
    metrics = ops.linear_logprob(hidden, weight, target, bias=bias, **options, return_metrics=True)
    head = {name: value for name, value in options.items() if name != "ignore_index"}
    scores = reference.logits(hidden.double(), weight.double(), bias=bias.double(), **head)
    kept = target != options.get("ignore_index", -100)
    entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(metrics.lse, scores.logsumexp(-1).where(kept, 0.0), **close)
    torch.testing.assert_close(metrics.entropy, entropy.where(kept, 0.0), **close)
    assert torch.equal(metrics.hit, (scores.argmax(-1) == target) & kept)
    assert (
        not any(metric.requires_grad for metric in metrics[1:]) and metrics.log_probs.requires_grad
    )
    plain = ops.linear_logprob(hidden, weight, target, bias=bias, **options)
    assert torch.equal(metrics.log_probs, plain)


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_row_weights_are_constants_of_the_quadratic_estimator(frozen):
    inputs = head_inputs("quadratic", dtype=torch.float32, frozen=frozen)
    weights = torch.rand(M, N).requires_grad_()
    ours = value_and_gradients(ops.linear_quadratic, *inputs, row_weights=weights)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in inputs[:3]]
    right = value_and_gradients(
        reference.linear_quadratic, *exact, inputs[3], row_weights=weights.double()
    )
    for mine, truth in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-6)
    assert weights.grad is None


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("strata", [2, 4])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_quadratic_estimator_compares_samples_of_different_groups(frozen, strata):
    hidden, *inputs = head_inputs("quadratic", dtype=torch.float32, frozen=frozen)
    hidden = torch.randn(8, *hidden.shape[1:]).requires_grad_()
    ours = value_and_gradients(ops.linear_quadratic, hidden, *inputs, strata=strata)
    leaves = [hidden, *inputs[:2]]
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    right = value_and_gradients(reference.linear_quadratic, *exact, inputs[2], strata=strata)
    for mine, truth in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-6)


def test_the_quadratic_estimator_rejects_samples_that_are_not_two_whole_groups():
    hidden, weight, _, target = head_inputs("quadratic")
    for count, strata in ((4, 4), (6, 4)):
        with pytest.raises(ValueError, match="two or more groups of strata=4 samples"):
            samples = hidden[:1].expand(count, -1, -1)
            ops.linear_quadratic(samples, weight, target, strata=strata)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_log_probs_of_the_quadratic_op_are_differentiable_too(frozen):
    hidden, weight, bias, target = head_inputs("quadratic", frozen=frozen)
    value, log_probs = ops.linear_quadratic(
        hidden, weight, target, bias=bias, return_log_probs=True
    )
    expected = torch.stack(
        [reference.linear_logprob(sample, weight, target, bias=bias) for sample in hidden]
    )
    torch.testing.assert_close(log_probs, expected)
    upstream, upstream_log_probs = torch.randn_like(value), torch.randn_like(log_probs)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
    plain = reference.linear_quadratic(hidden, weight, target, bias=bias)
    for ours, right, grads in [
        ([value, log_probs], [plain, expected], [upstream, upstream_log_probs]),
        ([log_probs], [expected], [upstream_log_probs]),
    ]:
        mine = torch.autograd.grad(ours, leaves, grads, retain_graph=True)
        truth = torch.autograd.grad(right, leaves, grads, retain_graph=True)
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_strided_inputs_of_mixed_dtypes_match_the_oracle(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    with torch.no_grad():
        strided = [
            hidden.mT.contiguous().mT,
            weight.to(torch.bfloat16).T.contiguous().T,
            torch.stack([bias, bias], 1)[:, 0],
        ]
    strided = [
        value.requires_grad_(leaf.requires_grad)
        for value, leaf in zip(strided, (hidden, weight, bias), strict=True)
    ]
    target = torch.stack([target, target], 1)[:, 0]
    op, oracle = getattr(ops, HEADS[kind]), getattr(reference, HEADS[kind])
    for upstream in (torch.tensor(0.7).expand(N), torch.randn(2 * N)[::2]):
        leaves = [leaf for leaf in strided if leaf.requires_grad]
        ours, right = (
            torch.autograd.grad(run(*strided[:2], target, bias=strided[2]), leaves, upstream)
            for run in (op, oracle)
        )
        for mine, truth in zip(ours, right, strict=True):
            eps = 1e-2 if truth.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(mine, truth, rtol=eps, atol=eps)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_huge_logits_stay_finite_and_no_log_prob_is_positive(frozen):
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.eye(4)[torch.tensor([0, 0, 1, 2])] * torch.tensor([[1.0], [1], [-1], [1]])
    weight.requires_grad_(not frozen)
    value = ops.linear_logprob(hidden, weight, torch.tensor([0, 2]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(hidden.grad).all()
    assert (value <= 0).all()
    certain = ops.linear_logprob(
        torch.ones(1, 1), torch.tensor([[0.0], [200.0]]), torch.tensor([1])
    )
    assert certain.item() == 0.0 and not torch.signbit(-certain + 1.0).item()


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_vocabulary_entries_with_logits_of_minus_infinity_have_no_probability(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, ignored=0.0)
    alone = 100
    blocked = bias.detach().clone().fill_(-torch.inf)
    blocked[alone] = 0.5
    blocked.requires_grad_(not frozen)
    weight.requires_grad_(not frozen)
    target = target.clone().fill_(alone)
    value, *grads = value_and_gradients(getattr(ops, HEADS[kind]), hidden, weight, blocked, target)
    expected = 0.0 if kind == "logprob" else 1.0  # of one certain entry: log 1, and 2 - 1
    assert (value == expected).all() and all((grad == 0).all() for grad in grads)
    if kind == "logprob":
        impossible = ops.linear_logprob(hidden, weight, target * 0, bias=blocked)
        assert (impossible == -torch.inf).all()


@pytest.mark.usefixtures("implementation")
def test_a_scaled_loss_brings_back_fp16_gradients_of_labels_that_are_nearly_certain():
    hidden, weight, bias, _ = head_inputs("logprob", dtype=torch.float16, frozen=True)
    target = reference.logits(hidden, weight, bias=bias).argmax(-1)
    exact = hidden.detach().double().requires_grad_()
    options = {"bias": bias.double(), "logit_scale": 20.0}
    oracle = reference.linear_logprob(exact, weight.double(), target, **options)
    (unscaled,) = torch.autograd.grad(oracle.sum(), exact)
    below = (unscaled.half() == 0) & (unscaled.abs() > 1e-11)
    assert below.sum() > 10
    value = ops.linear_logprob(hidden, weight, target, bias=bias, logit_scale=20.0)
    (ours,) = torch.autograd.grad(value, hidden, torch.full_like(value, 2.0**20))
    right = (2.0**20 * unscaled)[below]
    torch.testing.assert_close(ours[below].double(), right, rtol=5e-3, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 300), st.booleans(), st.sampled_from(list(HEADS)))
def test_block_sizes_change_nothing_beyond_rounding(rows, entries, frozen, kind):
    inputs = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    whole = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
    with budget(rows, entries):
        parts = value_and_gradients(getattr(ops, HEADS[kind]), *inputs)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_logprob_is_minus_cross_entropy_and_ignores_a_constant_in_all_logits(seed, c):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    target = torch.randint(V, (5,), generator=generator)
    plain = ops.linear_logprob(hidden, weight, target)
    shifted = ops.linear_logprob(hidden, weight, target, bias=torch.full((V,), c))
    torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=2e-5)
    right = -F.cross_entropy(hidden @ weight.T, target, reduction="none")
    torch.testing.assert_close(plain, right, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(M)))
def test_the_quadratic_estimator_does_not_depend_on_the_order_of_samples(order):
    hidden, weight, bias, target = head_inputs("quadratic")
    one = ops.linear_quadratic(hidden, weight, target, bias=bias)
    other = ops.linear_quadratic(hidden[list(order)], weight, target, bias=bias)
    torch.testing.assert_close(one, other)


class Largest(TorchDispatchMode):
    """Record the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            # A view takes no memory.
            if isinstance(value, torch.Tensor) and value._base is None:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_no_tensor_is_larger_than_the_weight_and_a_frozen_head_makes_none_of_its_size(kind, frozen):
    samples, tokens, dim, vocab = 2, 64, 4, 2048
    shape = (tokens, dim) if kind == "logprob" else (samples, tokens, dim)
    hidden, weight = torch.randn(shape), torch.randn(vocab, dim)
    target = torch.randint(vocab, (tokens,))
    geometry = small_geometry(16, 128, held_bytes=4 * vocab * samples)
    head = head_blocks.Head(torch_rows, weight, None, 1.0, None, vocab, weight.dtype, geometry)
    labels = Labels.of(target, -100, None)
    run = getattr(head_blocks, HEADS[kind])
    rows = (None,) if kind == "quadratic" else ()
    metrics = {"want_entropy": True} if kind == "logprob" else {}
    with Largest() as largest:
        result = run(head, hidden, labels, *rows, want_grad_hidden=frozen, **metrics)
        assert largest.elements < vocab * dim
        if not frozen:
            saved = (result.lse,) if kind == "logprob" else (*rows, 1, result.lse, result.dot)
            backward = getattr(head_gradients, HEADS[kind] + "_backward")
            backward(
                head,
                torch.randn(tokens),
                hidden,
                labels,
                *saved,
                head_gradients.Wanted(True, True, True),
            )
            assert largest.elements == vocab * dim


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_an_infinite_upstream_gradient_does_not_reach_ignored_rows(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, frozen=frozen)
    value = getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias)
    upstream = torch.where(target == -100, torch.inf, 1.0).double()
    (grad,) = torch.autograd.grad(value, hidden, upstream)
    assert torch.isfinite(grad).all() and (grad[..., target == -100, :] == 0).all()
