"""One small study from end to end."""

import json

import pytest
import torch

from fastperturb.cli import main as cli


def in_yaml(folder, **changes):
    """Write the options of a study to a file."""
    yaml = pytest.importorskip("yaml")
    content = {
        "train": {
            "model": str(folder / "base"),
            "data": [str(folder / "train.txt")],
            "eval_data": [str(folder / "valid.txt")],
            "document_separator": "\n\n",
            "block_size": 16,
            "batch_size": 4,
            "max_steps": 4,
            "eval_every": 2,
            "eval_samples": 4,
            "learning_rate": 1e-2,
            "lora": {"rank": 2},
            "perturb": {"num_samples": 4, "latent_dim": 4},
            "device": "cpu",
        },
        "domains": {"same": str(folder / "test.txt"), "other": str(folder / "other.txt")},
        "in_domain": "same",
        "methods": {"exact": {"method": "exact"}, "learned": {"method": "learned"}},
        "learning_rate_factors": [2.0],
        "reading": {"block_size": 16, "document_separator": "\n\n"},
        "draws": 4,
        "tuning_draws": 2,
        "seeds": [0],
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_study_trains_and_judges_and_a_second_call_repeats_only_what_is_missing(folder, capsys):
    out = folder / "out"
    arguments = ["study", "--config", str(in_yaml(folder)), "--output-dir", str(out)]
    assert cli.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(cell["method"], cell["role"]) for cell in results["cells"]] == [
        ("exact", "baseline"),
        ("learned", "method"),
        ("exact, rate x 2", "control"),
        ("exact, compute x 4", "control"),
        ("learned, deterministic", "control"),
    ]
    views = {
        cell["method"]: [(entry["view"], entry["tuned"]) for entry in cell["measurements"]]
        for cell in results["cells"]
    }
    both = [(view, tuned) for view in ("as_trained", "without_noise") for tuned in (False, True)]
    assert views["learned"] == both
    assert views["learned, deterministic"] == both[:2]
    baselines = [cell for cell in results["cells"] if cell["method"].startswith("exact")][:2]
    best = min(baselines, key=lambda cell: cell["validation_nll"])["method"]
    with_noise = [name for name, forms in views.items() if ("noise_added", True) in forms]
    assert with_noise == [best]
    passes = {cell["method"]: cell["token_passes"] for cell in results["cells"]}
    assert passes["learned"] == passes["exact, compute x 4"] == 4 * passes["exact"]
    assert {path.name for path in out.iterdir()} >= {"results.json", "table.md", "runs"}
    assert list(out.glob("*.png"))
    assert results["versions"]["torch"] == torch.__version__

    [redone] = [path for path in (out / "runs").glob("learned_seed_0_*")]
    (redone / "judged.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.json")}
    assert cli.main(arguments) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.json")}
    assert {path: after[path] for path in before} == before
    again = json.loads((out / "results.json").read_text())
    assert without_times(again["cells"]) == without_times(results["cells"])

    capsys.readouterr()
    in_yaml(folder, in_domain="other")
    assert cli.main(arguments) == 2
    assert "holds a study with other in_domain" in capsys.readouterr().err


@pytest.mark.slow
def test_other_domains_are_judged_anew_without_training_again(folder):
    out = folder / "again"
    few = {"methods": {"exact": {"method": "exact"}}, "learning_rate_factors": []}
    results = []
    for changes in (
        {},
        {"domains": {"same": str(folder / "other.txt"), "new": str(folder / "valid.txt")}},
        {},
    ):
        path = in_yaml(folder, **few, **changes)
        assert cli.main(["study", "--config", str(path), "--output-dir", str(out)]) == 0
        results.append(json.loads((out / "results.json").read_text()))
    assert [result["domains"] for result in results] == [
        ["same", "other"],
        ["same", "new"],
        ["same", "other"],
    ]
    first, second, third = (without_times(result["cells"][0]["measurements"]) for result in results)
    assert first == third != second
    trained = [result["cells"][0]["training_seconds"] for result in results]
    assert len(set(trained)) == 1


def without_times(value):
    """Return a JSON value without the times, which differ between equal runs."""
    times = ("tokens_per_second", "training_seconds", "judging_seconds")
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_are_kept(folder, capsys):
    methods = {
        "exact": {"method": "exact"},
        "bad": {"method": "learned", "lora": {"targets": ["nothing"]}},
    }
    path = in_yaml(folder, methods=methods, learning_rate_factors=[])
    out = folder / "failing"
    assert cli.main(["study", "--config", str(path), "--output-dir", str(out)]) == 1
    assert "failed: bad, seed 0: lora.targets=('nothing',)" in capsys.readouterr().out
    [log] = (out / "runs").glob("bad_seed_0_*/log.txt")
    assert "Traceback" in log.read_text()
    assert [cell["method"] for cell in json.loads((out / "results.json").read_text())["cells"]] == [
        "exact",
        "exact, compute x 4",
    ]
    assert (next((out / "runs").glob("exact_seed_0_*")) / "trained.json").exists()
