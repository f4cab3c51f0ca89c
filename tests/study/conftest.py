"""Fixtures for the tests of studies."""

import functools

import pytest
import tiny_run

from fastperturb.report import bootstrap


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Percentiles of a hundred resamples follow the same rules, and take no time."""
    few = functools.partial(bootstrap.mean_paired_difference, resamples=100)
    monkeypatch.setattr(bootstrap, "mean_paired_difference", few)


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A base model, a training text, a validation text and two domains."""
    folder = tmp_path_factory.mktemp("study")
    tiny_run.model_folder(folder / "base")
    for seed, name in enumerate(("train", "valid", "test", "other")):
        tiny_run.text_file(
            folder / f"{name}.txt", documents=24 if name == "train" else 8, seed=seed
        )
    return folder
