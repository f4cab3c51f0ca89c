"""What the compiler makes of the kernels, for a model's real sizes and without a GPU.

The compiler runs in another process, since this one may have Triton's interpreter loaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastperturb.config import TRANSFORMS

HERE = Path(__file__).resolve().parent

# For an fp32 table on sm_80 the three tf32 products of mlp's backward outgrow the registers.
KNOWN_SPILL = ("mlp", "backward_kernel", 80, "float32")


def compiled(*options):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "aot.py"), *options],
        cwd=HERE.parent.parent,
        env={**environment, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(*rows, sep="\n")
    return rows


def check(rows, dtype):
    assert {row["family"] for row in rows} == set(TRANSFORMS)
    for row in rows:
        if (row["family"], row["kernel"], row["cc"], dtype) == KNOWN_SPILL:
            assert row["stack"] <= 64, row
            continue
        assert row["stack"] == row["local"] == 0, row
        assert row["wide_loads"] > 0, row
        if row["kernel"] != "backward_kernel" or row["family"] != "diagonal":
            assert row["wide_stores"] > 0, row  # diagonal's stores one row of s a program
        assert row["blocks_per_sm"] >= 1 and row["blocks_per_sm"] * row["warps"] >= 8, row


def test_no_kernel_spills_and_every_kernel_moves_16_bytes_at_once():
    rows = compiled("--dtype", "bfloat16", "--cc", "80", "90", "100")
    check(rows, "bfloat16")
    lowrank = [row for row in rows if row["family"] == "lowrank"]
    assert all("wgmma.mma_async" in row["mma"] for row in lowrank if row["cc"] == 90)
    assert all("tcgen05.mma" in row["mma"] for row in lowrank if row["cc"] == 100)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_spills_with_the_embeddings_gradient_or_in_another_dtype(dtype):
    check(compiled("--dtype", dtype, "--want-table", "--cc", "80", "90", "100"), dtype)
    if dtype != "bfloat16":
        check(compiled("--dtype", dtype, "--cc", "80", "90", "100"), dtype)
