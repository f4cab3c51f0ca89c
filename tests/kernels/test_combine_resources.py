"""The compiled combine kernels, without a GPU."""

import argparse
import itertools

import pytest
import torch

from bench import ahead_of_time
from fastperturb.config import AT_LEAST_TWO_SAMPLES, MARGINALS
from fastperturb.kernels import combine
from fastperturb.ops.combine import COMBINABLE


def check(*options):
    rows = ahead_of_time.compiled(__file__, *options)
    ahead_of_time.assert_fits(rows, warps_per_sm=8)


def test_the_jackknife_of_8_and_128_samples_does_not_spill():
    check("--estimators", "jvi_clip", "--samples", "8", "128")


@pytest.mark.slow
def test_no_estimator_spills_for_any_number_of_samples():
    check("--samples", "1", "3", "33", "128", "1000")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--estimators", nargs="+", default=COMBINABLE)
    parser.add_argument("--samples", nargs="+", type=int)
    options = parser.parse_args()
    B, T = 4, 1023
    mask = torch.empty(B, T, dtype=torch.bool, device="meta")
    for estimator, M, marginal, cc in itertools.product(
        options.estimators, options.samples, MARGINALS, ahead_of_time.CAPABILITIES
    ):
        if M < 2 and estimator in AT_LEAST_TWO_SAMPLES:
            continue
        log_probs = torch.empty(M, B, T + 1, device="meta")[:, :, :-1]
        with ahead_of_time.recorded(cc) as launches:
            combine.combine(log_probs, mask, estimator, marginal)
        for launched in launches:
            about = {"estimator": estimator, "samples": M, "marginal": marginal}
            ahead_of_time.print_resources(launched, cc, **about)


if __name__ == "__main__":
    main()
