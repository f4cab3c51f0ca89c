"""The kernel tests in Triton's interpreter, for machines without a GPU.

Triton chooses its interpreter when it is imported, so those tests run in a process of their own.
In this process they are marked `gpu`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def interpret(file: str, marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", "-m", marks, str(HERE / file)],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    "file",
    [
        "test_combine.py",
        "test_context_scan.py",
        "test_head_fused.py",
        "test_head_gemm.py",
        "test_head_rows.py",
        "test_noise.py",
        "test_perturb_embed.py",
    ],
)
def test_the_kernels_pass_their_tests_in_the_interpreter(file):
    interpret(file, "not slow and not gpu")


@pytest.mark.slow
def test_the_kernels_pass_their_slow_tests_in_the_interpreter():
    interpret("test_perturb_embed.py", "slow and not gpu")
