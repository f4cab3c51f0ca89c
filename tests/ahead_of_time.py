"""Runs a script that compiles kernels, in a process without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path


def compiled(script, *options):
    """The JSON objects that the script prints, one a line."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    tests = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(*rows, sep="\n")
    return rows
