"""Training runs: what a step does, what a checkpoint carries on, what stops a run."""

import contextlib
import dataclasses
import json
import math

import peft
import pytest
import safetensors.torch
import tiny_run
import torch
import transformers
from torch.nn import functional as F

import fastperturb
from fastperturb import PerturbConfig
from fastperturb.data.options import evaluation_blocks, training_data
from fastperturb.train import LoraOptions, distributed, state
from fastperturb.train import run as command
from fastperturb.train.command import train
from fastperturb.train.loop import Loop
from fastperturb.train.report import Report

METHODS = ("exact", "neftune", "fixed", "discrete", "learned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a training text and a held-out text."""
    folder = tmp_path_factory.mktemp("training")
    tiny_run.model_folder(folder / "base")
    tiny_run.model_folder(folder / "dropout", kind="gpt2")
    tiny_run.text_file(folder / "train.txt")
    tiny_run.text_file(folder / "long.txt", documents=300, seed=2)
    tiny_run.text_file(folder / "held_out.txt", documents=6, seed=1)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def loop_of(options):
    """A loop before its first step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    held_out = ()
    if options.eval_data:
        held_out = evaluation_blocks(options.eval_data, options, tokenizer)
    data = training_data(options, tokenizer, seed=options.seed)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    return Loop(options, distributed.start(), data, held_out, tokenizer, options.output_dir)


def report_of(loop):
    """Where metrics go, without a bar."""
    return Report(
        loop.folder,
        total_steps=loop.total_steps,
        report_to=(),
        config={},
        start_step=loop.step,
        is_main=True,
    )


def finished(options):
    loop = loop_of(options)
    with report_of(loop) as report:
        loop.run(report)
    return loop


@contextlib.contextmanager
def stopping_at(step, loop):
    """The run is interrupted in the middle of a step."""
    gradients = loop._gradients

    def interrupted(blocks):
        found = gradients(blocks)
        if loop.step == step:
            raise KeyboardInterrupt
        return found

    loop._gradients = interrupted
    yield


def trained(loop):
    return {name: p.detach().clone() for name, p in loop.lm.named_parameters() if p.requires_grad}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def assert_equal(found, expected):
    assert_close(found, expected, rtol=0, atol=0)


def test_exact_is_ordinary_fine_tuning(folder, tmp_path):
    options = tiny_run.options(
        folder, method="exact", lora=LoraOptions(rank=0), output_dir=tmp_path, packing="stream"
    )
    found = trained(finished(options))

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
    assert_close(found, expected, rtol=1e-3, atol=1e-4)  # Adam divides rounding by rounding


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method, folder, tmp_path):
    options = tiny_run.options(folder, method=method, output_dir=tmp_path, max_steps=3)
    whole = trained(finished(options))
    split = trained(finished(dataclasses.replace(options, micro_batch_size=1)))
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
    loop = finished(options)
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
    whole = finished(tiny_run.options(folder, output_dir=tmp_path / "whole", **common))
    options = tiny_run.options(folder, output_dir=tmp_path / "parts", save_every=3, **common)
    first = loop_of(options)
    with report_of(first) as report, pytest.raises(KeyboardInterrupt), stopping_at(4, first):
        first.run(report)
    second = loop_of(options)
    second.restore(state.latest(tmp_path / "parts" / "checkpoints"))
    assert second.step == 3
    with report_of(second) as report:
        second.run(report)
    assert_equal(trained(second), trained(whole))
    assert second.evaluations == whole.evaluations


def test_the_base_trains_in_train_mode_whether_or_not_it_was_evaluated(folder, tmp_path):
    options = tiny_run.options(
        folder, model=str(folder / "dropout"), method="exact", output_dir=tmp_path, max_steps=2
    )
    judged = dataclasses.replace(options, eval_data=(str(folder / "held_out.txt"),))
    assert_equal(trained(finished(judged)), trained(finished(options)))


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


@pytest.mark.slow
def test_a_pretrained_model_adapts_to_another_kind_of_text(data_dir, tmp_path):
    base = str(data_dir / "models" / "stories260K-hf")
    options = tiny_run.options(
        tmp_path,
        model=base,
        data=(str(data_dir / "stories" / "train.txt"),),
        eval_data=(str(data_dir / "stories" / "valid.txt"),),
        output_dir=tmp_path / "run",
        block_size=128,
        batch_size=8,
        max_steps=20,
        learning_rate=2e-3,
        eval_blocks=16,
        perturb=PerturbConfig(num_samples=4),
    )
    assert command(options) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = results["evaluations"]
    assert after["nll"] < before["nll"] - 0.2
    lm = fastperturb.load(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "best"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "best")
    ids = tokenizer("The man went to the door", return_tensors="pt").input_ids
    assert lm.generate(ids, seed=0, max_new_tokens=5).shape == (1, ids.shape[1] + 5)


def test_cross_fitting_takes_the_transforms_gradient_from_the_other_half(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path)
    loop = loop_of(options)
    blocks = loop.data.next_blocks(4)

    def gradients(of, cross_fit=False):
        loop.options = dataclasses.replace(options, cross_fit=cross_fit)
        loop._gradients(of)
        return {n: p.grad.clone() for n, p in loop.lm.named_parameters() if p.requires_grad}

    crossed = gradients(blocks, cross_fit=True)
    first, second = gradients(blocks[:2]), gradients(blocks[2:])
    for name, gradient in crossed.items():
        expected = second if name.startswith("transform.") else first
        torch.testing.assert_close(gradient, expected[name])


def test_neftune_is_uniform_noise_of_its_length_in_training_and_none_after(folder, tmp_path):
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


def test_fixed_noise_keeps_the_configured_scale_and_equation(folder, tmp_path):
    perturb = PerturbConfig(transform="mlp", init_scale=0.3, num_samples=6, estimator="jvi_clip")
    loop = finished(
        tiny_run.options(folder, method="fixed", perturb=perturb, output_dir=tmp_path, max_steps=2)
    )
    assert loop.lm.config == dataclasses.replace(perturb, transform="diagonal")
    torch.testing.assert_close(loop.lm.transform.s, torch.full((32,), 0.3))


def test_the_transform_has_its_own_rate_and_vectors_do_not_decay(folder, tmp_path):
    options = tiny_run.options(
        folder, lora=LoraOptions(rank=0), output_dir=tmp_path, weight_decay=0.1, max_steps=1
    )
    groups = {group["name"]: group for group in loop_of(options).optimizer.param_groups}
    rates = {name: (g["initial_lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {"base": (1e-2, 0.1), "vectors": (1e-2, 0.0), "transform": (5e-2, 0.0)}
    assert all(parameter.ndim == 1 for parameter in groups["vectors"]["params"])


@contextlib.contextmanager
def memory_for(rows, loop):
    """Running the trunk on more rows at once than these runs out of memory."""

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
    expected = trained(finished(options))
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
def test_memory_that_cannot_be_had_is_an_error_that_names_the_setting(
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


def test_early_stopping_keeps_the_best_model_and_the_last(folder, tmp_path):
    options = tiny_run.options(
        folder,
        output_dir=tmp_path,
        eval_data=(str(folder / "held_out.txt"),),
        eval_every=1,
        early_stop=2,
        max_steps=40,
        learning_rate=3.0,  # nothing gets better
    )
    assert command(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == results["best"]["step"] + 2 < 40
    best, last = (
        safetensors.torch.load_file(tmp_path / name / "perturbation.safetensors")["U"]
        for name in ("best", "model")
    )
    assert not torch.equal(best, last)


def test_the_command_leaves_a_model_that_scores_as_reported(folder, tmp_path):
    options = tiny_run.options(
        folder, output_dir=tmp_path, eval_data=(str(folder / "held_out.txt"),), eval_every=3
    )
    assert command(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["step"] for each in results["evaluations"]] == [0, 3, 6]
    lines = metrics(tmp_path)
    assert len(lines) == 9
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    base = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    loop = loop_of(options)
    loop.lm = fastperturb.load(base, tmp_path / "model")
    found, reported = loop.evaluate(loop.held_out), results["evaluations"][-1]
    assert found["nll"] == pytest.approx(reported["nll"], rel=1e-6)


def test_a_run_does_not_continue_under_other_options(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, max_steps=2)
    train(options, distributed.start())
    resumed = dataclasses.replace(options, resume="auto")
    with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
        train(dataclasses.replace(resumed, batch_size=2), distributed.start())
    slower = dataclasses.replace(
        resumed, learning_rate=0.005, perturb=dataclasses.replace(options.perturb, chunk_size=1)
    )
    with pytest.warns(UserWarning, match="other options: learning_rate was 0.01 and is 0.005$"):
        train(slower, distributed.start())
    with pytest.raises(FileExistsError, match="overwrite"):
        train(options, distributed.start())


def test_a_finished_run_that_is_resumed_ends_as_it_was(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, max_steps=2)
    train(options, distributed.start())
    before = (tmp_path / "model" / "adapter_model.safetensors").read_bytes()
    lines = metrics(tmp_path)
    train(dataclasses.replace(options, resume="auto"), distributed.start())
    assert (tmp_path / "model" / "adapter_model.safetensors").read_bytes() == before
    assert metrics(tmp_path) == lines


def test_bf16_holds_the_frozen_base_in_bf16_and_what_trains_in_fp32(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path, precision="bf16", max_steps=2)
    loop = finished(options)
    dtypes = {p.requires_grad: p.dtype for p in loop.lm.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert isinstance(loop.lm.base, peft.PeftModel)


def test_a_dry_run_says_what_would_run_and_writes_nothing(folder, tmp_path, capsys):
    options = tiny_run.options(folder, output_dir=tmp_path / "none", dry_run=True)
    assert command(options) == 0
    said = capsys.readouterr().out
    assert "learning_rate: 0.01" in said and "steps: 6" in said and "MiB" in said
    assert not (tmp_path / "none").exists()


def test_an_evaluation_that_does_not_fit_the_memory_says_so(folder, tmp_path):
    held_out = (str(folder / "held_out.txt"),)
    loop = loop_of(tiny_run.options(folder, output_dir=tmp_path, eval_data=held_out))
    with (
        memory_for(3, loop),
        report_of(loop) as report,
        pytest.raises(MemoryError, match="step 0 does not fit the memory of cpu"),
    ):
        loop.run(report)


def test_effective_samples_of_sequences_are_a_mean_over_sequences(folder, tmp_path):
    loop = loop_of(
        tiny_run.options(
            folder,
            output_dir=tmp_path,
            packing="stream",
            perturb=PerturbConfig(num_samples=4, latent_dim=4, marginal="sequence"),
            eval_data=(str(folder / "held_out.txt"),),
        )
    )
    assert 1 <= loop.evaluate(loop.held_out)["ess"] <= 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "dropout", "block_size": 65}, "block_size=65 is more than the 64 positions"),
        ({"tokenizer": "larger"}, "the tokenizer has 64 tokens and the model 63"),
    ],
)
def test_what_the_model_has_no_room_for_is_refused(changes, message, folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "larger")
    changes = {
        key: str(folder / value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    options = tiny_run.options(folder, output_dir=tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        train(options, distributed.start())


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_missed_at_once(tracker, folder, monkeypatch):
    monkeypatch.setattr("fastperturb.train.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {tracker}"):
        tiny_run.options(folder, report_to=(tracker,))


SEQUENCE, JVI = PerturbConfig(marginal="sequence"), PerturbConfig(estimator="jvi")
RESAMPLE, PAIRS = PerturbConfig(estimator="resample"), PerturbConfig(antithetic=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"perturb": SEQUENCE}, "packing='stream'"),
        ({"perturb": JVI}, "jvi_clip"),
        ({"perturb": RESAMPLE, "lora": LoraOptions(dropout=0.1)}, "lora.dropout"),
        ({"perturb": PAIRS, "method": "discrete"}, "no mirror image"),
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
def test_options_that_make_no_sense_are_refused(changes, message, folder):
    with pytest.raises(ValueError, match=message):
        tiny_run.options(folder, **changes)
