"""The command from end to end: its measurements, differences and output folder."""

import json
import re

import pytest
import transformers
from eval_cases import options_of, results_of

import fastperturb
from fastperturb.data import domains
from fastperturb.data.domains import DomainOptions
from fastperturb.eval import likelihood
from fastperturb.eval import run as command
from fastperturb.eval.likelihood import Likelihood
from fastperturb.report import bootstrap

pytestmark = pytest.mark.usefixtures("own_cache")


def test_measurements_are_the_likelihoods_of_the_loaded_models(evaluated, folder):
    results = results_of(evaluated)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    bases = {"learned": "base", "exact": "base", "whole": "whole/model"}
    for name, base in bases.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / base)
        inner = "best" if name == "learned" else "model"
        lm = fastperturb.load(model, folder / name / inner)
        [untuned] = [m for m in results["measurements"] if m["model"] == name and not m["tuned"]]
        for domain in ("near", "far"):
            text = domains.read(domain, str(folder / f"{domain}.txt"), options, tokenizer)
            expected = likelihood.measure(lm, text, num_samples=8, seed=0, batch_size=8)
            measured = Likelihood.from_dict(untuned["domains"][domain])
            assert measured.nll_sums == pytest.approx(expected.nll_sums)
            assert measured.num_samples == expected.num_samples == (1 if name == "exact" else 8)


def test_all_models_are_compared_with_the_baseline_at_its_tuned_temperature(evaluated):
    results = results_of(evaluated)
    assert results["reference"]["model"] == "exact" and results["reference"]["tuned"]
    by_heading = {(e["model"], e["tuned"]): e["domains"] for e in results["measurements"]}
    # Learned and whole are perturbed, and are measured without their noise too.
    assert len(by_heading) == 2 * (4 + 2)
    reference = {k: Likelihood.from_dict(v) for k, v in by_heading["exact", True].items()}
    compared = {(d["model"], d["tuned"]) for d in results["differences"]}
    assert compared == by_heading.keys() - {("exact", True)}
    for difference in results["differences"]:
        ours = by_heading[difference["model"], difference["tuned"]]
        pairs = {
            name: (Likelihood.from_dict(values).document_sums, reference[name].document_sums)
            for name, values in ours.items()
        }
        for name, interval in difference["domains"].items():
            assert interval == bootstrap.paired_difference(*pairs[name]).to_dict()
        assert (
            difference["mean"] == bootstrap.mean_paired_difference(list(pairs.values())).to_dict()
        )


