"""The command: models found and loaded, compared on texts, and what is left in the folder."""

import json
import re
from pathlib import Path

import pytest
import tiny_run
import tokenizers
import torch
import transformers

import fastperturb
from fastperturb.cli import main as cli
from fastperturb.data import domains
from fastperturb.data.domains import DomainOptions
from fastperturb.eval import likelihood, models, pictures, table
from fastperturb.eval import run as command
from fastperturb.eval.likelihood import Likelihood
from fastperturb.eval.options import EvalOptions
from fastperturb.report import bootstrap
from fastperturb.train import LoraOptions
from fastperturb.train import run as train

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_cache):
    """A base, two texts, and what training left: learned, exact, and all weights."""
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


def options_of(folder, output, **changes):
    given = {
        "models": (f"learned={folder / 'learned'}", f"plain={folder / 'base'}"),
        "domains": (f"near={folder / 'near.txt'}", f"far={folder / 'far.txt'}"),
        "document_separator": "\n\n",
        "block_size": 16,
        "num_samples": 4,
        "device": "cpu",
        "output_dir": output,
    }
    return EvalOptions(**given | changes)


def results_of(output):
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """The command as a user calls it, and what it left."""
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


def test_the_command_measures_what_the_loaded_models_score(evaluated, folder):
    found = results_of(evaluated)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    bases = {"learned": "base", "exact": "base", "whole": "whole/model"}
    for name, base in bases.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / base)
        inner = "best" if name == "learned" else "model"
        lm = fastperturb.load(model, folder / name / inner)
        [untuned] = [
            each for each in found["measurements"] if each["model"] == name and not each["tuned"]
        ]
        for domain in ("near", "far"):
            text = domains.read(domain, str(folder / f"{domain}.txt"), options, tokenizer)
            expected = likelihood.measure(lm, text, num_samples=8, seed=0, batch_size=8)
            kept = Likelihood.from_dict(untuned["domains"][domain])
            assert kept.nll_sums == pytest.approx(expected.nll_sums)
            assert kept.num_samples == expected.num_samples == (1 if name == "exact" else 8)


def test_everyone_is_compared_with_the_baseline_at_its_tuned_temperature(evaluated):
    found = results_of(evaluated)
    assert found["reference"]["model"] == "exact" and found["reference"]["tuned"]
    by_heading = {(e["model"], e["tuned"]): e["domains"] for e in found["measurements"]}
    # Learned and whole are perturbed, and stand there without their noise too.
    assert len(by_heading) == 2 * (4 + 2)
    reference = {k: Likelihood.from_dict(v) for k, v in by_heading["exact", True].items()}
    compared = {(each["model"], each["tuned"]) for each in found["differences"]}
    assert compared == by_heading.keys() - {("exact", True)}
    for each in found["differences"]:
        ours = by_heading[each["model"], each["tuned"]]
        ours = {name: Likelihood.from_dict(values) for name, values in ours.items()}
        for name, interval in each["domains"].items():
            expected = bootstrap.paired_difference(ours[name], reference[name])
            assert interval == expected.to_dict()
        pairs = [(ours[name], reference[name]) for name in ours]
        assert each["mean"] == bootstrap.mean_paired_difference(pairs).to_dict()


