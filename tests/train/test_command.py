"""`fastperturb train`: the folder that it leaves, and how it continues one."""

import dataclasses
import json
import warnings

import pytest
import safetensors.torch
import tiny_run
import torch
import transformers
from tiny_run import loop_of

import fastperturb
from fastperturb import PerturbConfig
from fastperturb.train import EditOptions, distributed
from fastperturb.train import run as command
from fastperturb.train.command import train
from fastperturb.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_pretrained_model_learns_another_kind_of_text(data_dir, tmp_path):
    base = str(data_dir / "models" / "stories260K-hf")
    options = tiny_run.options(
        tmp_path,
        model=base,
        data=(str(data_dir / "stories" / "train.txt"),),
        eval_data=(str(data_dir / "stories" / "valid.txt"),),
        output_dir=tmp_path / "run",
        block_size=128,
        batch_size=8,
        max_steps=20,
        learning_rate=2e-3,
        eval_blocks=16,
        perturb=PerturbConfig(num_samples=4),
    )
    assert command(options) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = results["evaluations"]
    assert after["nll"] < before["nll"] - 0.2
    lm = fastperturb.load(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "best"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "best")
    ids = tokenizer("The man went to the door", return_tensors="pt").input_ids
    assert lm.generate(ids, seed=0, max_new_tokens=5).shape == (1, ids.shape[1] + 5)


def test_early_stopping_keeps_the_best_model_and_the_last(folder, tmp_path):
    options = tiny_run.options(
        folder,
        output_dir=tmp_path,
        eval_data=(str(folder / "held_out.txt"),),
        eval_every=1,
        early_stop=2,
        max_steps=40,
        learning_rate=3.0,  # nothing gets better
    )
    assert command(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == results["best"]["step"] + 2 < 40
    best, last = (
        safetensors.torch.load_file(tmp_path / name / "perturbation.safetensors")["U"]
        for name in ("best", "model")
    )
    assert not torch.equal(best, last)


def test_the_saved_model_has_the_reported_likelihood(folder, tmp_path):
    options = tiny_run.options(
        folder, output_dir=tmp_path, eval_data=(str(folder / "held_out.txt"),), eval_every=3
    )
    assert command(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [evaluation["step"] for evaluation in results["evaluations"]] == [0, 3, 6]
    lines = metrics(tmp_path)
    assert len(lines) == 9
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    base = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    loop = loop_of(options)
    loop.lm = fastperturb.load(base, tmp_path / "model")
    evaluation = evaluate(loop.lm, loop.held_out, loop.options, loop.world)
    assert evaluation["nll"] == pytest.approx(results["evaluations"][-1]["nll"], rel=1e-6)


def test_resuming_with_other_options_raises_or_warns(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, max_steps=2)
    train(options, distributed.start())
    resumed = dataclasses.replace(options, resume="auto")
    with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
        train(dataclasses.replace(resumed, batch_size=2), distributed.start())
    slower = dataclasses.replace(
        resumed, learning_rate=0.005, perturb=dataclasses.replace(options.perturb, chunk_size=1)
    )
    with pytest.warns(UserWarning, match="other options: learning_rate was 0.01 and is 0.005$"):
        train(slower, distributed.start())
    with pytest.raises(FileExistsError, match="overwrite"):
        train(options, distributed.start())


def before_sampling(options):
    """Return the options as the version before `sampling` and `proposal` wrote them."""
    values = options.to_dict()
    for name in ("sampling", "group_size", "proposal", "proposal_steps", "context_source"):
        del values["perturb"][name]
    edits = values.pop("edits") | {"kinds": ["replace", "insert", "delete", "swap"]}
    del edits["learn_rates"], edits["rate_limits"]
    return values | {f"edit_{name}": value for name, value in edits.items()}


def test_a_run_of_an_earlier_version_resumes_where_its_options_still_mean_the_same(folder):
    options = tiny_run.options(folder, packing="stream")
    checkpoint = folder / "checkpoint"

    def perturbed(**changes):
        return dataclasses.replace(options, perturb=PerturbConfig(**changes))

    plain, pairs = perturbed(), perturbed(antithetic=True)
    of_sequences = {"marginal": "sequence", "scope": "sequence"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.check_resumable(before_sampling(plain), checkpoint)
        pairs.check_resumable(before_sampling(pairs), checkpoint)
        perturbed(sampling="antithetic").check_resumable(before_sampling(pairs), checkpoint)
    with pytest.raises(ValueError, match="perturb.sampling was 'antithetic' and is 'independent'"):
        plain.check_resumable(before_sampling(pairs), checkpoint)
    with pytest.raises(ValueError, match="perturb.proposal was 'prior' and is 'gradient'"):
        perturbed(**of_sequences, proposal="gradient").check_resumable(
            before_sampling(perturbed(**of_sequences)), checkpoint
        )
    discrete = dataclasses.replace(options, method="discrete")
    with pytest.raises(ValueError, match="edits.kinds was"):
        discrete.check_resumable(before_sampling(discrete), checkpoint)
    edits = EditOptions(kinds=("replace", "insert", "delete", "swap"))
    discrete = dataclasses.replace(discrete, edits=edits)
    discrete.check_resumable(before_sampling(discrete), checkpoint)
    held = perturbed(deterministic=True)
    with pytest.raises(ValueError, match="one latent for all tokens"):
        held.check_resumable(before_sampling(held), checkpoint)
    perturbed(deterministic=True, scope="sequence").check_resumable(
        before_sampling(perturbed(deterministic=True, scope="sequence")), checkpoint
    )


def test_resuming_a_finished_run_changes_nothing(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, max_steps=2)
    train(options, distributed.start())
    before = (tmp_path / "model" / "adapter_model.safetensors").read_bytes()
    lines = metrics(tmp_path)
    train(dataclasses.replace(options, resume="auto"), distributed.start())
    assert (tmp_path / "model" / "adapter_model.safetensors").read_bytes() == before
    assert metrics(tmp_path) == lines


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "dropout", "block_size": 65}, "block_size = 65 is more than the 64 positions"),
        ({"tokenizer": "larger"}, "the tokenizer has 64 tokens and the model 63"),
    ],
)
def test_more_positions_or_tokens_than_the_model_has_raise(changes, message, folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "larger")
    changes = {
        key: str(folder / value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    options = tiny_run.options(folder, output_dir=tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        train(options, distributed.start())
