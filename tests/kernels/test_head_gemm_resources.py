"""The compiled GEMM of the heads, for a model's real sizes and without a GPU."""

import argparse
import itertools
import json

import torch

from bench import ahead_of_time
from fastperturb.kernels import head_gemm
from fastperturb.ops.calls import LogitOptions, RunningSoftmax

EPILOGUES = ["softmax", "sums", "grad_logits"]
MMA = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


def gemms(*options):
    rows = ahead_of_time.compiled(__file__, *options)
    ahead_of_time.assert_fits(rows, warps_per_sm=8)
    gemms = [row for row in rows if row["kernel"] == "head_gemm_kernel"]
    assert len(gemms) >= len(EPILOGUES)
    return gemms


def check(row):
    """Tensor cores read what TMA has brought; no epilogue writes a result by anything else."""
    assert row["mma"] == [MMA[row["cc"]]] and row["tma_loads"] > 0, row
    assert row["tma_stores"] > 0 or row["epilogue"] == "sums", row
    assert row["wide_stores"] == row["narrow_stores"] == 0, row


def test_its_operands_and_results_go_by_tma_and_none_of_its_epilogues_spills():
    for row in gemms("--cc", "90", "100"):
        check(row)
        if row["cc"] == 90:  # one program a multiprocessor, which has 255 and 232,448
            assert row["registers"] <= 216 and row["shared"] <= 213_536, row


def test_on_hopper_a_product_is_under_way_while_the_next_one_is_issued():
    """One in flight between steps; all are waited for before an epilogue and at the end only."""
    assert all(row["waits"] == [1, 0, 0] for row in gemms("--cc", "90"))


def test_bias_soft_cap_and_fp16_do_not_spill():
    for row in gemms("--cc", "90", "100", "--heads", "everything", "--dtype", "float16"):
        check(row)


def test_a_kernel_is_compiled_once_for_all_numbers_of_rows_and_entries():
    sizes = [f"{rows}x{entries}" for rows in (1, 12288, 8191) for entries in (1, 16384, 4097)]
    rows = gemms("--sizes", *sizes)
    assert len(rows) == len(sizes) * len(EPILOGUES)
    assert len({row["compiled"] for row in rows}) == len(EPILOGUES)


def launches(dtype, n, v, D, everything, cc):
    """The launches of the three epilogues and of the merging, by name."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    bias, scale, softcap = (empty(v), 1.3, 30.0) if everything else (None, 1.0, None)
    options = LogitOptions(v, bias, scale, softcap)
    hidden, weight = empty(n, D, dtype=dtype), empty(v, D, dtype=dtype)
    weights = empty(n, v + -v % 64, dtype=dtype)[:, :v]
    target, row = empty(n, dtype=torch.int64), empty(n)
    running = RunningSoftmax(row, row, row, None)
    with ahead_of_time.recorded(cc) as recorded:
        block = head_gemm.online_softmax(hidden, weight, options, target, running, weights)
        head_gemm.online_softmax(hidden, weight, options, target, running, None)
        head_gemm.grad_logits(hidden, weight, options, target, empty(2, n), row, weights)
        head_gemm.merge(block, running, empty(n, D), empty(1, dtype=torch.int32))
    return zip([*EPILOGUES, "merge"], recorded)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", nargs="+", type=int, default=[90])
    parser.add_argument("--heads", nargs="+", default=["plain"], choices=["plain", "everything"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sizes", nargs="+", default=["12288x16384"])
    options = parser.parse_args()
    dtype, seen = getattr(torch, options.dtype), []
    for head, cc, size in itertools.product(options.heads, options.cc, options.sizes):
        n, v = map(int, size.split("x"))
        for name, launched in launches(dtype, n, v, 4096, head == "everything", cc):
            kernel = ahead_of_time.compile_launch(launched, cc)
            seen += [kernel] if kernel not in seen else []
            row = {"head": head, "cc": cc, "size": size, "epilogue": name}
            row |= {"kernel": launched.kernel.fn.__name__, "compiled": seen.index(kernel)}
            print(json.dumps(row | ahead_of_time.resources(kernel, cc)), flush=True)


if __name__ == "__main__":
    main()
