"""The heads as registered ops: autograd, compilation, and the calls that they reject."""

import pytest
import torch
from head_cases import HEADS, D, M, N, V, head_inputs, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastperturb import ops
from fastperturb.ops import head
from fastperturb.ops.calls import HeadCall


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
    inputs = head_inputs(kind, dtype=torch.float32)
    op = getattr(ops, HEADS[kind])
    plain = value_and_gradients(op, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradients(op, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_registration_passes_opcheck(kind, frozen, layout):
    hidden, weight, bias, target = head_inputs(kind, tokens=9, frozen=frozen)
    if layout == "transposed":
        hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    cast = weight.detach().float() if layout == "dense" else None
    labelled = (target != -100).nonzero()[:, 0] if layout == "dense" else None
    call = HeadCall(hidden, weight, target, bias, cast, labelled, 0.7, 5.0, 143, -100)
    row_weights = torch.rand(M, 9, dtype=torch.float64) if layout == "dense" else None
    want_entropy = layout == "dense"
    others = (frozen, want_entropy) if kind == "logprob" else (row_weights, 1, frozen)
    torch.library.opcheck(getattr(torch.ops.fastperturb, HEADS[kind]).default, (*call, *others))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_it_compiles_into_one_graph_forward_and_backward(kind, frozen):
    inputs = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    op = getattr(ops, HEADS[kind])
    eager = value_and_gradients(op, *inputs)
    compiled = value_and_gradients(torch.compile(op, fullgraph=True), *inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", HEADS)
def test_one_compiled_graph_takes_vocabularies_of_any_size(kind):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, frozen=True)
    op, graphs = getattr(ops, HEADS[kind]), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=count)
    for vocab in (V, V - 5, V - 9):
        call = hidden, weight[:vocab].detach(), target.clamp_max(vocab - 1)
        options = {"bias": None if bias is None else bias[:vocab].detach()}
        assert torch.equal(compiled(*call, **options), op(*call, **options))
    assert len(graphs) == 1


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_cast_weight_is_multiplied_by_and_the_weight_gets_the_gradient(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    op, cast = getattr(ops, HEADS[kind]), weight.detach().bfloat16()
    ours = value_and_gradients(op, hidden, weight, bias, target, cast_weight=cast)
    rounded = cast.float().requires_grad_(not frozen)
    plain = value_and_gradients(op, hidden, rounded, bias, target)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_labelled_changes_nothing_on_a_cpu(kind, frozen):
    inputs = head_inputs(kind, dtype=torch.float32, frozen=frozen)
    op, labelled = getattr(ops, HEADS[kind]), (inputs[-1] != -100).nonzero()[:, 0]
    told = value_and_gradients(op, *inputs, labelled=labelled)
    plain = value_and_gradients(op, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(told, plain, strict=True))


def test_without_autocast_there_is_no_cast_weight():
    weight = torch.randn(V, D)
    assert head.cast_weight(weight) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.cast_weight(weight) is None


@pytest.fixture
def autocast_on_a_gpu():
    """Autocast as of a GPU, whose tensors take no memory and have no values."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    with FakeTensorMode():
        yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", torch.float16)


@pytest.mark.usefixtures("autocast_on_a_gpu")
def test_under_autocast_on_a_gpu_the_weight_is_cast_once_for_many_calls():
    weight, casts = torch.randn(V, D, device="cuda"), []
    target = torch.zeros(N, dtype=torch.int64, device="cuda")

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == weight.shape:
                casts.append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    with Casts():
        cast = head.cast_weight(weight)
        assert cast.dtype == torch.bfloat16 and head.cast_weight(cast) is None
        for _ in range(3):
            hidden = torch.randn(N, D, device="cuda")
            value = ops.linear_logprob(hidden, weight, target, cast_weight=cast)
            assert value.dtype == torch.float32
        assert casts == [torch.bfloat16]
        with pytest.raises(ValueError, match=r"torch.bfloat16, got torch.float16"):
            ops.linear_logprob(hidden, weight, target, cast_weight=cast.half())


def test_a_sharded_weight_raises_with_the_remedy():
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
        ({"weight": torch.zeros(V, 8, device="meta")}, ValueError, "weight must be on cpu"),
        ({"cast_weight": torch.zeros(V, 7)}, ValueError, r"cast_weight must be weight \[150, 8\]"),
        ({"cast_weight": torch.zeros(V, 8, dtype=torch.int8)}, ValueError, "got torch.int8"),
        ({"labelled": torch.zeros(4)}, ValueError, r"labelled must .*float32 \[4\]"),
        (
            {"labelled": torch.arange(N - 1)},
            ValueError,
            "labelled .* in rising order",
        ),
        ({"labelled": torch.arange(3, device="meta")}, ValueError, "labelled must be on cpu"),
    ],
)
def test_bad_arguments_raise_by_name(kind, changes, error, message):
    hidden, weight, bias, target = head_inputs(kind)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "target": target, **changes}
    with pytest.raises(error, match=message):
        getattr(ops, HEADS[kind])(**arguments)


def test_the_quadratic_estimator_rejects_a_single_sample_and_wrong_row_weights():
    hidden, weight, bias, target = head_inputs("quadratic")
    with pytest.raises(ValueError, match=r"M >= 2 independent samples.*\[1, 37, 8\]"):
        ops.linear_quadratic(hidden[:1], weight, target, bias=bias)
    with pytest.raises(ValueError, match=r"row_weights must be .*\[3, 37\].*\[3, 1\]"):
        ops.linear_quadratic(hidden, weight, target, row_weights=torch.ones(3, 1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_second_derivative_raises(kind, frozen):
    hidden, weight, bias, target = head_inputs(kind, frozen=frozen)
    value = getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias)
    with pytest.raises(RuntimeError, match=f"{HEADS[kind]} has no second derivative"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("kind", HEADS)
def test_a_forward_mode_derivative_raises(kind):
    hidden, weight, bias, target = (value.detach() for value in head_inputs(kind))
    with pytest.raises(RuntimeError, match=f"{HEADS[kind]} has no forward-mode derivative"):
        torch.func.jvp(
            lambda bias: getattr(ops, HEADS[kind])(hidden, weight, target, bias=bias),
            (bias,),
            (bias,),
        )
