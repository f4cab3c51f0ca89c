"""The recipes for other trainers, run for a few steps as they stand."""

import functools

import pytest
import torch
import two_processes
from torch import multiprocessing

import fastperturb
from bench.recipes import tiny

# These packages deprecate each other's names.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pretrained(data_dir):
    """A recipe's options: a real tiny model and a text that it was not trained on."""
    model = str(data_dir / "models" / "stories260K-hf")
    return {"model": model, "text": data_dir / "extra_tinystories" / "sample.txt"}


def assert_saved(lm, folder, model):
    """The folder holds what is in lm, which is not what it began as."""
    loaded = fastperturb.load(tiny.base_and_tokenizer(model)[0], folder)
    saved = dict(loaded.named_parameters())
    for name, value in lm.named_parameters():
        assert torch.equal(saved[name], value.detach()), name
    adapters = [value for name, value in saved.items() if "lora_B" in name]
    assert adapters and all(value.abs().max() > 0 for value in adapters)


def test_the_accelerate_loop_goes_on_from_its_checkpoint_as_if_never_stopped(tmp_path, pretrained):
    from bench.recipes import plain_accelerate

    run = functools.partial(plain_accelerate.main, **pretrained)
    whole = run(output_dir=tmp_path / "whole", steps=4)
    parts = run(output_dir=tmp_path / "parts", steps=2) + run(
        output_dir=tmp_path / "parts", steps=4
    )
    assert len(whole) == 4 and parts == whole


def process(rank, folder):
    from bench.recipes import plain_accelerate

    with two_processes.joined(rank, folder, ACCELERATE_USE_CPU="true"):
        losses = plain_accelerate.main(output_dir=folder / "two", steps=3, accumulate=1)
        if rank == 0:
            torch.save(losses, folder / "losses.pt")


@pytest.mark.slow
def test_the_accelerate_loop_on_two_processes_has_the_losses_of_one(tmp_path):
    from bench.recipes import plain_accelerate

    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    one = plain_accelerate.main(output_dir=tmp_path / "one", steps=3, accumulate=2)
    assert torch.load(tmp_path / "losses.pt") == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trls_sft_trainer_trains_and_saves_a_perturbed_model(
    tmp_path, pretrained, packing, monkeypatch
):
    pytest.importorskip("trl", reason="needs the extra `recipes`")
    monkeypatch.setenv("CI", "true")  # or TRL reports each trainer that is made
    from bench.recipes import trl_sft

    trainer = trl_sft.main(output_dir=tmp_path, steps=6, packing=packing, **pretrained)
    logs = trainer.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(entry["ess"] > 1 for entry in logs if "loss" in entry)
    assert any("eval_perplexity" in entry for entry in logs)
    assert_saved(trainer.lm, tmp_path / "checkpoint-6", pretrained["model"])


@pytest.mark.slow
def test_lightning_trains_saves_and_continues_a_perturbed_model(tmp_path, pretrained):
    pytest.importorskip("lightning", reason="needs the extra `recipes`")
    from bench.recipes import lightning_module

    first = lightning_module.main(output_dir=tmp_path, steps=2, **pretrained)
    assert_saved(first.lightning_module.lm, tmp_path / "model", pretrained["model"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    second = lightning_module.main(
        output_dir=tmp_path / "more", steps=3, checkpoint=checkpoint, **pretrained
    )
    assert second.global_step == 3
    assert second.callback_metrics["val_nll"] < 2


def test_a_recipe_needs_no_model_and_no_text(tmp_path):
    from bench.recipes import plain_accelerate

    (loss,) = plain_accelerate.main(output_dir=tmp_path, steps=1)
    assert 3 < loss < 8  # of a random model of 384 bytes and specials: log 384 is 5.95
