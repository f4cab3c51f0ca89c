"""Models, configs and arguments of a call that are rejected by name."""

import pytest
import torch
from batches import batch
from tiny import llama, perturbed

from fastperturb import wrap


def test_model_on_the_meta_device_is_rejected():
    with pytest.raises(ValueError, match="model is on the meta device: load its weights"):
        perturbed(llama().to("meta"))


def test_config_of_another_type_is_rejected():
    with pytest.raises(TypeError, match="config must be a PerturbConfig, got dict"):
        wrap(llama(), {"num_samples": 3})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be a positive int, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be a positive int, got 2.0"),
        ({"labels": torch.full((3, 9), 97)}, IndexError, r"labels must be .*\[0, 97\), got 97"),
        ({"labels": torch.zeros(3, 8).long()}, ValueError, r"labels must be \[B, T\] = \[3, 9\]"),
        ({"labels": torch.zeros(3, 9)}, ValueError, r"labels must be \[B, T\] of torch.int64, got"),
        ({"labels": [[1] * 9] * 3}, TypeError, "labels must be a tensor .*got list"),
        ({"position_ids": torch.zeros(3, 9).int()}, ValueError, "position_ids must be .*int32"),
        ({"perturb_mask": torch.ones(3, 9)}, ValueError, "perturb_mask must be .*torch.bool, got"),
        ({"input_ids": torch.full((3, 9), 97)}, IndexError, r"input_ids must lie in \[0, 97\)"),
        ({"input_ids": torch.zeros(3, 9)}, ValueError, "input_ids must be .*got torch.float32"),
        ({"input_ids": torch.zeros(0, 9).long()}, ValueError, "input_ids must hold at least one"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 9, 8)}, ValueError, "32 wide"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be one num"),
        ({"attention_mask": torch.ones(2, 9)}, ValueError, r"attention_mask must be \[B, T\]"),
        ({"input_ids": torch.zeros(9).long()}, ValueError, r"input_ids must be \[B, T\]"),
        ({"input_ids": None}, ValueError, "either input_ids or inputs_embeds, got neither"),
        ({"inputs_embeds": torch.zeros(3, 9, 32)}, ValueError, "got both"),
        ({"attention_mask": torch.ones(3, 9, device="meta")}, ValueError, "attention_mask .* meta"),
        ({"perturb_mask": torch.ones(3, 8).bool()}, ValueError, r"perturb_mask must be"),
        ({"rows": torch.arange(2)}, ValueError, r"rows must be int64 \[B\] or \[B, T\]"),
        ({"seed": 1.5}, ValueError, "seed must be an int"),
    ],
)
def test_bad_call_argument_is_rejected_by_name(changes, error, message):
    lm = perturbed(llama())
    with pytest.raises(error, match=message):
        lm(**{**batch(), **changes})


def test_num_samples_that_the_estimator_cannot_use_is_rejected():
    quadratic = perturbed(llama(), estimator="quadratic")
    with pytest.raises(ValueError, match="num_samples must be at least 2 for estimator='quad"):
        quadratic(**batch(), num_samples=1)
    resampling = perturbed(llama(), estimator="resample", backward_samples=4)
    with pytest.raises(ValueError, match="backward_samples must not exceed num_samples=2, got 4"):
        resampling(**batch(), num_samples=2)
    antithetic = perturbed(llama(), antithetic=True)
    with pytest.raises(ValueError, match="num_samples must be even with sampling='antithetic'"):
        antithetic(**batch(), num_samples=3)


def test_plain_jvi_is_rejected_in_train_mode_only():
    lm = perturbed(llama(), estimator="jvi").train()
    with pytest.raises(ValueError, match="use estimator='jvi_clip'"):
        lm(**batch())
    assert torch.isfinite(lm.eval()(**batch()).loss)
