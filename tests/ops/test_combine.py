"""combine, by torch and by C++, against `fastperturb.estimators` in fp64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastperturb import estimators, ops
from fastperturb.config import AT_LEAST_TWO_SAMPLES, MARGINALS
from fastperturb.ops.combine import COMBINABLE

# The jackknife leaves one sample out, so it needs another.
CASES = [
    (estimator, M)
    for estimator in COMBINABLE
    for M in (1, 2, 3, 8, 33, 128)
    if M > 1 or estimator not in AT_LEAST_TWO_SAMPLES
]


def some_log_probs(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Draw log-probs that are strided, as the model's are: it drops the last position."""
    generator = torch.Generator().manual_seed(seed)
    M, B, T = shape
    return (spread * torch.randn(M, B, T + 1, generator=generator) - 6)[:, :, :-1]


def some_mask(B: int, T: int, share: float = 0.6) -> Tensor:
    """Draw the labelled positions; the second row has none, unless `share` is 1."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < share
    mask[1:2] = share == 1
    return mask


def by_estimators(log_probs: Tensor, mask: Tensor, estimator: str, marginal: str) -> ops.Combined:
    """Combine by the definition in plain torch, in the dtype of the log-probs."""
    if marginal == "sequence":
        log_probs, mask = log_probs.where(mask, 0.0).sum(-1), mask.any(-1)
    value, weights = estimators.combine(log_probs, estimator, mask=mask)
    log_marginal = estimators.combine(log_probs.detach(), "iwae", mask=mask)[0]
    effective = estimators.effective_samples(log_probs).where(mask, 0.0)
    return ops.Combined(value, log_marginal, effective, weights)


def with_gradient(
    function: Any, log_probs: Tensor, mask: Tensor, *arguments: Any, **options: Any
) -> list[Tensor]:
    """Return all outputs, and the log-probs' gradient under a random upstream one."""
    log_probs = log_probs.detach().requires_grad_()
    combined = function(log_probs, mask, *arguments, **options)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(combined.value.shape, generator=generator).to(log_probs.dtype)
    (gradient,) = torch.autograd.grad(combined.value, log_probs, upstream)
    return [*(output.detach() for output in combined), gradient]


def check(log_probs: Tensor, mask: Tensor, estimator: str, marginal: str) -> list[Tensor]:
    """Check an error of at most twice naive torch's in fp32, plus two units in the last place."""
    ours = with_gradient(ops.combine, log_probs, mask, estimator, marginal=marginal)
    naive = with_gradient(by_estimators, log_probs, mask, estimator, marginal)
    exact = with_gradient(by_estimators, log_probs.double(), mask, estimator, marginal)
    for name, one, other, truth in zip(
        (*ops.Combined._fields, "gradient"), ours, naive, exact, strict=True
    ):
        assert one.shape == truth.shape and one.dtype == torch.float32, name
        assert one.is_contiguous() and one.isfinite().all(), name
        if truth.numel():
            error, limit = ((value - truth).abs().max() for value in (one, other))
            assert error <= 2 * limit + 2**-22 * truth.abs().max(), (name, error, limit)
    return ours


