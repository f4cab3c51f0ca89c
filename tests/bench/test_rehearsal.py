"""`make gpu` in rehearsal: the CPU stands in for the card."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_stage_of_make_gpu_runs_to_its_end_without_failure(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.rehearsal", "--short", "--output-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "results.json").read_text())["stages"]
    stages = ["doctor", "checks", "step", "memory", "heads", "perturb_embed"]
    assert [name for name, result in results.items() if result["ok"]] == stages
    assert " passed" in results["checks"]["tests0"]["output"][-1]
    rows = {row["metric"] for row in results["heads"]["rows"] if row["provider"] == "triton"}
    assert {"milliseconds", "milliseconds_idle", "milliseconds_replayed"} <= rows