def test_the_temperature_is_tuned_on_the_validation_text(evaluated, folder):
    [tuned] = [
        measured["temperature"]
        for measured in results_of(evaluated)["measurements"]
        if measured["model"] == "plain" and measured["tuned"]
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("t", str(folder / "valid.txt"), options, tokenizer)
    lm = fastperturb.wrap(model, fastperturb.PerturbConfig())
    with lm.exact():
        settings = {"num_samples": 1, "seed": 0, "batch_size": 8}
        assert tuned == pytest.approx(likelihood.tuned_temperature(lm, text, **settings), rel=1e-3)


def test_a_perturbed_model_is_measured_without_its_noise_too(evaluated, folder):
    results = {
        measured["model"]: measured["domains"]["far"]
        for measured in results_of(evaluated)["measurements"]
        if not measured["tuned"]
    }
    assert "exact, without noise" not in results and "plain, without noise" not in results
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lm = fastperturb.load(model, folder / "learned" / "best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("far", str(folder / "far.txt"), options, tokenizer)
    with lm.exact():
        expected = likelihood.measure(lm, text, num_samples=1, seed=0, batch_size=8)
    assert results["learned, without noise"]["nll"] == pytest.approx(expected.nll)
    assert results["learned, without noise"]["num_samples"] == 1


def test_the_table_has_the_unigram_of_the_text_itself(evaluated, folder):
    results = results_of(evaluated)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("far", str(folder / "far.txt"), options, tokenizer)
    counts = likelihood.label_counts(text.blocks, 63)
    own = likelihood.unigram(text, counts, smoothing=0.0)
    assert results["unigram"]["far"]["nll"] == pytest.approx(own.nll)
    rows = (evaluated / "table.md").read_text().splitlines()
    [row] = [row for row in rows if row.startswith("| unigram of the text itself")]
    assert f"{own.perplexity:.4g}" in row


def test_a_model_of_the_sequence_marginal_is_measured_by_both_marginals(folder, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = fastperturb.PerturbConfig(marginal="sequence", latent_dim=4, init_scale=0.5)
    lm = fastperturb.wrap(base, config)
    lm.save_pretrained(tmp_path / "sequence", save_base=False)
    models = (f"plain={folder / 'base'}", f"sequence={tmp_path / 'sequence'}")
    options = options_of(folder, tmp_path / "out", models=models, base=str(folder / "base"))
    assert command(options) == 0
    results = results_of(tmp_path / "out")
    measured = {entry["model"]: entry for entry in results["measurements"]}
    assert measured["plain"]["sequence_marginal"] is None
    assert measured["sequence, without noise"]["sequence_marginal"] is None
    own = Likelihood.from_dict(measured["sequence"]["sequence_marginal"]["near"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    reading = DomainOptions(block_size=16, document_separator="\n\n")
    text = domains.read("near", str(folder / "near.txt"), reading, tokenizer)
    settings = {"num_samples": 4, "seed": 0, "batch_size": 8}
    expected = likelihood.measure(lm.eval(), text, **settings, marginal="sequence")
    assert own.nll_sums == pytest.approx(expected.nll_sums, rel=1e-5)
    rows = (tmp_path / "out" / "table.md").read_text().split("under both marginals")[1].splitlines()
    [row] = [row for row in rows if row.startswith("| near")]
    by_token = measured["sequence"]["domains"]["near"]
    for values in (by_token, measured["sequence"]["sequence_marginal"]["near"]):
        assert f"{values['nll']:.4f} ± {values['standard_error']:.4f}" in row


def test_results_hold_options_versions_models_and_domains(evaluated, folder):
    results = results_of(evaluated)
    assert results["config"]["num_samples"] == 8
    assert results["versions"]["fastperturb"] == fastperturb.__version__
    assert {"device", "commit"} <= results.keys()
    learned, _, _, plain = results["models"]
    assert learned["checkpoint"] == str(folder / "learned" / "best")
    assert learned["perturbation"]["num_samples"] == 4
    assert (plain["checkpoint"], plain["perturbation"]) == (None, None)
    assert [domain["documents"] for domain in results["domains"]] == [10, 10]
    labels = sum(results["measurements"][0]["domains"]["near"]["counts"])
    assert results["domains"][0]["labels"] == labels


def test_continuations_are_kept_with_their_truths_and_compared(evaluated):
    lines = (evaluated / "continuations.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [line["domain"] for line in kept] == ["near"] * 3 + ["far"] * 3
    assert all(line["written"].keys() == {"learned", "exact", "whole", "plain"} for line in kept)
    rows = results_of(evaluated)["continuations"]
    assert [row["model"] for row in rows[:5]] == [None, "learned", "exact", "whole", "plain"]
    assert rows[0]["rouge1"] is None and 0 <= rows[1]["rouge1"]["estimate"] <= 1
    assert all(row["documents"] == 3 for row in rows)


def test_a_domain_of_few_documents_is_marked(folder, tmp_path):
    options = options_of(folder, tmp_path / "out", max_documents=4)
    assert command(options) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"\| near +\| +4 \(few\) \|", text) and "too narrow to trust" in text
    assert "] (few) |" in text


def test_one_model_without_samples_has_no_differences_and_no_picture(folder, tmp_path):
    alone = {"models": (str(folder / "base"),), "domains": (str(folder / "near.txt"),)}
    assert command(options_of(folder, tmp_path / "out", **alone)) == 0
    results = results_of(tmp_path / "out")
    assert results["domains"][0]["name"] == str(folder / "near.txt")
    assert results["differences"] == []
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
        nll[precision] = [measured["domains"]["near"]["nll"] for measured in both]
    assert nll["bf16"] != nll["fp32"]
    assert nll["bf16"] == pytest.approx(nll["fp32"], rel=0.01)
