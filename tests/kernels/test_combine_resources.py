"""What the compiler makes of the combine kernels, without a GPU.

The compiler runs in another process, since this one may have Triton's interpreter loaded.
"""

import itertools
import json
from pathlib import Path

import ahead_of_time
import pytest

FILE = Path(__file__).resolve()


def compiled(*options):
    return ahead_of_time.compiled(FILE, *options)


def check(rows):
    assert rows
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert row["blocks_per_sm"] >= 1, row


def test_the_jackknife_of_8_and_128_samples_does_not_spill():
    check(compiled("--estimators", "jvi_clip", "--samples", "8", "128"))


@pytest.mark.slow
def test_no_estimator_spills_for_any_number_of_samples():
    check(compiled("--samples", "1", "3", "33", "128", "1000"))


def main():
    """Compile what would be launched and print one JSON object for each kernel."""
    import argparse

    import aot
    import torch

    from fastperturb.config import AT_LEAST_TWO_DRAWS, MARGINALS
    from fastperturb.kernels import combine
    from fastperturb.ops.combine import COMBINABLE

    parser = argparse.ArgumentParser()
    parser.add_argument("--estimators", nargs="+", default=COMBINABLE)
    parser.add_argument("--samples", nargs="+", type=int)
    options = parser.parse_args()
    B, T = 4, 1023
    for estimator, M, marginal, cc in itertools.product(
        options.estimators, options.samples, MARGINALS, (80, 90, 100)
    ):
        if M < 2 and estimator in AT_LEAST_TWO_DRAWS:
            continue
        log_probs = torch.empty(M, B, T + 1, device="meta")[:, :, :-1]
        mask = torch.empty(B, T, dtype=torch.bool, device="meta")
        outcomes = (B, T) if marginal == "token" else (B,)
        outputs = [torch.empty(outcomes, device="meta") for _ in range(3)]
        outputs.append(torch.empty(M, *outcomes, device="meta"))
        kernel, _, arguments = combine.plan(outputs, log_probs, mask, estimator, marginal)
        built = aot.compile_launch(kernel, arguments, {"num_warps": combine.WARPS}, cc)
        row = {"estimator": estimator, "samples": M, "marginal": marginal, "cc": cc}
        print(json.dumps(row | aot.resources(built, cc)), flush=True)


if __name__ == "__main__":
    main()
