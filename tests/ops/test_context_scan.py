"""context_scan on a CPU against the recurrence, walked token by token in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fastperturb import ops
from fastperturb.ops import dispatch


def by_hand(inputs, retain, starts, real, initial):
    state = torch.zeros_like(inputs[:, 0]) if initial is None else initial
    states = []
    for t in range(inputs.shape[1]):
        before = state if starts is None else torch.where(starts[:, t, None], 0.0, state)
        new = retain * before + (1 - retain) * inputs[:, t]
        state = new if real is None else torch.where(real[:, t, None], new, state)
        states.append(state)
    return torch.stack(states, dim=1)


def case(B, T, H, *, starts=True, real=True, initial=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    inputs, retain = torch.randn(B, T, H, dtype=dtype), torch.rand(H, dtype=dtype)
    return (
        inputs.requires_grad_(),
        retain.requires_grad_(),
        torch.rand(B, T) < 0.2 if starts else None,
        torch.rand(B, T) < 0.8 if real else None,
        torch.randn(B, H, dtype=dtype) if initial else None,
    )


def by_op(inputs, retain, starts, real, initial):
    return ops.context_scan(inputs, retain, starts=starts, real=real, initial=initial)


def results(scan, arguments):
    """Return states and gradients."""
    inputs, retain, *_ = arguments
    states = scan(*arguments)
    torch.manual_seed(1)
    upstream = torch.randn(states.shape, dtype=torch.float64).to(states.dtype)
    return [states, *torch.autograd.grad(states, [inputs, retain], upstream)]


def in_fp64(arguments):
    return [
        value.detach().double().requires_grad_(value.requires_grad)
        if value is not None and value.is_floating_point()
        else value
        for value in arguments
    ]


@pytest.mark.usefixtures("implementation")
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 35)),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_states_and_gradients_are_those_of_the_recurrence(sizes, options, seed):
    names = dict(zip(("starts", "real", "initial"), options))
    arguments = case(*sizes, **names, seed=seed)
    expected = results(by_hand, in_fp64(arguments))
    for ours, right in zip(results(by_op, arguments), expected, strict=True):
        assert ours.dtype == torch.float32
        # Of the largest: the gradient of retain is a sum over tokens, of terms of either sign.
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max()


def test_fp64_inputs_pass_gradcheck_and_all_registrations_opcheck():
    arguments = case(2, 9, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(by_op, arguments)
    torch.library.opcheck(torch.ops.fastperturb.context_scan.default, arguments)
    torch.library.opcheck(
        torch.ops.fastperturb.context_scan.default, case(2, 9, 3, starts=False, initial=False)
    )


@pytest.mark.usefixtures("implementation")
def test_a_row_that_is_cut_in_two_goes_on_from_the_state_of_the_first_part():
    inputs, retain, starts, real, _ = case(2, 50, 20, initial=False)
    whole = ops.context_scan(inputs, retain, starts=starts, real=real)
    first = ops.context_scan(inputs[:, :23], retain, starts=starts[:, :23], real=real[:, :23])
    second = ops.context_scan(
        inputs[:, 23:], retain, starts=starts[:, 23:], real=real[:, 23:], initial=first[:, -1]
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_long_rows_neither_grow_nor_lose_what_is_kept_for_long():
    inputs, retain = torch.ones(1, 20_000, 3), torch.tensor([0.0, 0.5, 0.99999])
    states = ops.context_scan(inputs, retain)
    expected = 1 - retain.double() ** torch.arange(1, 20_001)[:, None]
    torch.testing.assert_close(states[0].double(), expected, rtol=2e-4, atol=1e-6)


def test_the_same_bits_come_out_for_any_number_of_threads():
    arguments = case(3, 200, 40)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(results(by_op, arguments))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(outcomes[0], outcomes[-1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_without_tokens_there_are_no_states_and_gradients_are_zero(shape):
    inputs, retain = torch.randn(shape, requires_grad=True), torch.rand(3, requires_grad=True)
    states = ops.context_scan(inputs, retain)
    grads = torch.autograd.grad(states.sum(), [inputs, retain])
    assert states.shape == grads[0].shape == shape and torch.equal(grads[1], torch.zeros(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.randn(2, 5)}, r"inputs must be float32 \[B, T, H\]"),
        ({"inputs": torch.randn(2, 5, 3).half()}, "inputs must be float32"),
        ({"retain": torch.rand(4)}, r"retain must be torch.float32 \[3\]"),
        ({"starts": torch.zeros(2, 5)}, r"starts must be torch.bool \[2, 5\]"),
        ({"real": torch.zeros(2, 4) > 0}, r"real must be torch.bool \[2, 5\]"),
        ({"initial": torch.zeros(2, 3).double()}, r"initial must be torch.float32 \[2, 3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"inputs": torch.randn(2, 5, 3), "retain": torch.rand(3), **changes}
    with pytest.raises(ValueError, match=message):
        ops.context_scan(**arguments)


def test_what_it_cannot_differentiate_is_named():
    inputs, retain = torch.randn(2, 5, 3, requires_grad=True), torch.rand(3)
    (grad,) = torch.autograd.grad(ops.context_scan(inputs, retain).square().sum(), inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ops.context_scan(inputs, retain).sum(), inputs, create_graph=True)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no forward-mode derivative"),
    ):
        dual = forward_ad.make_dual(inputs.detach(), grad)
        ops.context_scan(dual, retain)


def test_every_implementation_is_asked_for_by_name():
    names = [candidate.name for candidate in dispatch.explain("context_scan", torch.device("cpu"))]
    assert names == ["triton", "cpp", "torch"]
