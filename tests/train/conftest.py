"""Fixtures of the training tests."""

import pytest
import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a training text and a held-out text."""
    folder = tmp_path_factory.mktemp("training")
    tiny_run.model_folder(folder / "base")
    tiny_run.model_folder(folder / "dropout", kind="gpt2")
    tiny_run.text_file(folder / "train.txt")
    tiny_run.text_file(folder / "long.txt", documents=300, seed=2)
    tiny_run.text_file(folder / "held_out.txt", documents=6, seed=1)
    return folder