@pytest.mark.usefixtures("poisoned", "implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize(("estimator", "M"), CASES)
def test_outputs_and_gradient_are_those_of_the_estimators(
    estimator: str, M: int, marginal: str
) -> None:
    for share in (0.0, 0.6, 1.0):
        mask = some_mask(3, 41, share)
        ours = check(some_log_probs(M, 3, 41), mask, estimator, marginal)
        labelled = mask if marginal == "token" else mask.any(-1)
        for output in ours[:4]:
            assert (output[..., ~labelled] == 0).all()
            assert (output[..., labelled] != 0).any() or share == 0
        assert (ours[4][:, ~mask] == 0).all()


EXTREMES = {
    "all impossible": torch.full((8, 2, 3), -1e30),
    "all minus infinity": torch.full((8, 2, 3), -torch.inf),
    "one possible": torch.tensor([-1e30, -2.0])[:, None, None].expand(2, 2, 3),
    "one impossible": torch.tensor([-2.0, -torch.inf, -3.0])[:, None, None].expand(3, 2, 3),
    "two equal": torch.tensor([-9.0, -1.0, -1.0, -1e30])[:, None, None].expand(4, 2, 3),
    "unlikely": some_log_probs(8, 2, 3) - 5000,
    "far apart": some_log_probs(8, 2, 3, spread=200.0),
    "200 apart": torch.arange(3.0)[:, None, None].expand(3, 2, 3) * 200 - 400,
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("estimator", COMBINABLE)
def test_extreme_log_probs_err_no_more_than_naive_torch(
    estimator: str, extreme: str, marginal: str
) -> None:
    log_probs = EXTREMES[extreme]
    check(log_probs, torch.ones(log_probs.shape[1:], dtype=torch.bool), estimator, marginal)


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
def test_impossible_samples_get_equal_jackknife_weights(implementation: None) -> None:
    log_probs = torch.tensor([-1e30] * 5 + [-2.0] + [-1e30] * 2)[:, None, None]
    weights = ops.combine(log_probs, torch.ones(1, 1) > 0, "jvi").weights
    # fp64 would lose the log 7 of -1e30 + log 7, which seven samples share.
    expected = torch.tensor([-1 / 8] * 5 + [2 - 1 / 8] + [-1 / 8] * 2)[:, None, None]
    torch.testing.assert_close(weights, expected)


@pytest.mark.usefixtures("implementation")
def test_sums_of_thousands_of_log_probs_keep_their_small_differences() -> None:
    log_probs = some_log_probs(4, 2, 5000)
    log_probs = log_probs[:1] + 1e-3 * log_probs  # sums of -30,000 that differ by a few units
    mask = torch.ones(2, 5000, dtype=torch.bool)
    ours = ops.combine(log_probs, mask, "iwae", marginal="sequence")
    naive, exact = (
        by_estimators(values, mask, "iwae", "sequence")
        for values in (log_probs, log_probs.double())
    )
    assert 0.01 < exact.weights.min() < exact.weights.max() < 0.9
    assert (ours.weights - exact.weights).abs().max() < 1e-6
    assert (naive.weights - exact.weights).abs().max() > 1e-5  # in fp32 sums


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("estimator", COMBINABLE)
def test_nan_reaches_the_labels_that_have_it_and_no_others(estimator: str, marginal: str) -> None:
    log_probs, mask = some_log_probs(4, 3, 5).clone(), some_mask(3, 5, 1.0)
    log_probs[2, 0, 0], log_probs[0, 1, 0], mask[1, 0] = torch.nan, torch.nan, False
    combined = ops.combine(log_probs, mask, estimator, marginal=marginal)
    where = torch.zeros_like(combined.value, dtype=torch.bool)
    where[(0, 0) if marginal == "token" else 0] = True
    for output in combined[:3]:
        assert torch.equal(output.isnan(), where)
    assert estimator == "jensen" or torch.equal(combined.weights.isnan().all(0), where)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
def test_any_strides_give_the_same_bits(marginal: str) -> None:
    log_probs, mask = some_log_probs(4, 3, 40).contiguous(), some_mask(3, 40)
    expected = with_gradient(ops.combine, log_probs, mask, "jvi", marginal=marginal)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        back = [order.index(dim) for dim in range(3)]
        turned = log_probs.permute(order).contiguous().permute(back)
        ours = with_gradient(ops.combine, turned, mask.T.contiguous().T, "jvi", marginal=marginal)
        assert all(map(torch.equal, ours, expected))
        assert all(output.is_contiguous() for output in ours[:4])
    row = log_probs[:, :1]
    ours = ops.combine(row.expand(4, 3, 40), mask[:1].expand(3, 40), "jvi", marginal=marginal)
    alone = ops.combine(row, mask[:1], "jvi", marginal=marginal)
    assert torch.equal(ours.value, alone.value.expand_as(ours.value))


@pytest.mark.usefixtures("poisoned", "implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 2, 0)], ids=["rows", "positions"])
def test_no_rows_or_no_positions_give_empty_or_zero_results(
    shape: tuple[int, int, int], marginal: str
) -> None:
    ours = check(torch.randn(shape), torch.ones(shape[1:], dtype=torch.bool), "jvi", marginal)
    assert all((output == 0).all() for output in ours)


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
@pytest.mark.parametrize("marginal", MARGINALS)
def test_the_same_bits_come_out_for_any_number_of_threads(
    implementation: None, marginal: str
) -> None:
    log_probs, mask = some_log_probs(4, 5, 3000), some_mask(5, 3000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ops.combine(log_probs, mask, "jvi_clip", marginal=marginal))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("marginal", MARGINALS)
def test_only_the_value_has_a_gradient_and_second_and_forward_derivatives_raise(
    marginal: str,
) -> None:
    log_probs, mask = some_log_probs(4, 3, 5).requires_grad_(), some_mask(3, 5)
    combined = ops.combine(log_probs, mask, "iwae", marginal=marginal)
    assert [output.requires_grad for output in combined] == [True, False, False, False]
    value = combined.value.square().sum()
    with pytest.raises(RuntimeError, match="combine has no second derivative"):
        torch.autograd.grad(value, log_probs, create_graph=True)
    start = log_probs.detach()
    with pytest.raises(RuntimeError, match="combine has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.combine(x, mask, "iwae").value, (start,), (start,))


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("estimator", COMBINABLE)
def test_fp64_is_combined_in_fp64(estimator: str, marginal: str) -> None:
    log_probs, mask = some_log_probs(4, 3, 5).double(), some_mask(3, 5)
    ours = with_gradient(ops.combine, log_probs, mask, estimator, marginal=marginal)
    exact = with_gradient(by_estimators, log_probs, mask, estimator, marginal)
    for one, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("implementation")
def test_half_precision_is_combined_in_fp32() -> None:
    half, mask = some_log_probs(4, 3, 5).bfloat16(), some_mask(3, 5)
    ours = with_gradient(ops.combine, half, mask, "iwae")
    expected = with_gradient(ops.combine, half.float(), mask, "iwae")
    assert all(map(torch.equal, ours[:4], expected[:4]))
    torch.testing.assert_close(ours[4], expected[4].bfloat16(), rtol=2**-6, atol=1e-3)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
def test_the_registration_passes_opcheck(marginal: str) -> None:
    log_probs, mask = some_log_probs(3, 2, 5).requires_grad_(), some_mask(2, 5)
    torch.library.opcheck(torch.ops.fastperturb.combine, (log_probs, mask, "jvi_clip", marginal))
    weights = torch.rand((3, 2, 5) if marginal == "token" else (3, 2))
    arguments = (torch.randn(weights.shape[1:]), weights, mask)
    torch.library.opcheck(torch.ops.fastperturb.combine_backward, arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("marginal", MARGINALS)
def test_it_compiles_into_one_graph_with_the_same_bits(marginal: str) -> None:
    log_probs, mask = some_log_probs(3, 2, 5), some_mask(2, 5)
    compiled = torch.compile(ops.combine, fullgraph=True, backend="aot_eager")
    for estimator in COMBINABLE:
        arguments = (log_probs, mask, estimator)
        ours = with_gradient(compiled, *arguments, marginal=marginal)
        expected = with_gradient(ops.combine, *arguments, marginal=marginal)
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "resample"}, "got 'resample'; resample is estimators.resample"),
        ({"estimator": "mlmc"}, "sumo and mlmc are estimators.Telescope"),
        ({"estimator": "quadratic"}, "quadratic is ops.linear_quadratic"),
        ({"marginal": "word"}, r"marginal must be one of \('token', 'sequence'\), got 'word'"),
        ({"log_probs": torch.zeros(4, 3)}, r"log_probs must be .*\[M, B, T\].*\[4, 3\]"),
        ({"log_probs": torch.zeros(0, 3, 5)}, r"M >= 1, got torch.float32 \[0, 3, 5\]"),
        ({"log_probs": torch.zeros(4, 3, 5).long()}, "got torch.int64"),
        ({"mask": torch.ones(3, 5)}, r"mask must be bool \[B, T\] = \[3, 5\].*torch.float32"),
        ({"mask": torch.ones(3, 4) > 0}, r"mask must be bool .* got torch.bool \[3, 4\]"),
        ({"mask": torch.empty(3, 5, device="meta") > 0}, "on cpu, got .* on meta"),
        ({"log_probs": torch.zeros(1, 3, 5), "estimator": "jvi"}, "num_samples must be at least 2"),
    ],
)
def test_wrong_arguments_raise_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {"log_probs": torch.zeros(4, 3, 5), "mask": torch.ones(3, 5) > 0}
    with pytest.raises(ValueError, match=message):
        ops.combine(**{**arguments, "estimator": "iwae", **change})


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, str]:
    """Draw log-probs that are multiples of 2^-10: sums and differences of a few are exact."""
    M, B, T = draw(st.integers(2, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    spread = draw(st.sampled_from([0.0, 0.5, 3.0, 30.0]))
    log_probs = some_log_probs(M, B, T, seed=draw(st.integers(0, 999)), spread=spread)
    share = draw(st.sampled_from([0.3, 1.0]))
    return (
        (1024 * log_probs).round() / 1024,
        some_mask(B, T, share),
        draw(st.sampled_from(MARGINALS)),
    )


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(COMBINABLE), st.randoms())
def test_permuting_samples_permutes_weights(call: Any, estimator: str, random: Any) -> None:
    log_probs, mask, marginal = call
    order = random.sample(range(len(log_probs)), len(log_probs))
    before = ops.combine(log_probs, mask, estimator, marginal=marginal)
    after = ops.combine(log_probs[order], mask, estimator, marginal=marginal)
    torch.testing.assert_close(after.weights, before.weights[order], rtol=1e-5, atol=1e-5)
    for one, other in zip(after[:3], before[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(COMBINABLE), st.integers(-64, 64))
def test_a_constant_shifts_values_and_leaves_weights(
    call: Any, estimator: str, constant: int
) -> None:
    log_probs, mask, marginal = call
    before = ops.combine(log_probs, mask, estimator, marginal=marginal)
    after = ops.combine(log_probs + constant, mask, estimator, marginal=marginal)
    assert torch.equal(after.weights, before.weights)
    assert torch.equal(after.effective_samples, before.effective_samples)
    shift = constant * (mask if marginal == "token" else mask.sum(-1))
    torch.testing.assert_close(after.value, before.value + shift, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        after.log_marginal, before.log_marginal + shift, rtol=1e-5, atol=1e-4
    )


@settings(max_examples=40, deadline=None)
@given(calls())
def test_jensens_value_is_at_most_iwaes(call: Any) -> None:
    log_probs, mask, marginal = call
    jensen = ops.combine(log_probs, mask, "jensen", marginal=marginal)
    iwae = ops.combine(log_probs, mask, "iwae", marginal=marginal)
    assert torch.equal(jensen.log_marginal, iwae.value)
    assert (jensen.value <= iwae.value + 1e-6 * iwae.value.abs()).all()
    labelled = iwae.value != 0
    assert (iwae.effective_samples[labelled] >= 1 - 1e-6).all()
    assert (iwae.effective_samples <= len(log_probs) * (1 + 1e-6)).all()
