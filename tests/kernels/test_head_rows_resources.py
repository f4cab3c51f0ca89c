"""What the compiler makes of the row passes, for a model's real sizes and without a GPU.

The compiler runs in another process, since this one may have Triton's interpreter loaded.
"""

import itertools
import json
from pathlib import Path

import ahead_of_time
import pytest

FILE = Path(__file__).resolve()
KERNELS = {"gather_kernel", "pull_kernel", "couple_kernel", "quadratic_pull_kernel"}


def compiled(*options):
    rows = ahead_of_time.compiled(FILE, *options)
    assert {row["kernel"] for row in rows} == KERNELS
    return rows


def check(rows, *, stack=0):
    for row in rows:
        assert row["stack"] <= stack and row["local"] == 0, row
        assert row["blocks_per_sm"] * row["warps"] >= 12, row


def test_real_blocks_are_read_once_16_bytes_at_a_time_without_a_spill():
    rows = compiled("--cc", "80", "90", "100")
    check(rows)
    for row in rows:
        loads, stores = {
            "gather_kernel": (4 + 1, 2 + 1),  # a row's 16 elements a thread, and total's 4
            "pull_kernel": (4, 2),
            "couple_kernel": (8, 0),  # 32 elements a thread, and sums that are narrow
            "quadratic_pull_kernel": (8, 4),
        }[row["kernel"]]
        assert (row["wide_loads"], row["wide_stores"]) == (loads, stores), row


def test_bias_soft_cap_and_entropy_do_not_spill():
    check(compiled("--cc", "90", "--heads", "everything"))


@pytest.mark.slow
@pytest.mark.parametrize("samples", ["2", "32", "128"])
@pytest.mark.parametrize("words", ["8192", "21376"])
def test_no_number_of_samples_and_no_long_row_spills(samples, words):
    sizes = ["--samples", samples, "--words", words]
    check(compiled("--cc", "80", "90", "100", "--heads", "plain", "everything", *sizes))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--dtype", "float32"], ["--words", "16593"]], ids=str)
def test_fp32_and_odd_widths_spill_at_most_what_the_assembler_likes_to(options):
    """It gives up a few scalars of gather to fit 2048 threads of 32 registers."""
    check(compiled("--cc", "80", "90", "100", "--heads", "plain", "everything", *options), stack=32)


def launches(dtype, words, samples, everything):
    """(kernel, arguments, options) of every launch of the four passes over a block."""
    import torch

    from fastperturb.kernels import head_rows
    from fastperturb.kernels import perturb_embed_tiles as tiles
    from fastperturb.ops.head_blocks import Logits, Running

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    recorded = []
    tiles.launch = lambda kernel, grid, *rest, **options: recorded.append((kernel, *rest, options))
    n, tokens, D = 2048, 40, 4096
    bias, softcap = (empty(words), 30.0) if everything else (None, None)
    logits = Logits(words, bias, 1.0, softcap)
    target, rows = empty(n, dtype=torch.int64), empty(n)
    products, each = empty(n, words), empty(samples, tokens)
    running = Running(rows, rows, rows, rows if everything else None)
    out = products if dtype == torch.float32 else empty(n, words, dtype=dtype)
    head_rows.gather(products, logits, target, running, out, empty(n, D))
    head_rows.pull(products, logits, target, rows, rows, out)
    products = empty(samples, tokens, words)
    out = products if dtype == torch.float32 else empty(samples, tokens, words, dtype=dtype)
    head_rows.couple(products, logits, each, each, each)
    head_rows.quadratic_pull(products, logits, target, each, each, each, rows, out)
    return recorded


def main():
    """Compile what would be launched and print one JSON object for each kernel."""
    import argparse

    import aot
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--cc", nargs="+", type=int, default=[90])
    parser.add_argument("--heads", nargs="+", default=["plain"], choices=["plain", "everything"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--words", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for head, cc in itertools.product(options.heads, options.cc):
        sizes = options.words, options.samples
        for kernel, arguments, launch_options in launches(dtype, *sizes, head == "everything"):
            built = aot.compile_launch(kernel, arguments, launch_options, cc)
            row = {"head": head, "kernel": kernel.fn.__name__, "cc": cc}
            row |= {"tile": [arguments.get("BM", 1), arguments["BV"]]}
            print(json.dumps(row | aot.resources(built, cc)), flush=True)


if __name__ == "__main__":
    main()