def test_tuning_is_on_the_text_that_was_named(evaluated, folder):
    [tuned] = [
        each["temperature"]
        for each in results_of(evaluated)["measurements"]
        if each["model"] == "plain" and each["tuned"]
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("t", str(folder / "valid.txt"), options, tokenizer)
    lm = fastperturb.wrap(model, fastperturb.PerturbConfig())
    with lm.exact():
        how = {"num_samples": 1, "seed": 0, "batch_size": 8}
        assert tuned == pytest.approx(likelihood.tuned_temperature(lm, text, **how), rel=1e-3)


def test_a_perturbed_model_is_judged_without_its_noise_too(evaluated, folder):
    found = {
        each["model"]: each["domains"]["far"]
        for each in results_of(evaluated)["measurements"]
        if not each["tuned"]
    }
    assert "exact, without noise" not in found and "plain, without noise" not in found
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lm = fastperturb.load(model, folder / "learned" / "best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("far", str(folder / "far.txt"), options, tokenizer)
    with lm.exact():
        expected = likelihood.measure(lm, text, num_samples=1, seed=0, batch_size=8)
    assert found["learned, without noise"]["nll"] == pytest.approx(expected.nll)
    assert found["learned, without noise"]["num_samples"] == 1


def test_the_unigram_of_the_text_itself_stands_in_the_table(evaluated, folder):
    found = results_of(evaluated)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("far", str(folder / "far.txt"), options, tokenizer)
    counts = likelihood.label_counts(text.blocks, 63)
    own = likelihood.unigram(text, counts, smoothing=0.0)
    assert found["unigram"]["far"]["nll"] == pytest.approx(own.nll)
    rows = (evaluated / "table.md").read_text().splitlines()
    [row] = [row for row in rows if row.startswith("| unigram of the text itself")]
    assert f"{own.perplexity:.4g}" in row


def test_the_folder_tells_where_numbers_come_from(evaluated, folder):
    found = results_of(evaluated)
    assert found["config"]["num_samples"] == 8
    assert found["versions"]["fastperturb"] == fastperturb.__version__
    assert {"device", "commit"} <= found.keys()
    learned, _, _, plain = found["models"]
    assert learned["checkpoint"] == str(folder / "learned" / "best")
    assert learned["perturbation"]["num_samples"] == 4
    assert (plain["checkpoint"], plain["perturbation"]) == (None, None)
    assert [each["documents"] for each in found["domains"]] == [10, 10]
    labels = sum(found["measurements"][0]["domains"]["near"]["counts"])
    assert found["domains"][0]["labels"] == labels


def test_continuations_are_kept_with_their_truths_and_judged(evaluated):
    lines = (evaluated / "continuations.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [each["domain"] for each in kept] == ["near"] * 3 + ["far"] * 3
    assert all(each["written"].keys() == {"learned", "exact", "whole", "plain"} for each in kept)
    rows = results_of(evaluated)["continuations"]
    assert [each["model"] for each in rows[:5]] == [None, "learned", "exact", "whole", "plain"]
    assert rows[0]["rouge1"] is None and 0 <= rows[1]["rouge1"]["estimate"] <= 1
    assert all(each["documents"] == 3 for each in rows)


def test_every_model_and_temperature_is_in_every_table(evaluated):
    found = results_of(evaluated)
    by_title = {each.title: each for each in table.tables(found)}
    assert len(by_title) == 5
    assert len(by_title["Perplexity of a token"].rows) == 1 + 12
    [changes] = [each for title, each in by_title.items() if title.startswith("Change")]
    assert len(changes.rows) == 11 * 3  # two domains and their mean
    assert len(by_title["Were there enough draws?"].rows) == 2 * 2 * 2  # learned and whole
    text = (evaluated / "table.md").read_text()
    assert text == table.markdown(table.tables(found))


def test_a_temperature_that_would_go_further_is_marked(evaluated):
    found = results_of(evaluated)
    tuned = [each for each in found["measurements"] if each["tuned"]]
    for each, temperature in zip(tuned, (0.501, 1.0, 1.9, 1.998)):
        each["temperature"] = temperature
    shown = [row[1] for row in table.perplexities(found).rows[1:] if "tuned" in row[1]]
    assert shown[:4] == ["0.501 tuned (bound)", "1 tuned", "1.9 tuned", "2 tuned (bound)"]


def test_a_handful_of_documents_is_marked(folder, tmp_path):
    options = options_of(folder, tmp_path / "out", max_documents=4)
    assert command(options) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"\| near +\| +4 \(few\) \|", text) and "too narrow to trust" in text
    assert "] (few) |" in text


def test_one_model_of_one_draw_needs_no_comparison_and_no_picture(folder, tmp_path):
    alone = {"models": (str(folder / "base"),), "domains": (str(folder / "near.txt"),)}
    assert command(options_of(folder, tmp_path / "out", **alone)) == 0
    found = results_of(tmp_path / "out")
    assert found["domains"][0]["name"] == str(folder / "near.txt")
    assert found["differences"] == []
    assert not (tmp_path / "out" / "evaluation.png").exists()

    warmer = options_of(folder, tmp_path / "warmer", **alone, temperatures=(1.0, 2.0))
    assert command(warmer) == 0
    [difference] = results_of(tmp_path / "warmer")["differences"]
    assert (difference["temperature"], difference["mean"]) == (2.0, None)
    assert (tmp_path / "warmer" / "evaluation.png").exists()


def test_bf16_is_near_fp32(folder, tmp_path):
    nll = {}
    for precision in ("fp32", "bf16"):
        output = tmp_path / precision
        assert command(options_of(folder, output, precision=precision)) == 0
        both = results_of(output)["measurements"]
        nll[precision] = [each["domains"]["near"]["nll"] for each in both]
    assert nll["bf16"] != nll["fp32"]
    assert nll["bf16"] == pytest.approx(nll["fp32"], rel=0.01)


def test_the_picture_shows_a_panel_for_each_domain_and_their_mean(evaluated, tmp_path, monkeypatch):
    kept = []
    draw_part = pictures._panels
    monkeypatch.setattr(
        pictures, "_panels", lambda *args, **more: kept.append(draw_part(*args, **more)) or kept[-1]
    )
    pictures.draw(results_of(evaluated), tmp_path / "p.png")
    curves, changes = kept
    assert [axes.get_title(loc="left") for axes in curves] == ["near", "far"]
    assert len(curves[0].lines) == 12
    titles = [axes.get_title(loc="left") for axes in changes]
    assert titles == ["near", "far", "mean of the domains"]
    assert changes[0].get_yticklabels()[0].get_text() == "learned"


# Finding models


def test_of_a_run_the_best_model_counts_and_else_the_last(folder):
    assert models.find("m", str(folder / "learned"), None).checkpoint == folder / "learned" / "best"
    assert models.find("m", str(folder / "exact"), None).checkpoint == folder / "exact" / "model"
    inner = folder / "learned" / "model"
    assert models.find("m", str(inner), None).checkpoint == inner


def test_the_base_is_what_the_checkpoint_names_or_holds(folder):
    assert models.find("m", str(folder / "learned"), None).base == str(folder / "base")
    assert models.find("m", str(folder / "learned"), "elsewhere").base == "elsewhere"
    whole = folder / "whole" / "model"
    assert models.find("m", str(folder / "whole"), "elsewhere").base == str(whole)


def test_a_plain_model_is_judged_on_exact_prefixes(folder, tmp_path):
    options = options_of(folder, tmp_path)
    lm = models.load(models.find("m", str(folder / "base"), None), options)
    ids = torch.tensor([[5, 8, 13, 21, 34]])
    expected = lm.base(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    found = lm.score(ids, num_samples=1)
    torch.testing.assert_close(found.log_marginal, expected[..., 0])
    assert not likelihood.moves(lm)


def test_a_base_that_has_moved_can_be_named(folder, tmp_path):
    moved = tmp_path / "learned"
    for file in (folder / "learned" / "best").iterdir():
        if not file.name.startswith("token"):
            moved.mkdir(exist_ok=True)
            (moved / file.name).write_bytes(file.read_bytes())
    place = models.Place("learned", moved, str(tmp_path / "gone"), str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="cannot be loaded: .* has moved, set base"):
        models.load(place, options_of(folder, tmp_path))
    place = models.find("learned", str(moved), str(folder / "base"))
    assert place.tokenizer == str(folder / "base")
    assert models.load(place, options_of(folder, tmp_path)).config.num_samples == 4


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("./nowhere", "model 'm': there is no folder ./nowhere"),
        ("a/b/c", "there is no folder a/b/c"),
        ("{folder}", "holds no perturbation_config.json, .* Has its training run finished"),
    ],
)
def test_a_model_that_is_not_there_is_named(where, message, folder):
    with pytest.raises(ValueError, match=message):
        models.find("m", where.format(folder=folder), None)


def test_models_of_two_tokenizers_are_not_compared(folder, tmp_path):
    other = tiny_run.model_folder(tmp_path / "other")
    words = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    words.add_tokens(["w99"])
    words.save(str(other / "tokenizer.json"))
    options = options_of(folder, tmp_path / "out", models=(f"a={folder / 'base'}", f"b={other}"))
    with pytest.raises(ValueError, match="models 'a' and 'b' have different tokenizers"):
        command(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 4096}, "block_size = 4096 is more than the 2048 positions that model 'm'"),
        (
            {"continuations": 2, "prompt_tokens": 4, "continuation_tokens": 3000},
            "prompt_tokens . continuation_tokens = 3004 is more than the 2048 positions",
        ),
    ],
)
def test_what_a_model_has_no_positions_for_is_refused(changes, message, folder, tmp_path):
    place = models.find("m", str(folder / "base"), None)
    with pytest.raises(ValueError, match=message):
        models.load(place, options_of(folder, tmp_path, **changes))


