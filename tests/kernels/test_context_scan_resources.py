"""The compiled context_scan kernels, without a GPU."""

import argparse
import itertools

import torch

from bench import ahead_of_time
from fastperturb.kernels import context_scan


def test_the_kernels_do_not_spill():
    rows = ahead_of_time.compiled(__file__, "--sizes", "16", "64", "100")
    ahead_of_time.assert_fits(rows, warps_per_sm=16)
    assert {row["kernel"] for row in rows} == {"scan_kernel", "scan_backward_kernel"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, help="H")
    options = parser.parse_args()
    B, T = 4, 1024
    marks = torch.empty(B, T, dtype=torch.bool, device="meta")
    for H, marked, cc in itertools.product(
        options.sizes, (False, True), ahead_of_time.CAPABILITIES
    ):
        inputs, retain = torch.empty(B, T, H, device="meta"), torch.empty(H, device="meta")
        others = (marks, marks, inputs[:, 0].contiguous()) if marked else (None, None, None)
        with ahead_of_time.recorded(cc) as launches:
            context_scan.context_scan(inputs, retain, *others)
            context_scan.context_scan_backward(inputs, inputs, inputs, retain, *others)
        for launched in launches:
            ahead_of_time.print_resources(launched, cc, H=H, marked=marked)


if __name__ == "__main__":
    main()
