"""A dry run: options and memory are printed, nothing is written."""

import pytest
import tiny_run

from fastperturb.train import run as command

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_dry_run_prints_options_steps_and_memory_and_writes_nothing(folder, tmp_path, capsys):
    options = tiny_run.options(folder, output_dir=tmp_path / "none", dry_run=True)
    assert command(options) == 0
    text = capsys.readouterr().out
    assert "learning_rate: 0.01" in text and "steps: 6" in text and "MiB" in text
    assert not (tmp_path / "none").exists()
