"""Studies: which runs follow from the options, and one small study from end to end."""

import json
import math

import pytest
import tiny_run
import torch
import transformers

from fastperturb import PerturbConfig, wrap
from fastperturb.cli import main as cli
from fastperturb.study import options as study_options
from fastperturb.study import runner
from fastperturb.study.options import StudyOptions, runs_of
from fastperturb.train import TrainOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    tiny_run.model_folder(folder / "base")
    for seed, name in enumerate(("train", "valid", "test", "other")):
        tiny_run.text_file(
            folder / f"{name}.txt", documents=24 if name == "train" else 8, seed=seed
        )
    return folder


def study(folder, **changes):
    shared = {
        "output_dir": TrainOptions.output_dir,
        "eval_data": (str(folder / "valid.txt"),),
        "document_separator": "\n\n",
        "eval_samples": 4,
        "eval_every": 2,
        "max_steps": 4,
    }
    given = {
        "train": tiny_run.options(folder, **{**shared, **changes.pop("train", {})}),
        "domains": {"same": str(folder / "test.txt"), "other": str(folder / "other.txt")},
        "in_domain": "same",
        "seeds": (0,),
    }
    return StudyOptions(**{**given, **changes})


def test_every_method_and_every_control_runs_with_every_seed(folder):
    methods = {
        "exact": {"method": "exact"},
        "noise": {"method": "fixed", "perturb": {"num_samples": 2}},
        "ours": {"method": "learned", "perturb": {"transform": "mlp"}},
    }
    found = runs_of(study(folder, methods=methods, seeds=(0, 7)))
    names = [(run.method, run.control, run.of) for run in found if run.seed == 7]
    assert names == [
        ("exact", None, None),
        ("noise", None, None),
        ("ours", None, None),
        ("exact, rate x 0.5", "learning_rate", "exact"),
        ("exact, rate x 2", "learning_rate", "exact"),
        ("exact, compute x 2", "equal_compute", "exact"),
        ("exact, compute x 4", "equal_compute", "exact"),
        ("ours, deterministic", "deterministic", "ours"),
    ]
    by_name = {run.method: run for run in found if run.seed == 7}
    assert by_name["noise"].options.perturb.num_samples == 2
    assert by_name["noise"].options.perturb.latent_dim == 4  # the rest of a group stays
    rates = [by_name[f"exact{end}"].options.learning_rate for end in ("", ", rate x 2")]
    assert rates[1] == 2 * rates[0]
    compute = [
        run.draws * run.options.max_steps
        for run in (by_name["exact, compute x 4"], by_name["ours"])
    ]
    assert compute[0] == compute[1]
    twin = by_name["ours, deterministic"]
    assert twin.options.perturb.deterministic and twin.options.perturb.transform == "mlp"
    assert (twin.draws, twin.options.max_steps) == (1, by_name["ours"].options.max_steps)
    assert len({run.key for run in found}) == len(found)


def test_runs_that_would_be_the_same_are_one(folder):
    methods = {
        "exact": {"method": "exact"},
        "a": {"method": "learned"},
        "b": {"method": "learned", "perturb": {"scope": "sequence", "num_samples": 8}},
    }
    found = {run.method: run for run in runs_of(study(folder, methods=methods))}
    assert found["a"].key != found["b"].key
    assert found["a, deterministic"].key == found["b, deterministic"].key


def test_equal_compute_lengthens_epochs_where_there_are_no_steps(folder):
    found = runs_of(study(folder, train={"max_steps": None, "epochs": 3}))
    longer = next(run for run in found if run.control == "equal_compute").options
    assert (longer.epochs, longer.eval_every) == (12, 2)  # judged as often, to stop as well


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_domain": "elsewhere"}, "in_domain must be one of domains"),
        ({"domains": {"same": "x"}}, "to extrapolate to"),
        ({"baseline": "plain"}, "baseline must be one of methods"),
        ({"baseline": "learned"}, "perturbed after its training"),
        ({"seeds": ()}, "seeds must be one or more"),
        ({"learning_rate_factors": (1.0,)}, "other than 1"),
        ({"draws": 1}, "draws and tuning_draws must be at least 2"),
        ({"noise_scale": 0.0}, "noise_scale must be above 0"),
        ({"train": {"eval_data": ()}}, "train.eval_data must name"),
        ({"train": {"seed": 3}}, "a study sets it for each run"),
        ({"methods": {"exact": {"method": "exact", "sed": 1}}}, "no option 'sed'"),
        ({"methods": {"exact": {"method": "exact", "seed": 1}}}, "all runs of a study share it"),
        ({"methods": {"exact": {"method": "exact", "data": ["x"]}}}, "all runs of a study share"),
        ({"methods": {"exact": {"method": "exact", "perturb": {"m": 1}}}}, "unknown option 'm'"),
        ({"methods": {"exact": {"method": "exact"}, "x": {"method": "y"}}}, "expected one of"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_runs(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        study(folder, **changes)


def test_the_defaults_are_the_five_methods():
    assert list(study_options.DEFAULT_METHODS) == [
        "exact",
        "neftune",
        "fixed",
        "discrete",
        "learned",
    ]


def test_the_tokens_that_isotropic_noise_moves_most_are_the_shortest(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    lm = wrap(model, PerturbConfig(transform="diagonal", init_scale=0.3))
    found = runner.token_scales(lm, tokenizer)
    lengths = model.get_input_embeddings().weight.detach().norm(dim=1)
    words = lengths[3:]  # the first three are special
    shortest = tokenizer.convert_ids_to_tokens((words.argsort() + 3).tolist())
    assert {name for name, _ in found["most"]} & set(shortest[:14]) >= set(shortest[:8])
    assert {name for name, _ in found["least"]} & set(shortest[-14:]) >= set(shortest[-8:])
    # E|z| of 32 gaussians is sqrt(32) (1 - 1/128).
    expected = 0.3 * lm.transform.embed_rms * math.sqrt(32) * (1 - 1 / 128) / words.min()
    assert found["most"][0][1] == pytest.approx(expected.item(), rel=0.08)
    assert [scale for _, scale in found["most"]] == sorted(
        (scale for _, scale in found["most"]), reverse=True
    )


def in_yaml(folder, **changes):
    """The options of a study as a file holds them."""
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
def test_a_study_trains_judges_and_goes_on_where_it_was_stopped(folder, capsys):
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
        cell["method"]: [(each["view"], each["tuned"]) for each in cell["measurements"]]
        for cell in results["cells"]
    }
    both = [(view, tuned) for view in ("as_trained", "without_noise") for tuned in (False, True)]
    assert views["learned"] == both
    assert views["learned, deterministic"] == both[:2]
    baselines = [cell for cell in results["cells"] if cell["method"].startswith("exact")][:2]
    best = min(baselines, key=lambda cell: cell["validation_nll"])["method"]
    with_noise = [name for name, found in views.items() if ("noise_added", True) in found]
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
def test_a_judgement_is_made_anew_where_it_would_be_another(folder):
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
    first, second, third = (without_times(each["cells"][0]["measurements"]) for each in results)
    assert first == third != second
    trained = [result["cells"][0]["training_seconds"] for result in results]
    assert len(set(trained)) == 1


def without_times(value):
    """Of a JSON value, all that two runs must agree on."""
    times = ("tokens_per_second", "training_seconds", "judging_seconds")
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in times}
    return [without_times(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_kept(folder, capsys):
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
