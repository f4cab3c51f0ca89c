"""The optimizer of a run: who has which learning rate and weight decay."""

import math

import pytest
import tiny
import tiny_run
import torch
from tiny_run import loop_of

from fastperturb.train import LoraOptions
from fastperturb.train.optimizer import clip_gradients

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_transform_has_its_own_rate_and_vectors_do_not_decay(folder, tmp_path):
    options = tiny_run.options(
        folder, lora=LoraOptions(rank=0), output_dir=tmp_path, weight_decay=0.1, max_steps=1
    )
    groups = {group["name"]: group for group in loop_of(options).optimizer.param_groups}
    rates = {name: (g["initial_lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {"base": (1e-2, 0.1), "vectors": (1e-2, 0.0), "transform": (5e-2, 0.0)}
    assert all(parameter.ndim == 1 for parameter in groups["vectors"]["params"])


@pytest.mark.parametrize("trains", [("transform", "base"), ("transform",), ("base",)])
def test_the_transform_and_all_else_are_clipped_to_a_norm_of_their_own(trains):
    lm = tiny.perturbed(tiny.llama())
    gradients = {"transform": 6.0, "base": 0.5}
    for name, value in lm.named_parameters():
        part = "transform" if name.startswith("transform") else "base"
        if part in trains:
            value.grad = torch.randn_like(value)
    scale = {part: gradients[part] / norm_of(lm, part) for part in trains}
    for name, value in lm.named_parameters():
        if value.grad is not None:
            value.grad *= scale["transform" if name.startswith("transform") else "base"]
    expected = math.hypot(*(gradients[part] for part in trains))
    assert clip_gradients(lm, None).item() == pytest.approx(expected, rel=1e-5)
    assert clip_gradients(lm, 1.0).item() == pytest.approx(expected, rel=1e-5)  # of before
    clipped = {part: norm_of(lm, part) for part in trains}
    assert clipped == pytest.approx({part: min(1.0, gradients[part]) for part in trains}, rel=1e-4)


def norm_of(lm, part):
    """Return the norm of the gradient of the transform or of the base."""
    grads = [value.grad for name, value in lm.named_parameters() if name.startswith(part)]
    return torch.cat([grad.flatten() for grad in grads]).norm().item()
