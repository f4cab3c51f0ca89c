"""The heads against the fp64 oracle, with random upstream gradients, in blocks of every size."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastperturb import ops
from fastperturb.ops import head_blocks, reference
from fastperturb.ops.calls import HeadCall
from fastperturb.ops.torch import rows as torch_rows

HEADS = {"logprob": "linear_logprob", "quadratic": "linear_quadratic"}
OPTIONS = {
    "plain": {},
    "soft-capped": {"softcap": 5.0},
    "scaled": {"logit_scale": 0.3},
    "padded": {"valid_vocab": 143},
    "everything": {"softcap": 4.0, "logit_scale": 1.7, "valid_vocab": 143, "ignore_index": -1},
}
M, N, D, V = 3, 37, 8, 150


@contextlib.contextmanager
def budget(rows, words):
    """Blocks of about so many rows by so many words."""
    names = ("BLOCK_ROWS", "BLOCK_BYTES", "HELD_BYTES")
    before = [getattr(head_blocks, name)["cpu"] for name in names]
    for name, value in zip(names, (rows, 4 * rows * words, 4 * rows * V), strict=True):
        getattr(head_blocks, name)["cpu"] = value
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            getattr(head_blocks, name)["cpu"] = value


@pytest.fixture(params=[(1, 64), (16, 64), (1000, 1000)], ids="{0[0]} x {0[1]} blocks".format)
def blocks(request):
    with budget(*request.param):
        yield


def head_inputs(kind, *, dtype=torch.float64, tokens=N, bias=True, frozen=False, ignored=0.25):
    """hidden, weight, bias and target; a share of the targets is ignored."""
    torch.manual_seed(0)
    shape = (tokens, D) if kind == "logprob" else (M, tokens, D)
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(not frozen)
    offset = torch.randn(V).to(dtype).requires_grad_(not frozen) if bias else None
    target = torch.randint(0, 143, (tokens,))
    target[torch.rand(tokens) < ignored] = -100
    return hidden, weight, offset, target


def value_and_gradients(op, hidden, weight, bias, target, **options):
    if "ignore_index" in options:
        target = target.where(target != -100, options["ignore_index"])
    value = op(hidden, weight, target, bias=bias, **options)
    torch.manual_seed(1)
    upstream = torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    return [value, *torch.autograd.grad(value, leaves, upstream)]


def naive(kind):
    """The op as a user would write it, in the dtype of what it is given."""

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


def assert_as_good_as_naive(kind, given, **options):
    hidden, weight, bias, target = given
    exact = [
        None if leaf is None else leaf.detach().double().requires_grad_(leaf.requires_grad)
        for leaf in (hidden, weight, bias)
    ]
    right = value_and_gradients(getattr(reference, HEADS[kind]), *exact, target, **options)
    ours = value_and_gradients(getattr(ops, HEADS[kind]), *given, **options)
    plain = value_and_gradients(naive(kind), *given, **options)
    for mine, other, truth in zip(ours, plain, right, strict=True):
        error, allowance = (mine - truth).norm(), (other - truth).norm()
        assert error <= 2 * allowance + torch.finfo(hidden.dtype).eps * truth.norm()
    assert ours[0].dtype == torch.float32
    assert [each.dtype for each in ours[1:]] == [each.dtype for each in plain[1:]]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradients_are_the_oracles(kind, options, bias, frozen):
    given = head_inputs(kind, bias=bias, frozen=frozen)
    ours = value_and_gradients(getattr(ops, HEADS[kind]), *given, **options)
    oracle = value_and_gradients(getattr(reference, HEADS[kind]), *given, **options)
    for mine, right in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_fp32_errs_no_more_than_naive_torch(kind, options, frozen):
    given = head_inputs(kind, dtype=torch.float32, frozen=frozen, bias=bool(options))
    assert_as_good_as_naive(kind, given, **options)


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
    given = head_inputs(kind, dtype=torch.float32, frozen=frozen, ignored=share)
    value, grad, *others = value_and_gradients(getattr(ops, HEADS[kind]), *given)
    ignored = given[-1] == -100
    assert (value[ignored] == 0).all() and (grad[..., ignored, :] == 0).all()
    assert (value[~ignored] != 0).all() and (grad[..., ~ignored, :] != 0).any(-1).all()
    assert all((other == 0).all() == (share == 1.0) for other in others)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_no_tokens_and_one_token_work(kind, frozen, tokens):
    given = head_inputs(kind, dtype=torch.float32, tokens=tokens, frozen=frozen, ignored=0.0)
    results = value_and_gradients(getattr(ops, HEADS[kind]), *given)
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
    found = ops.linear_logprob(hidden, weight, target, bias=bias, **options, return_metrics=True)
    shown = {name: each for name, each in options.items() if name != "ignore_index"}
    scores = reference.logits(hidden.double(), weight.double(), bias=bias.double(), **shown)
    kept = target != options.get("ignore_index", -100)
    entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.lse, scores.logsumexp(-1).where(kept, 0.0), **close)
    torch.testing.assert_close(found.entropy, entropy.where(kept, 0.0), **close)
    assert torch.equal(found.hit, (scores.argmax(-1) == target) & kept)
    assert not any(each.requires_grad for each in found[1:]) and found.log_probs.requires_grad
    plain = ops.linear_logprob(hidden, weight, target, bias=bias, **options)
    assert torch.equal(found.log_probs, plain)


@pytest.mark.usefixtures("blocks", "implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_row_weights_are_constants_of_the_quadratic_equation(frozen):
    given = head_inputs("quadratic", dtype=torch.float32, frozen=frozen)
    weights = torch.rand(M, N).requires_grad_()
    ours = value_and_gradients(ops.linear_quadratic, *given, row_weights=weights)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in given[:3]]
    right = value_and_gradients(
        reference.linear_quadratic, *exact, given[3], row_weights=weights.double()
    )
    for mine, truth in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-6)
    assert weights.grad is None


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_log_probs_of_the_quadratic_op_are_differentiable_too(frozen):
    hidden, weight, bias, target = head_inputs("quadratic", frozen=frozen)
    value, log_probs = ops.linear_quadratic(
        hidden, weight, target, bias=bias, return_log_probs=True
    )
    each = [reference.linear_logprob(sample, weight, target, bias=bias) for sample in hidden]
    expected = torch.stack(each)
    torch.testing.assert_close(log_probs, expected)
    upstream, pull = torch.randn_like(value), torch.randn_like(log_probs)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
    plain = reference.linear_quadratic(hidden, weight, target, bias=bias)
    for ours, right, grads in [
        ([value, log_probs], [plain, expected], [upstream, pull]),
        ([log_probs], [expected], [pull]),
    ]:
        mine = torch.autograd.grad(ours, leaves, grads, retain_graph=True)
        truth = torch.autograd.grad(right, leaves, grads, retain_graph=True)
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_strided_and_mixed_inputs_work(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    with torch.no_grad():
        strided = [
            hidden.mT.contiguous().mT,
            weight.to(torch.bfloat16).T.contiguous().T,
            torch.stack([bias, bias], 1)[:, 0],
        ]
    strided = [
        each.requires_grad_(leaf.requires_grad)
        for each, leaf in zip(strided, (hidden, weight, bias), strict=True)
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
def test_words_with_logits_of_minus_infinity_have_no_probability(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, ignored=0.0)
    alone = 100
    blocked = bias.detach().clone().fill_(-torch.inf)
    blocked[alone] = 0.5
    blocked.requires_grad_(not frozen)
    weight.requires_grad_(not frozen)
    target = target.clone().fill_(alone)
    value, *grads = value_and_gradients(getattr(ops, HEADS[kind]), hidden, weight, blocked, target)
    expected = 0.0 if kind == "logprob" else 1.0  # of one certain word: log 1, and 2 - 1
    assert (value == expected).all() and all((grad == 0).all() for grad in grads)
    if kind == "logprob":
        impossible = ops.linear_logprob(hidden, weight, target * 0, bias=blocked)
        assert (impossible == -torch.inf).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 300), st.booleans(), st.sampled_from(list(HEADS)))
def test_block_sizes_change_nothing_beyond_rounding(rows, words, frozen, kind):
    given = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    whole = value_and_gradients(getattr(ops, HEADS[kind]), *given)
    with budget(rows, words):
        parts = value_and_gradients(getattr(ops, HEADS[kind]), *given)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_a_constant_added_to_all_logits_changes_nothing_and_one_sample_is_cross_entropy(seed, c):
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
def test_quadratic_does_not_depend_on_the_order_of_samples(order):
    hidden, weight, bias, target = head_inputs("quadratic")
    one = ops.linear_quadratic(hidden, weight, target, bias=bias)
    other = ops.linear_quadratic(hidden[list(order)], weight, target, bias=bias)
    torch.testing.assert_close(one, other)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            # A view makes nothing.
            if isinstance(each, torch.Tensor) and each._base is None:
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_exist_a_block_at_a_time_and_a_frozen_head_makes_nothing_of_its_size(kind, frozen):
    samples, tokens, dim, words = 2, 64, 4, 2048
    shape = (tokens, dim) if kind == "logprob" else (samples, tokens, dim)
    hidden, weight = torch.randn(shape), torch.randn(words, dim)
    target = torch.randint(words, (tokens,))
    head = head_blocks.Head(torch_rows, weight, None, 1.0, None, words, -100)
    run = getattr(head_blocks, HEADS[kind])
    rows = (None,) if kind == "quadratic" else ()
    metrics = {"want_entropy": True} if kind == "logprob" else {}
    with budget(16, 128), Largest() as seen:
        head_blocks.HELD_BYTES["cpu"] = 4 * words * samples
        found = run(head, hidden, target, *rows, want_grad_hidden=frozen, **metrics)
        assert seen.elements < words * dim
        if not frozen:
            saved = (found.lse,) if kind == "logprob" else (*rows, found.lse, found.dot)
            backward = getattr(head_blocks, HEADS[kind] + "_backward")
            backward(head, torch.randn(tokens), hidden, target, *saved, (True, True, True))
            assert seen.elements == words * dim


@pytest.mark.parametrize("kind", HEADS)
def test_a_second_backward_and_checkpointing_give_the_same_gradient(kind):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, frozen=True)
    op = getattr(ops, HEADS[kind])

    def run(hidden):
        return op(hidden, weight, target, bias=bias)

    upstream = torch.randn(N)
    value = run(hidden)
    first, second = (
        torch.autograd.grad(value, hidden, upstream, retain_graph=True)[0] for _ in range(2)
    )
    again = torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False)
    (third,) = torch.autograd.grad(again, hidden, upstream)
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("kind", HEADS)
def test_autocast_outside_does_not_lower_the_precision_inside(kind):
    given = head_inputs(kind, dtype=torch.float32)
    op = getattr(ops, HEADS[kind])
    plain = value_and_gradients(op, *given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradients(op, *given)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_registration_passes_opcheck(kind, frozen, layout):
    hidden, weight, bias, target = head_inputs(kind, tokens=9, frozen=frozen)
    if layout == "transposed":
        hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    call = HeadCall(hidden, weight, target, bias, 0.7, 5.0, 143, -100)
    row_weights = torch.rand(M, 9, dtype=torch.float64) if layout == "dense" else None
    want_entropy = layout == "dense"
    others = (frozen, want_entropy) if kind == "logprob" else (row_weights, frozen)
    torch.library.opcheck(getattr(torch.ops.fastperturb, HEADS[kind]).default, (*call, *others))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_it_compiles_into_one_graph_forward_and_backward(kind, frozen):
    given = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    op = getattr(ops, HEADS[kind])
    eager = value_and_gradients(op, *given)
    compiled = value_and_gradients(torch.compile(op, fullgraph=True), *given)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sharded_weight_is_refused_with_what_to_do():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.randn(V, D), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"weight is sharded .* weight.full_tensor\(\)"):
            ops.linear_logprob(torch.randn(2, D), weight, torch.tensor([1, 2]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(8)}, ValueError, "hidden must be floating point"),
        ({"weight": torch.zeros(V, 7)}, ValueError, r"weight must be .* D = 8.*\[150, 7\]"),
        ({"weight": torch.zeros(0)}, ValueError, r"got torch.float32 \[0\].*gather it first"),
        ({"target": torch.zeros(N)}, ValueError, r"target must be int64 \[N\] = \[37\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target .*\[4\]"),
        ({"target": torch.full((N,), V)}, IndexError, r"lie in \[0, 150\), got 150 at row 0"),
        ({"target": torch.full((N,), -1)}, IndexError, "got -1 at row 0"),
        ({"bias": torch.zeros(29)}, ValueError, r"bias must be floating point \[V\] = \[150\]"),
        ({"valid_vocab": 151}, ValueError, r"valid_vocab must lie in \[1, V = 150\], got 151"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0 or None, got 0.0"),
        ({"weight": torch.zeros(V, 8, device="meta")}, ValueError, "weight lies on meta"),
    ],
)
def test_bad_arguments_are_refused_by_name(kind, changes, error, message):
    hidden, weight, bias, target = head_inputs(kind)
    given = {"hidden": hidden, "weight": weight, "bias": bias, "target": target, **changes}
    with pytest.raises(error, match=message):
        getattr(ops, HEADS[kind])(**given)


def test_the_quadratic_equation_refuses_a_single_sample_and_wrong_row_weights():
    hidden, weight, bias, target = head_inputs("quadratic")
    with pytest.raises(ValueError, match=r"M >= 2 independent samples.*\[1, 37, 8\]"):
        ops.linear_quadratic(hidden[:1], weight, target, bias=bias)
    with pytest.raises(ValueError, match=r"row_weights must be .*\[3, 37\].*\[3, 1\]"):
        ops.linear_quadratic(hidden, weight, target, row_weights=torch.ones(3, 1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_second_derivative_is_refused(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, frozen=frozen)
    value = getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias)
    with pytest.raises(RuntimeError, match=f"{HEADS[kind]} has no second derivative"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("kind", HEADS)
def test_a_forward_mode_derivative_is_refused_and_not_zero(kind):
    hidden, weight, bias, target = (each.detach() for each in head_inputs(kind))
    with pytest.raises(RuntimeError, match=f"{HEADS[kind]} has no forward-mode derivative"):
        torch.func.jvp(
            lambda bias: getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias),
            (bias,),
            (bias,),
        )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_an_infinite_upstream_gradient_does_not_reach_ignored_rows(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, frozen=frozen)
    value = getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias)
    upstream = torch.where(target == -100, torch.inf, 1.0).double()
    (grad,) = torch.autograd.grad(value, hidden, upstream)
    assert torch.isfinite(grad).all() and (grad[..., target == -100, :] == 0).all()
