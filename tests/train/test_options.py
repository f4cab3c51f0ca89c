"""The options of `fastperturb train` are checked when they are made."""

import math

import pytest
import tiny_run

from fastperturb import PerturbConfig
from fastperturb.train import LoraOptions

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
