"""What the compiler makes of the kernels, for a model's real sizes and without a GPU.

The compiler runs in another process, since this one may have Triton's interpreter loaded.
"""

from pathlib import Path

import ahead_of_time
import pytest

from fastperturb.config import TRANSFORMS

HERE = Path(__file__).resolve().parent


def compiled(*options):
    return ahead_of_time.compiled(HERE / "aot.py", *options)


def check(rows, families=TRANSFORMS):
    assert {row["family"] for row in rows} == set(families)
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert row["wide_loads"] > 0, row
        if row["kernel"] != "backward_kernel" or row["family"] != "diagonal":
            assert row["wide_stores"] > 0, row  # diagonal's stores one row of s a program
        # Past H = 64 mlp's forward holds two blocks of C, too much memory for two of it on Ampere.
        least = 8 if row["size"] == "16x64" else 4
        assert row["blocks_per_sm"] * row["warps"] >= least, row


def test_no_kernel_spills_and_every_kernel_moves_16_bytes_at_once():
    rows = compiled("--dtype", "bfloat16", "--cc", "80", "90", "100")
    check(rows)
    lowrank = [row for row in rows if row["family"] == "lowrank"]
    assert all("wgmma.mma_async" in row["mma"] for row in lowrank if row["cc"] == 90)
    assert all("tcgen05.mma" in row["mma"] for row in lowrank if row["cc"] == 100)


def test_the_widest_backwards_do_not_spill_for_few_or_many_latents_and_hidden_units():
    families = ("gated", "affine", "mlp")
    options = ["--families", *families, "--directions", "backward", "--sizes", "4x32", "64x128"]
    check(compiled(*options, "--dtype", "bfloat16", "--cc", "90"), families)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_spills_with_the_embeddings_gradient_or_in_another_dtype(dtype):
    check(compiled("--dtype", dtype, "--want-table", "--cc", "80", "90", "100"))
    if dtype != "bfloat16":
        check(compiled("--dtype", dtype, "--cc", "80", "90", "100"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--want-table"]], ids=["frozen", "with the table"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_kernel_spills_for_any_number_of_latents_and_hidden_units(dtype, options):
    families = [family for family in TRANSFORMS if family != "diagonal"]  # it has neither
    sizes = ["--sizes", "8x16", "32x256", "128x128"]
    rows = compiled(
        "--families", *families, *sizes, "--dtype", dtype, "--cc", "80", "90", "100", *options
    )
    check(rows, families)
