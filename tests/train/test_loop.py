"""The training loop: what a step does, what a checkpoint carries on."""

import dataclasses

import pytest
import tiny_run
import torch
import transformers
from tiny_run import assert_close, assert_equal, finished_loop, loop_of, report_of, trained
from torch.nn import functional as F

from fastperturb.train import LoraOptions, state

pytestmark = pytest.mark.usefixtures("own_cache")


METHODS = ("exact", "neftune", "fixed", "discrete", "learned")


def interrupt_at(step, loop):
    """Interrupt the run in the middle of a step."""
    gradients = loop._gradients

    def interrupted(blocks):
        sums = gradients(blocks)
        if loop.step == step:
            raise KeyboardInterrupt
        return sums

    loop._gradients = interrupted


def test_exact_is_ordinary_fine_tuning(folder, tmp_path):
    options = tiny_run.options(
        folder, method="exact", lora=LoraOptions(rank=0), output_dir=tmp_path, packing="stream"
    )
    tensors = trained(finished_loop(options))

    data = loop_of(options).data
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 6)
    for _ in range(6):
        blocks = data.next_blocks(4)
        ids = torch.stack([torch.as_tensor(block.tokens) for block in blocks])
        labels = torch.stack([torch.as_tensor(block.labels) for block in blocks])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    expected = {f"base.{name}": p.detach() for name, p in model.named_parameters()}
    assert_close(tensors, expected, rtol=1e-3, atol=1e-4)  # Adam divides rounding by rounding


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_do_not_change_the_trained_parameters(method, folder, tmp_path):
    options = tiny_run.options(folder, method=method, output_dir=tmp_path, max_steps=3)
    whole = trained(finished_loop(options))
    split = trained(finished_loop(dataclasses.replace(options, micro_batch_size=1)))
    assert_close(split, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_text(method, folder, tmp_path):
    options = tiny_run.options(
        folder,
        method=method,
        data=(str(folder / "long.txt"),),
        output_dir=tmp_path,
        lora=LoraOptions(rank=0),
        max_steps=40,
        batch_size=8,
        eval_every=40,
        eval_data=(str(folder / "held_out.txt"),),
    )
    loop = finished_loop(options)
    before, after = loop.evaluations[0], loop.evaluations[-1]
    assert after["nll"] < before["nll"] - 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mapped", "streaming", "dropout"])
def test_a_run_continues_from_a_checkpoint_bit_for_bit(method, kind, folder, tmp_path):
    common = {
        "method": method,
        "eval_data": (str(folder / "held_out.txt"),),
        "eval_every": 2,
        "lora": LoraOptions(rank=2, dropout=0.1),
        "streaming": kind == "streaming",
        "model": str(folder / ("dropout" if kind == "dropout" else "base")),
    }
    whole = finished_loop(tiny_run.options(folder, output_dir=tmp_path / "whole", **common))
    options = tiny_run.options(folder, output_dir=tmp_path / "parts", save_every=3, **common)
    first = loop_of(options)
    interrupt_at(4, first)
    with report_of(first) as report, pytest.raises(KeyboardInterrupt):
        first.run(report)
    second = loop_of(options)
    second.restore(state.latest(tmp_path / "parts" / "checkpoints"))
    assert second.step == 3
    with report_of(second) as report:
        second.run(report)
    assert_equal(trained(second), trained(whole))
    assert second.evaluations == whole.evaluations


def test_an_evaluation_leaves_the_base_in_train_mode(folder, tmp_path):
    options = tiny_run.options(
        folder, model=str(folder / "dropout"), method="exact", output_dir=tmp_path, max_steps=2
    )
    evaluated = dataclasses.replace(options, eval_data=(str(folder / "held_out.txt"),))
    assert_equal(trained(finished_loop(evaluated)), trained(finished_loop(options)))


def test_cross_fit_takes_the_transforms_gradient_from_the_other_half_batch(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path)
    loop = loop_of(options)
    blocks = loop.data.next_blocks(4)

    def gradients(of, cross_fit=False):
        loop.options = dataclasses.replace(options, cross_fit=cross_fit)
        loop._gradients(of)
        return {n: p.grad.clone() for n, p in loop.lm.named_parameters() if p.requires_grad}

    first, second = gradients(blocks[:2]), gradients(blocks[2:])
    for name, gradient in gradients(blocks, cross_fit=True).items():
        expected = second if name.startswith("transform.") else first
        torch.testing.assert_close(gradient, expected[name])
