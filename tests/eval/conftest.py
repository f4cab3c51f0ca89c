"""Trained models and an evaluation of them, which the tests of eval share."""

import pytest
import tiny_run

from fastperturb.cli import main as cli
from fastperturb.train import LoraOptions
from fastperturb.train import run as train


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    """Cache the datasets that are read in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory, cache):
    """A base model, texts, and three trained models: learned, exact, and one of all weights."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_run.model_folder(folder / "base")
    tiny_run.text_file(folder / "train.txt")
    for seed, (name, documents) in enumerate({"near": 10, "far": 10, "valid": 5}.items(), 1):
        tiny_run.text_file(folder / f"{name}.txt", documents=documents, seed=seed)
    for name, changes in {
        "learned": {"eval_data": (str(folder / "near.txt"),)},
        "exact": {"method": "exact"},
        "whole": {"method": "fixed", "lora": LoraOptions(rank=0)},
    }.items():
        train(tiny_run.options(folder, output_dir=folder / name, max_steps=3, **changes))
    return folder


@pytest.fixture(scope="package")
def evaluated(folder, tmp_path_factory):
    """The output folder of the command, called as a user calls it."""
    output = tmp_path_factory.mktemp("out") / "eval"
    argv = [
        *("eval", "--models", f"learned={folder / 'learned'}", f"exact={folder / 'exact'}"),
        *(f"whole={folder / 'whole' / 'model'}", f"plain={folder / 'base'}"),
        *("--domains", f"near={folder / 'near.txt'}", f"far={folder / 'far.txt'}"),
        *("--baseline", "exact", "--tune-on", str(folder / "valid.txt")),
        *("--document-separator", "\n\n", "--block-size", "16", "--num-samples", "8"),
        *("--continuations", "3", "--prompt-tokens", "4", "--continuation-tokens", "5"),
        *("--device", "cpu", "--output-dir", str(output)),
    ]
    assert cli.main(argv) == 0
    return output
