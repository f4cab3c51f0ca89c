"""The command `rank`: models measured on pieces of a text, and the files of its folder."""

import json

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastperturb
from fastperturb.cli import main as cli
from fastperturb.rank import (
    ModelOracle,
    RankOptions,
    exponent_difference,
    kl_by_rank,
    logit_matrix,
    power_law,
    spectrum,
)
from fastperturb.rank import run as command
from fastperturb.rank.texts import TextPieces
from fastperturb.train import run as train

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_cache):
    """A base model, texts, and the folders of two trainings."""
    folder = tmp_path_factory.mktemp("rank")
    tiny_run.model_folder(folder / "base")
    tiny_run.text_file(folder / "train.txt")
    tiny_run.text_file(folder / "text.txt", documents=200, seed=1)
    for name, method in {"learned": "learned", "exact": "exact"}.items():
        train(tiny_run.options(folder, output_dir=folder / name, max_steps=3, method=method))
    return folder


def options_of(folder, output, **changes):
    options = {
        "models": (f"plain={folder / 'base'}",),
        "text": str(folder / "text.txt"),
        "document_separator": "\n\n",
        "histories": 80,
        "history_tokens": 6,
        "futures": 8,
        "future_tokens": 3,
        "targets": 3,
        "steps": 4,
        "continuations": 2,
        "num_samples": 4,
        "device": "cpu",
        "output_dir": output,
    }
    return RankOptions(**options | changes)


@pytest.fixture(scope="module")
def ranked(folder, tmp_path_factory):
    """The output folder and results of the command as a user calls it."""
    output = tmp_path_factory.mktemp("out") / "rank"
    argv = [
        *("rank", "--models", f"plain={folder / 'base'}", f"learned={folder / 'learned'}"),
        *("--text", str(folder / "text.txt"), "--document-separator", "\n\n"),
        *("--histories", "80", "--history-tokens", "6", "--futures", "8", "--future-tokens", "3"),
        *("--targets", "3", "--steps", "4", "--continuations", "2", "--num-samples", "4"),
        *("--earlier", str(folder / "exact"), "--device", "cpu", "--output-dir", str(output)),
    ]
    assert cli.main(argv) == 0
    return output, json.loads((output / "results.json").read_text())


