"""The compiled row passes of the heads, for a model's real sizes and without a GPU."""

import argparse
import itertools

import pytest
import torch
import triton

from bench import ahead_of_time
from fastperturb.kernels import head_rows
from fastperturb.ops import gemm
from fastperturb.ops.calls import LogitOptions, LogProbs, RunningSoftmax

KERNELS = {
    "online_softmax_kernel",
    "finish_logprob_kernel",
    "grad_logits_kernel",
    "quadratic_dot_kernel",
    "quadratic_grad_logits_kernel",
}


def compiled(*options):
    rows = ahead_of_time.compiled(__file__, *options)
    assert {row["kernel"] for row in rows} == KERNELS
    return rows


def check(rows, *, stack=0, warps_per_sm=12):
    ahead_of_time.assert_fits(rows, warps_per_sm=warps_per_sm, stack=stack)


@pytest.mark.parametrize("sizes", [[], ["--columns", "12480", "--padding", "47"]], ids=str)
def test_real_blocks_are_read_once_16_bytes_at_a_time_without_a_spill(sizes):
    """The last block of an odd vocabulary too, whose padding is read and written with the rest."""
    rows = compiled("--cc", "80", "90", "100", *sizes)
    check(rows, stack=8 if sizes else 0)
    for row in rows:
        loads, stores = {
            "online_softmax_kernel": (4 + 1, 2 + 1),  # a row's 16 a thread, and total's 4
            "finish_logprob_kernel": (3, 1),  # 8 elements a thread: 16 of total's, 8 of W_y
            "grad_logits_kernel": (4, 2),
            "quadratic_dot_kernel": (8, 0),  # 32 elements a thread, and sums that are narrow
            "quadratic_grad_logits_kernel": (8, 4),
        }[row["kernel"]]
        assert (row["wide_loads"], row["wide_stores"]) == (loads, stores), row


def test_bias_soft_cap_and_entropy_do_not_spill():
    check(compiled("--cc", "90", "--heads", "everything"))


@pytest.mark.slow
@pytest.mark.parametrize("samples", ["2", "32", "128"])
@pytest.mark.parametrize("columns", ["8192", "21376"])
def test_no_number_of_samples_and_no_long_row_spills(samples, columns):
    sizes = ["--samples", samples, "--columns", columns]
    rows = compiled("--cc", "80", "90", "100", "--heads", "plain", "everything", *sizes)
    # The assembler of Triton 3.6 takes 180 registers for 32 samples with a soft cap on sm_100.
    check(rows, warps_per_sm=8 if samples == "32" and triton.__version__ < "3.7" else 12)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "strata"), [("8", "4"), ("32", "2"), ("32", "16")])
def test_samples_in_groups_do_not_spill(samples, strata):
    groups = ["--samples", samples, "--strata", strata]
    check(compiled("--cc", "80", "90", "100", *groups), warps_per_sm=8)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--dtype", "float32"], ["--columns", "16593"]], ids=str)
def test_fp32_and_odd_widths_spill_at_most_a_few_scalars(options):
    """The assembler spills some of online_softmax to fit 2048 threads of 32 registers."""
    check(compiled("--cc", "80", "90", "100", "--heads", "plain", "everything", *options), stack=32)


def launches(dtype, v, samples, strata, everything, padding, cc):
    """The launches of the passes over a block of v columns, and of finishing its rows."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def out_of(products):  # a pass writes fp32 over the products
        return products if dtype == torch.float32 else empty(*products.shape, dtype=dtype)

    n, tokens, D, V = 2048, 40, 4096, 128256
    bias, softcap = (empty(v), 30.0) if everything else (None, None)
    options = LogitOptions(v, bias, 1.0, softcap, padding)
    target, row = empty(n, dtype=torch.int64), empty(n)
    running = RunningSoftmax(row, row, row, row if everything else None)
    products, sample_products = empty(n, v), empty(samples, tokens, v)
    sample_row = empty(samples, tokens)
    with ahead_of_time.recorded(cc) as recorded:
        head_rows.online_softmax(products, options, target, running, out_of(products), empty(n, D))
        weight, lift = empty(V, D, dtype=dtype), gemm.lift(dtype)
        hidden = empty(n, D, dtype=dtype)
        results = LogProbs.empty(hidden, torch.float32, entropy=everything, grad_hidden=True)
        head_rows.finish_logprob(options, target, running, weight, empty(n, D), lift, results)
        head_rows.grad_logits(products, options, target, row, row, out_of(products))
        rows = [sample_row] * 3
        head_rows.quadratic_dot(sample_products, options, *rows, strata)
        head_rows.quadratic_grad_logits(
            sample_products,
            options,
            target,
            *rows,
            row,
            out_of(sample_products),
            strata,
        )
    return recorded


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", nargs="+", type=int, default=[90])
    parser.add_argument("--heads", nargs="+", default=["plain"], choices=["plain", "everything"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--strata", type=int, default=1)
    parser.add_argument("--padding", type=int, default=0)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for head, cc in itertools.product(options.heads, options.cc):
        samples = options.samples, options.strata
        sizes = options.columns, *samples, head == "everything", options.padding
        for launched in launches(dtype, *sizes, cc):
            tile = [launched.arguments.get(name, 1) for name in ("BM", "BV")]
            ahead_of_time.print_resources(launched, cc, head=head, tile=tile)


if __name__ == "__main__":
    main()
