"""The Triton combine against `fastperturb.estimators` in fp64, judged by naive torch's error."""

import pytest
import torch
from kernel_oracle import (
    DEVICE,
    INTERPRETED,
    MARKS,
    assert_as_good,
    interpreted_only,
    nan_in_new_memory,
    skip_without_memory,
)

from fastperturb import estimators
from fastperturb.config import AT_LEAST_TWO_SAMPLES, MARGINALS
from fastperturb.kernels import combine as kernels
from fastperturb.ops.combine import COMBINABLE

pytestmark = MARKS

# The jackknife leaves one sample out, so it needs another.
CASES = [
    (estimator, M)
    for estimator in COMBINABLE
    for M in (1, 2, 3, 8, 33, 128)
    if M > 1 or estimator not in AT_LEAST_TWO_SAMPLES
]
NAMES = ("value", "log_marginal", "effective_samples", "weights")


def some_log_probs(M, B, T, spread=2.0):
    """Strided, as the model's are: it drops the last position."""
    torch.manual_seed(0)
    return (spread * torch.randn(M, B, T + 1) - 6)[:, :, :-1]


def run(log_probs, mask, estimator, marginal):
    with nan_in_new_memory():
        outputs = kernels.combine(log_probs.to(DEVICE), mask.to(DEVICE), estimator, marginal)
    return [output.cpu() for output in outputs]


def by_estimators(log_probs, mask, estimator, marginal):
    if marginal == "sequence":
        log_probs, mask = log_probs.where(mask, 0.0).sum(-1), mask.any(-1)
    value, weights = estimators.combine(log_probs, estimator, mask=mask)
    log_marginal, _ = estimators.combine(log_probs, "iwae", mask=mask)
    return value, log_marginal, estimators.effective_samples(log_probs).where(mask, 0.0), weights


def check(log_probs, mask, estimator, marginal):
    ours = run(log_probs, mask, estimator, marginal)
    naive = by_estimators(log_probs, mask, estimator, marginal)
    exact = by_estimators(log_probs.double(), mask, estimator, marginal)
    for name, value, truth, other in zip(NAMES, ours, exact, naive, strict=True):
        assert value.dtype == torch.float32 and value.isfinite().all(), name
        assert_as_good(value, truth, other, eps=2**-21, name=name)  # four units in the last place


def some_mask(T):
    """Three batch rows: some tokens labelled, none, all."""
    share = torch.tensor([[0.6], [0.0], [1.0]])
    return torch.rand(3, T, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize(("estimator", "M"), CASES)
def test_outputs_are_as_good_as_naive_torch(estimator, M, marginal):
    check(some_log_probs(M, 3, 47), some_mask(47), estimator, marginal)


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("M", [2, 20, 128, 500])
@pytest.mark.parametrize("estimator", COMBINABLE)
@pytest.mark.gpu
def test_a_real_size_is_as_good_as_naive_torch(estimator, M, marginal):
    check(some_log_probs(M, 3, 1023), some_mask(1023), estimator, marginal)


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


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("estimator", COMBINABLE)
def test_extreme_log_probs_are_combined_as_well_as_by_naive_torch(estimator, extreme, marginal):
    log_probs = EXTREMES[extreme]
    check(log_probs, torch.ones(log_probs.shape[1:], dtype=torch.bool), estimator, marginal)


def test_the_jackknife_gives_all_impossible_samples_the_same_negative_weight():
    log_probs = torch.tensor([-1e30] * 5 + [-2.0] + [-1e30] * 2)[:, None, None]
    weights = run(log_probs, torch.ones(1, 1, dtype=torch.bool), "jvi", "token")[3]
    # fp64 would lose the log 7 of -1e30 + log 7, which seven samples share.
    expected = torch.tensor([-1 / 8] * 5 + [2 - 1 / 8] + [-1 / 8] * 2)[:, None, None]
    torch.testing.assert_close(weights, expected)


def test_small_differences_between_long_sequences_are_not_lost():
    log_probs = some_log_probs(4, 2, 5000)
    log_probs = log_probs[:1] + 1e-3 * log_probs  # sums of -30,000 that differ by a few units
    mask = torch.ones(2, 5000, dtype=torch.bool)
    weights = run(log_probs, mask, "iwae", "sequence")[3]
    exact = by_estimators(log_probs.double(), mask, "iwae", "sequence")[3]
    assert 0.01 < exact.min() < exact.max() < 0.9
    assert (weights - exact).abs().max() < 1e-6


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("estimator", COMBINABLE)
def test_a_nan_log_prob_reaches_the_results_of_its_label_and_no_others(estimator, marginal):
    log_probs, mask = some_log_probs(4, 3, 5).clone(), torch.ones(3, 5, dtype=torch.bool)
    log_probs[2, 0, 0], log_probs[0, 1, 0], mask[1, 0] = torch.nan, torch.nan, False
    outputs = run(log_probs, mask, estimator, marginal)
    where = torch.zeros_like(outputs[0], dtype=torch.bool)
    where[(0, 0) if marginal == "token" else 0] = True
    for output in outputs[:3]:
        assert torch.equal(output.isnan(), where)
    assert not outputs[3][:, ~where].isnan().any()


@pytest.mark.parametrize("marginal", MARGINALS)
def test_any_strides_give_the_same_bits(marginal):
    log_probs = some_log_probs(4, 3, 40).contiguous()
    mask = torch.rand(3, 40) < 0.6
    expected = run(log_probs, mask, "jvi", marginal)
    for order in ((2, 1, 0), (1, 2, 0)):
        back = [order.index(dim) for dim in range(3)]
        turned = log_probs.permute(order).contiguous().permute(back)
        assert all(map(torch.equal, run(turned, mask.T.contiguous().T, "jvi", marginal), expected))


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 2, 0)], ids=["no rows", "no tokens"])
def test_without_batch_rows_or_tokens_the_results_are_empty_or_zero(shape, marginal):
    outputs = run(torch.randn(shape), torch.ones(shape[1:], dtype=torch.bool), "iwae", marginal)
    assert all((output == 0).all() for output in outputs)
    assert outputs[3].shape == (shape if marginal == "token" else shape[:2])


@interpreted_only
@pytest.mark.parametrize("marginal", MARGINALS)
def test_log_probs_more_than_2_to_the_31_elements_apart_are_read(marginal, tmp_path):
    apart = 2**31 + 7
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + 8)
    log_probs = file.as_strided((2, 2, 4), (apart, 4, 1))
    log_probs.copy_(some_log_probs(2, 2, 4))
    mask = torch.ones(2, 4, dtype=torch.bool)
    ours, expected = (
        kernels.combine(values, mask, "jvi", marginal) for values in (log_probs, log_probs.clone())
    )
    assert all(map(torch.equal, ours, expected))


@pytest.mark.skipif(INTERPRETED, reason="needs the memory of a GPU")
@pytest.mark.gpu
def test_the_last_of_more_than_2_to_the_31_weights_are_those_of_their_tokens():
    skip_without_memory(20)
    M, T = 128, 2**24 + 100
    row = some_log_probs(M, 1, T // 4).to(DEVICE)
    log_probs = row.expand(M, 4, T // 4)
    mask = torch.ones(4, T // 4, dtype=torch.bool, device=DEVICE)
    weights = kernels.combine(log_probs, mask, "iwae", "token")[3]
    assert weights.numel() > 2**31
    expected = torch.softmax(row[:, 0, -50:], 0)
    torch.testing.assert_close(weights[:, 3, -50:], expected)