def pieces_of(folder):
    """The pieces of text on which the command measures."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = (folder / "text.txt").read_text().split("\n\n")
    documents = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    sizes = {"histories": 80, "history_tokens": 6, "futures": 8, "future_tokens": 3, "targets": 3}
    return TextPieces.cut_from(documents, **sizes, seed=0)


def matrix_of(folder, model, **options):
    pieces = pieces_of(folder)
    oracle = ModelOracle(model, **options)
    return logit_matrix(oracle, pieces.histories, pieces.futures).values


def test_results_are_those_of_the_models_logits(folder, ranked):
    _, results = ranked
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    values = matrix_of(folder, base)
    plain, expected = results["models"]["plain"], spectrum(values)
    assert plain["spectrum"] == expected.to_dict()
    assert plain["exponent"] == power_law(expected).to_dict()
    held_out = kl_by_rank(values[1::2], spectrum(values[::2]), learned_from=values[::2])
    assert plain["kl"][1] == held_out.to_dict()


def test_a_perturbed_model_is_measured_under_its_noise_and_without_it(folder, ranked):
    _, results = ranked
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    lm = fastperturb.load(base, folder / "learned" / "model").eval()
    noisy = spectrum(matrix_of(folder, lm, num_samples=4))
    with lm.exact():
        exact = spectrum(matrix_of(folder, lm))
    models = results["models"]
    assert list(models) == ["plain", "learned", "learned, without noise"]
    for name, expected in {"learned": noisy, "learned, without noise": exact}.items():
        values = models[name]["spectrum"]["singular_values"]
        np.testing.assert_allclose(values, expected.singular_values, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")  # without the adapter
    plain = spectrum(matrix_of(folder, base.eval()))
    difference = exponent_difference(noisy, plain).to_dict()
    assert list(results["differences"]) == list(models)[1:]
    assert results["differences"]["learned"] == pytest.approx(difference, rel=1e-3)


def test_combinations_are_compared_with_every_baseline(ranked):
    _, results = ranked
    comparisons = {name: model["generation"] for name, model in results["models"].items()}
    names = [way["name"] for way in comparisons["plain"]["ways"]]
    assert names == [
        *("linear combination", "of shuffled histories", "empty future"),
        *("last token", "last 3 tokens", "last 4 tokens", "earlier checkpoint", "unigram"),
    ]
    assert "earlier checkpoint" not in [way["name"] for way in comparisons["learned"]["ways"]]
    for comparison in comparisons.values():
        for way in comparison["ways"]:
            assert len(way["kl_by_step"]) == 4
            assert way["cumulative"]["estimate"] == pytest.approx(sum(way["kl_by_step"]))


def test_written_examples_are_decoded_text(folder, ranked):
    _, results = ranked
    written = results["models"]["plain"]["generation"]["written"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    for example, target in zip(written, pieces_of(folder).targets, strict=True):
        ids = torch.tensor([target])
        for _ in range(4):
            ids = torch.cat([ids, base(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert example["target"] == tokenizer.decode(target)
        assert example["model"] == tokenizer.decode(ids[0, 6:])
        assert len(example["combination"].split()) == 4


def test_the_folder_holds_tables_pictures_and_provenance(ranked):
    output, results = ranked
    text = (output / "table.md").read_text()
    exponent = results["models"]["learned"]["exponent"]["estimate"]
    assert f"{exponent:.3f} [" in text
    for title in ("Logit rank", "KL of the matrix", "Principal angles", "Written text: plain"):
        assert f"## {title}" in text
    for picture in ("spectrum.png", "generation.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) > 400
    assert {"versions", "device", "commit", "config"} <= set(results)


def test_the_same_seed_gives_the_same_results(folder, tmp_path):
    models = []
    for name, seed in {"first": 0, "again": 0, "other": 1}.items():
        torch.manual_seed(len(models))
        command(options_of(folder, tmp_path / name, seed=seed, targets=2))
        results = json.loads((tmp_path / name / "results.json").read_text())
        models.append(results["models"])
    assert models[0] == models[1] != models[2]


def test_under_top_k_all_models_are_measured_on_the_tokens_of_the_first(folder, tmp_path):
    two = (f"plain={folder / 'base'}", f"exact={folder / 'exact'}")
    command(options_of(folder, tmp_path / "out", models=two, top_k=20))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    pieces = pieces_of(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    rows = [*pieces.histories, *pieces.targets]
    tokens = logit_matrix(base, rows, pieces.futures, top_k=20).tokens
    lm = fastperturb.load(base, folder / "exact" / "model").eval()
    values = logit_matrix(lm.base, rows, pieces.futures, top_k=tokens).values[:80]
    exact = results["models"]["exact"]["spectrum"]
    assert exact["shape"] == [80, len(pieces.futures), 20]
    expected = spectrum(values).singular_values
    np.testing.assert_allclose(exact["singular_values"], expected, rtol=1e-4)
    assert "exact" in results["differences"]


def test_a_vocabulary_smaller_than_top_k_is_kept_whole(folder, tmp_path):
    command(options_of(folder, tmp_path / "out", top_k=500, targets=0))
    plain = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["plain"]
    assert plain["spectrum"]["shape"][2] == 63
    assert "generation" not in plain


@pytest.mark.parametrize("noise", [None, fastperturb.PerturbConfig()], ids=["edits", "hybrid"])
def test_an_edited_model_is_rejected_before_anything_is_measured(folder, tmp_path, noise):
    base, edits = AutoModelForCausalLM.from_pretrained(folder / "base"), fastperturb.EditConfig()
    lm = (
        fastperturb.edit(base, edits)
        if noise is None
        else fastperturb.wrap(base, noise, edits=edits)
    )
    lm.save_pretrained(tmp_path / "edited")
    places = (f"plain={folder / 'base'}", f"edited={tmp_path / 'edited'}")
    options = options_of(folder, tmp_path / "out", models=places, base=str(folder / "base"))
    with pytest.raises(ValueError, match="model 'edited' edits tokens at random"):
        command(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"histories": 79}, "histories must be at least 80, got 79"),
        ({"top_k": 1}, "top_k must be at least 2, got 1"),
        (
            {"targets": 0, "earlier": "x"},
            "earlier is compared on targets: set targets to 2 or more",
        ),
        ({"models": ("a=x", "a=y")}, "models has the name 'a' twice"),
        ({"histories": 5000}, "different pieces of 6 tokens, too few for 5000 histories"),
        ({"targets": 1}, "targets must be 0, or at least 2 to give an interval"),
        ({"steps": 4096}, "future_tokens or steps = 4103 is more than the 2048"),
        ({"text": "./nowhere.txt"}, "there is no such file or folder"),
    ],
)
def test_options_that_cannot_be_measured_are_rejected(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(options_of(folder, tmp_path / "out", **changes))


@pytest.mark.slow
def test_combinations_of_prompts_predict_a_real_model_better_than_baselines(data_dir, tmp_path):
    options = RankOptions(
        models=(f"base={data_dir / 'models' / 'stories260K-hf'}",),
        text=str(data_dir / "stories" / "valid.txt"),
        histories=300,
        history_tokens=16,
        futures=16,
        targets=6,
        steps=8,
        device="cpu",
        output_dir=tmp_path / "out",
    )
    command(options)
    base = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["base"]
    assert 0.3 < base["exponent"]["estimate"] < 1.0 and base["exponent"]["r_squared"] > 0.95
    ways = {way["name"]: way for way in base["generation"]["ways"]}
    ours = ways["linear combination"]["cumulative"]["estimate"]
    for name in ("empty future", "last token", "unigram"):
        assert ours < 0.8 * ways[name]["cumulative"]["estimate"]
