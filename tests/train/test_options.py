"""The options of `fastperturb train` are checked when they are made."""

import dataclasses
import math

import pytest
import tiny_run

from fastperturb import PerturbConfig
from fastperturb.cli.main import parse
from fastperturb.train import EditOptions, LoraOptions, TrainOptions

SEQUENCE, JVI = PerturbConfig(marginal="sequence"), PerturbConfig(estimator="jvi")
PROPOSING = PerturbConfig(proposal="gradient")
HELD = PerturbConfig(deterministic=True)
RESAMPLE, PAIRS = PerturbConfig(estimator="resample"), PerturbConfig(antithetic=True)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_raises_when_options_are_made(
    tracker, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastperturb.train.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {tracker}"):
        tiny_run.options(tmp_path, report_to=(tracker,))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"perturb": SEQUENCE}, "packing='stream'"),
        ({"perturb": JVI}, "jvi_clip"),
        ({"perturb": RESAMPLE, "lora": LoraOptions(dropout=0.1)}, "lora.dropout"),
        ({"perturb": PAIRS, "method": "discrete"}, "an edit has none"),
        ({"perturb": PROPOSING, "method": "hybrid"}, "not after edits"),
        ({"perturb": HELD, "method": "hybrid"}, "the edits of method='hybrid' have"),
        ({"mc": 2, "method": "exact"}, "has one"),
        ({"eval_data": ("a", "b"), "data": ("b",)}, "'b' is trained on"),
        ({"streaming": True, "max_steps": None}, "give max_steps"),
        ({"early_stop": 2}, "eval_data"),
        ({"cross_fit": True, "method": "fixed"}, "method='learned'"),
        ({"warmup": 1.5}, "warmup"),
        ({"batch_size": 0}, "batch_size"),
        ({"resume": "auto", "overwrite": True}, "one of them"),
    ],
)
def test_an_invalid_option_is_named_in_the_error(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_run.options(tmp_path, **changes)


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_a_rate_of_edits_that_is_no_probability_is_named(rate):
    with pytest.raises(ValueError, match="edits.rate must be"):
        EditOptions(rate=rate)


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_clipping_the_gradient_of_a_telescope_warns(estimator, tmp_path):
    telescope = PerturbConfig(estimator=estimator)
    with pytest.warns(UserWarning, match=f"max_grad_norm=1 clips .*'{estimator}'.* unbiased only"):
        tiny_run.options(tmp_path, perturb=telescope)
    tiny_run.options(tmp_path, perturb=telescope, method="exact")  # has no telescope to clip
    many = {"perturb": telescope, "block_size": 256}
    assert tiny_run.options(tmp_path, **many, max_grad_norm=None).max_grad_norm is None


def test_training_the_token_marginal_by_a_proposal_warns(tmp_path):
    proposing = PerturbConfig(proposal="gradient")
    with pytest.warns(UserWarning, match="marginal='sequence', or proposal='prior'"):
        tiny_run.options(tmp_path, perturb=proposing)
    of_sequences = dataclasses.replace(proposing, scope="sequence", marginal="sequence")
    tiny_run.options(tmp_path, perturb=of_sequences, packing="stream")
    tiny_run.options(tmp_path, perturb=proposing, method="exact")  # draws nothing


@pytest.mark.parametrize(
    ("marginal", "block_size", "few"),
    [("token", 16, "64 labels"), ("sequence", 256, "4 sequences"), ("token", 256, None)],
)
def test_a_telescope_with_few_labels_a_step_warns_of_its_heavy_tail(
    marginal, block_size, few, tmp_path
):
    perturb = PerturbConfig(estimator="sumo", num_samples=16, marginal=marginal)
    options = {"perturb": perturb, "block_size": block_size, "batch_size": 4, "packing": "stream"}
    if few is None:
        tiny_run.options(tmp_path, **options, max_grad_norm=None)
        return
    with pytest.warns(UserWarning, match=f"'sumo' has a heavy tail, and a mean over {few} leaves"):
        tiny_run.options(tmp_path, **options, max_grad_norm=None)


def test_data_may_be_a_flag_where_a_file_has_everything_else(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: base\neval_data: [held_out]\nearly_stop: 3\n")
    flags = ["--config", str(file), "--data", "text"]
    assert parse(TrainOptions, flags, prog="train").data == ("text",)
    with pytest.raises(SystemExit):
        parse(TrainOptions, ["--config", str(file), "--data", "held_out"], prog="train")
    assert "'held_out' is trained on" in capsys.readouterr().err


def test_a_file_of_options_warns_once(tmp_path, recwarn):
    file = tmp_path / "run.yaml"
    file.write_text("model: base\ndata: [text]\nperturb: {estimator: mlmc}\n")
    parse(TrainOptions, ["--config", str(file), "--seed", "3"], prog="train")
    assert len([warning for warning in recwarn if "max_grad_norm" in str(warning.message)]) == 1
