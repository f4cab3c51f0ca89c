"""Failures of a run: it recovers, or stops with what to change."""

import contextlib
import math

import pytest
import tiny_run
import torch
from tiny_run import assert_close, assert_equal, finished_loop, loop_of, report_of, trained

from fastperturb import PerturbConfig

pytestmark = pytest.mark.usefixtures("own_cache")


@contextlib.contextmanager
def memory_for(rows, loop):
    """Let the trunk run out of memory on more batch rows at once than these."""

    def check(module, args, kwargs):
        if len(kwargs["inputs_embeds"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trunk = loop.lm.base.get_base_model().base_model
    hook = trunk.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def test_a_step_out_of_memory_runs_again_with_fewer_samples_and_the_same_noise(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, max_steps=2)
    expected = trained(finished_loop(options))
    loop = loop_of(options)
    with memory_for(8, loop), report_of(loop) as report:  # 4 blocks of 4 samples want 16 rows
        loop.run(report)
    assert loop.lm.plan_report().chunk_size == 2
    assert_close(trained(loop), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "perturb, setting",
    [
        ({"plan": "batched"}, "perturb.plan"),
        ({"chunk_size": 4}, "perturb.chunk_size"),
        ({}, "micro"),
    ],
)
def test_a_step_that_cannot_fit_the_memory_raises_and_names_the_option_to_change(
    perturb, setting, folder, tmp_path
):
    perturb = PerturbConfig(num_samples=4, latent_dim=4, **perturb)
    loop = loop_of(tiny_run.options(folder, output_dir=tmp_path, perturb=perturb))
    before = trained(loop)
    with (
        memory_for(3, loop),
        report_of(loop) as report,
        pytest.raises(MemoryError, match=f"step 0 does not fit.*{setting}"),
    ):
        loop.run(report)
    assert_equal(trained(loop), before)


def test_an_evaluation_that_does_not_fit_the_memory_raises_with_advice(folder, tmp_path):
    held_out = (str(folder / "held_out.txt"),)
    loop = loop_of(tiny_run.options(folder, output_dir=tmp_path, eval_data=held_out))
    with (
        memory_for(3, loop),
        report_of(loop) as report,
        pytest.raises(MemoryError, match="step 0 does not fit the memory of cpu"),
    ):
        loop.run(report)


def test_a_loss_that_is_not_finite_stops_the_run_before_its_update(folder, tmp_path):
    loop = loop_of(tiny_run.options(folder, output_dir=tmp_path, save_every=2))
    gradients = loop._gradients

    def poisoned(blocks):
        sums = gradients(blocks)
        return sums * math.nan if loop.step == 3 else sums

    loop._gradients = poisoned
    loop.data.next_blocks(4)
    with report_of(loop) as report, pytest.raises(FloatingPointError) as stopped:
        loop.run(report)
    message = str(stopped.value)
    assert "step 3: the loss is nan" in message
    assert str(tmp_path / "checkpoints" / "step-00000002") in message
    assert "rows " in message
    assert all(value.isfinite().all() for value in trained(loop).values())