# Options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "models must have at least one entry"),
        ({"models": ("a=x", "a=y")}, "models has the name 'a' twice"),
        ({"domains": ("=x",)}, "domains must be NAME=WHERE, got '=x'"),
        ({"baseline": "b"}, r"baseline must be one of \['learned', 'plain'\], got 'b'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"temperatures": (1.0, 0.0)}, "temperatures must be numbers above 0"),
        ({"continuations": -1}, "continuations must be 0 or above"),
        ({"mauve_features": Path("x")}, "mauve_features is about continuations"),
        ({"mauve_features": Path("x"), "continuations": 2}, "x is no folder of a model"),
        ({"max_documents": 0}, "max_documents must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        options_of(folder, tmp_path, **changes)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "mauve",
            r"mauve_features needs the package mauve-text: pip install 'fastperturb\[mauve\]'",
        ),
        ("rouge_score", r"continuations needs the package rouge-score"),
        ("scipy", r"tune_on needs the package scipy: pip install 'fastperturb\[eval\]'"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_read(
    package, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "fastperturb.eval.options.find_spec",
        lambda name: None if name == package else object(),
    )
    with pytest.raises(ValueError, match=message):
        options_of(
            folder, tmp_path, continuations=1, mauve_features=folder / "base", tune_on="nowhere"
        )
