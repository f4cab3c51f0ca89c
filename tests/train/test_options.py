"""The options of `fastperturb train` are checked when they are made."""

import math

import pytest
import tiny_run

from fastperturb import PerturbConfig
from fastperturb.runs import option_files
from fastperturb.train import LoraOptions, TrainOptions

SEQUENCE, JVI = PerturbConfig(marginal="sequence"), PerturbConfig(estimator="jvi")
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
        ({"edit_rate": 2.0}, "edit_rate"),
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


@pytest.mark.parametrize("estimator", ["sumo", "mlmc"])
def test_gradients_of_a_telescope_are_clipped_only_on_demand_and_with_a_warning(
    estimator, tmp_path
):
    telescope, block_size = PerturbConfig(estimator=estimator), 64
    options = tiny_run.options(tmp_path, perturb=telescope, block_size=block_size)
    assert (options.max_grad_norm, options.gradient_limit) == ("auto", None)
    with pytest.warns(UserWarning, match=f"clips the gradient .*{estimator}.* unbiased only"):
        clipped = tiny_run.options(tmp_path, perturb=telescope, max_grad_norm=0.5)
    assert clipped.gradient_limit == 0.5
    for changes in ({"perturb": PerturbConfig()}, {"perturb": telescope, "method": "exact"}):
        assert tiny_run.options(tmp_path, **changes).gradient_limit == 1.0
        off = tiny_run.options(tmp_path, **changes, max_grad_norm=None)
        assert off.gradient_limit is None


@pytest.mark.parametrize(
    ("marginal", "block_size", "few"),
    [("token", 16, "64 labels"), ("sequence", 64, "4 sequences"), ("token", 64, None)],
)
def test_a_telescope_with_few_labels_a_step_warns_of_its_heavy_tail(
    marginal, block_size, few, tmp_path
):
    perturb = PerturbConfig(estimator="sumo", num_samples=16, marginal=marginal)
    options = {"perturb": perturb, "block_size": block_size, "batch_size": 4, "packing": "stream"}
    if few is None:
        tiny_run.options(tmp_path, **options)
        return
    with pytest.warns(UserWarning, match=f"'sumo' has a heavy tail, .* over {few} leaves"):
        tiny_run.options(tmp_path, **options)


@pytest.mark.parametrize("limit", ["auto", None, 0.5])
def test_the_norm_of_clipping_is_read_back_as_it_was_written(limit, tmp_path):
    options = tiny_run.options(tmp_path, max_grad_norm=limit)
    again = option_files.from_mapping(options.to_dict(), TrainOptions, "options")
    assert again.max_grad_norm == limit
