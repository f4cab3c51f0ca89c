"""The training methods: the model that each of them makes."""

import dataclasses
import math

import peft
import pytest
import tiny_run
import torch
import transformers
from tiny_run import finished_loop, loop_of, report_of

import fastperturb
from fastperturb import PerturbConfig

pytestmark = pytest.mark.usefixtures("own_cache")


def test_checkpointed_layers_run_again_in_the_backward(folder, tmp_path):
    options = tiny_run.options(
        folder, output_dir=tmp_path, max_steps=1, method="exact", gradient_checkpointing=True
    )
    loop, calls = loop_of(options), []
    layer = loop.lm.base.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with report_of(loop) as report:
        loop.run(report)
    assert len(calls) == 2


def test_neftune_trains_with_uniform_noise_of_its_length_and_saves_none(folder, tmp_path):
    options = tiny_run.options(folder, method="neftune", output_dir=tmp_path, neftune_alpha=7.0)
    loop = loop_of(options)
    lm = loop.lm
    deviation = lm.transform.s * lm.transform.embed_rms
    length = math.sqrt(16 * 32) * deviation  # of a block's noise
    torch.testing.assert_close(length, torch.full((32,), 7.0 / math.sqrt(3)))
    assert (lm.config.latent, lm.config.estimator, lm.config.num_samples) == (
        "uniform",
        "jensen",
        1,
    )
    loop.save_model(tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    saved = fastperturb.load(base, tmp_path / "model")
    ids = torch.arange(10)[None] + 3
    with saved.exact():
        exact = saved(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(saved(input_ids=ids, labels=ids).loss, exact)
    assert lm.transform.s.min() > 0  # training goes on with its noise


def test_fixed_noise_keeps_the_configured_scale_and_estimator(folder, tmp_path):
    perturb = PerturbConfig(transform="mlp", init_scale=0.3, num_samples=6, estimator="jvi_clip")
    loop = finished_loop(
        tiny_run.options(folder, method="fixed", perturb=perturb, output_dir=tmp_path, max_steps=2)
    )
    assert loop.lm.config == dataclasses.replace(perturb, transform="diagonal")
    torch.testing.assert_close(loop.lm.transform.s, torch.full((32,), 0.3))


def test_bf16_loads_the_frozen_base_in_bf16_and_trains_in_fp32(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, precision="bf16", max_steps=2)
    loop = finished_loop(options)
    dtypes = {p.requires_grad: p.dtype for p in loop.lm.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert isinstance(loop.lm.base, peft.PeftModel)
