"""Hugging Face's Trainer on a PerturbedLM: the same run however it is split, stopped or saved."""

import copy
import dataclasses

import pytest
import tiny
import torch
import transformers
import two_processes
from torch import multiprocessing

import fastperturb
from fastperturb import PerturbConfig, PerturbTrainer, noise, wrap

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

FIELDS = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}


def tiny_lm(*, lora=False, dropout=0.0, **config):
    base = tiny.llama()
    if lora:
        base = tiny.with_lora(base, r=8, init_lora_weights=True, lora_dropout=dropout)
    return wrap(base, PerturbConfig(**{"num_samples": 3} | config))


def examples(count, *, length=9, seed=1):
    """Sequences whose labels begin anywhere, so that token counts differ."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (count, length), generator=generator)
    starts = torch.randint(length - 2, (count, 1), generator=generator)
    labels = ids.where(torch.arange(length) >= starts, -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**defaults | changes)


def trainer_of(lm, folder, *, options=None, train=None, **changes):
    return PerturbTrainer(
        lm,
        arguments(folder, **changes),
        train_dataset=examples(20) if train is None else train,
        eval_dataset=examples(6, seed=2),
        **options or {},
    )


def trained(folder, *, lm=None, resume=None, options=None, **changes):
    trainer = trainer_of(tiny_lm() if lm is None else lm, folder, options=options, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(lm):
    return {name: value.detach().clone() for name, value in lm.named_parameters()}


def assert_equal(tensors, expected, **tolerance):
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(value, expected[name], **tolerance or {"rtol": 0, "atol": 0})


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "learning_rate" in entry]


# One step, by hand and by the trainer


def test_a_step_is_the_wrappers_own_loss_under_the_steps_seed(tmp_path):
    rows = examples(4)
    trainer = trainer_of(
        tiny_lm(), tmp_path, train=rows, max_steps=2, train_sampling_strategy="sequential"
    )
    before = copy.deepcopy(trainer.lm)
    trainer.train()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    out = before(**batch, seed=noise.fold_in(trainer.args.seed, 0))
    logs = training_logs(trainer)
    assert logs[0]["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert logs[0]["ess"] == pytest.approx(out.ess.item(), rel=1e-5)
    assert logs[0]["shift"] == pytest.approx(out.shift.item(), rel=1e-5)
    assert logs[1]["shift"] != logs[0]["shift"]  # a window of its own, under another seed


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_neither_the_loss_nor_the_parameters(tmp_path, size):
    # 20 examples by eight: the last step of the epoch is half a batch.
    whole = trained(tmp_path, per_device_train_batch_size=8, max_steps=4)
    parts = trained(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        max_steps=4,
    )
    for one, other in zip(training_logs(whole), training_logs(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert_equal(parameters(parts.lm), parameters(whole.lm), rtol=1e-4, atol=1e-5)


def test_another_seed_gives_another_noise(tmp_path):
    same_order = {"data_seed": 0, "train_sampling_strategy": "sequential", "max_steps": 1}
    one, two = (trained(tmp_path, seed=seed, **same_order) for seed in (1, 2))
    assert training_logs(one)[0]["loss"] != training_logs(two)[0]["loss"]


def test_every_packed_document_has_a_row_id_and_rows_of_the_data_are_kept(tmp_path):
    trainer = trainer_of(tiny_lm(), tmp_path, per_device_train_batch_size=2)
    labels = torch.zeros(2, 5, dtype=torch.int64)
    # The second document may be cut off from its beginning.
    packed = {"labels": labels, "position_ids": torch.tensor([[0, 1, 4, 5, 6], [0, 1, 2, 3, 4]])}
    numbered = {"labels": labels, "rows": torch.tensor([7, 9])}
    alone = {"labels": labels, "position_ids": torch.arange(5).expand(2, -1)}
    micro_batches = [{"labels": labels}, packed, numbered, alone]
    batches, _ = trainer.get_batch_samples(iter(micro_batches), 4, "cpu")
    assert batches[0]["rows"].tolist() == [0, 1]
    first, second = batches[1]["rows"]
    assert first[0] == first[1] != first[2] == first[3] == first[4]
    assert len({*first.tolist(), *second.tolist()}) == 3
    assert batches[2]["rows"].tolist() == [7, 9]
    assert batches[3]["rows"].ndim == 1  # as the sequence marginal wants it


# The optimizer


def test_the_transform_has_a_learning_rate_and_weight_decay_of_its_own(tmp_path):
    trainer = trainer_of(tiny_lm(), tmp_path, weight_decay=0.1)
    *others, group = trainer.create_optimizer().param_groups
    assert group["params"] == list(trainer.lm.transform.parameters())
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.0)
    assert all(other["lr"] == 0.01 for other in others)
    ids = [id(value) for g in (*others, group) for value in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(trainer.lm.parameters()))

    rates = {"transform_learning_rate": 0.3, "transform_weight_decay": 0.2}
    group = trainer_of(tiny_lm(), tmp_path, options=rates).create_optimizer().param_groups[-1]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)


def test_the_transform_and_all_else_are_clipped_apart(tmp_path):
    trainer = trainer_of(tiny_lm(), tmp_path, max_grad_norm=0.01)
    ids = examples(4)
    batch = {name: torch.stack([row[name] for row in ids]) for name in ids[0]}
    trainer.lm(**batch, seed=1).loss.backward()
    whole = torch.cat([value.grad.flatten() for value in trainer.lm.parameters()]).norm()
    torch.testing.assert_close(trainer._clip_grad_norm(trainer.model), whole)
    for part in (trainer.lm.transform, trainer.lm.base):
        norm = torch.cat([value.grad.flatten() for value in part.parameters()]).norm()
        assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_clipping_a_telescope_warns(tmp_path):
    with pytest.warns(UserWarning, match="'mlmc', which is unbiased only without it"):
        trainer_of(tiny_lm(estimator="mlmc"), tmp_path)
    trainer_of(tiny_lm(estimator="mlmc"), tmp_path, max_grad_norm=0.0)  # and this does not


def test_a_frozen_transform_does_not_train(tmp_path):
    lm = tiny_lm()
    lm.transform.requires_grad_(False)
    before = parameters(lm)
    trained(tmp_path, lm=lm, max_steps=1)
    changed = {
        name for name, value in lm.named_parameters() if not torch.equal(value, before[name])
    }
    assert changed and not any(name.startswith("transform") for name in changed)


# Checkpoints


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, lora):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 2}
    changes |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    whole = trained(tmp_path, lm=tiny_lm(lora=lora, dropout=0.1), **changes)
    # Step 4 is in the middle of the second epoch.
    other = tiny_lm(lora=lora, dropout=0.1)
    for value in other.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value)
    resumed = trained(tmp_path, lm=other, resume=str(tmp_path / "checkpoint-4"), **changes)
    assert resumed.state.global_step == 6
    assert_equal(parameters(resumed.lm), parameters(whole.lm))
    assert training_logs(resumed) == training_logs(whole)


def test_load_reads_a_checkpoint(tmp_path):
    lm = tiny_lm(lora=True)
    trained(tmp_path, lm=lm, save_strategy="steps", save_steps=3)
    loaded = fastperturb.load(tiny.llama(), tmp_path / "checkpoint-3")
    assert_equal(parameters(loaded), parameters(lm))


def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_are_deleted(tmp_path):
    # So large a rate only makes it worse: the first evaluation is the best one.
    trainer = trained(
        tmp_path,
        lm=tiny_lm(lora=True),
        max_steps=4,
        learning_rate=10.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="perplexity",
        greater_is_better=False,
    )
    history = [e["eval_perplexity"] for e in trainer.state.log_history if "eval_perplexity" in e]
    best = 1 + history.index(min(history))
    assert best < 4
    assert trainer.evaluate()["eval_perplexity"] == min(history)
    checkpoints = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{best}", "checkpoint-4"}


def test_resuming_from_a_checkpoint_of_another_model_raises(tmp_path):
    trained(tmp_path, lm=tiny_lm(), save_strategy="steps", save_steps=3)
    folder = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="holds another model"):
        trained(tmp_path, lm=tiny_lm(scope="sequence"), resume=folder)
    with pytest.raises(ValueError, match="without an adapter.*with one"):
        trained(tmp_path, lm=tiny_lm(lora=True), resume=folder)


# Evaluation


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_evaluation_is_the_score_of_the_whole_set_for_any_batch_size(tmp_path, marginal, sampling):
    rows = examples(6, seed=2)
    evaluations = []
    for size in (4, 6):
        lm = tiny_lm(marginal=marginal, estimator="jensen", sampling=sampling, num_samples=4)
        trainer = trainer_of(
            lm, tmp_path, per_device_eval_batch_size=size, options={"num_eval_samples": 8}
        )
        evaluations.append(trainer.evaluate())
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    score = lm.eval().score(**batch, num_samples=8, seed=noise.fold_in(trainer.args.seed, -1))
    for metrics in evaluations:
        assert metrics["eval_loss"] == pytest.approx(score.nll.item(), rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(score.perplexity.item(), rel=1e-5)
        assert 0 < metrics["eval_shift"] < 1
    if marginal == "token":
        labelled = (batch["labels"][:, 1:] != -100).sum()
        expected = (score.ess.sum() / labelled).item()
        assert evaluations[0]["eval_ess"] == pytest.approx(expected, rel=1e-4)


def test_evaluating_does_not_change_the_training_that_follows(tmp_path):
    plain = trained(tmp_path)
    evaluated = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    assert_equal(parameters(evaluated.lm), parameters(plain.lm))
    losses = [e["eval_loss"] for e in evaluated.state.log_history if "eval_loss" in e]
    assert evaluated.evaluate()["eval_loss"] == losses[-1] != losses[0]


def test_an_evaluation_set_without_a_labelled_token_raises(tmp_path):
    trainer = trainer_of(tiny_lm(), tmp_path)
    ignored = [row | {"labels": torch.full((9,), -100)} for row in examples(2)]
    with pytest.raises(ValueError, match="no labelled token"):
        trainer.evaluate(ignored)
    with pytest.raises(ValueError, match="needs labels.*input_ids"):
        trainer.evaluate([{"input_ids": row["input_ids"]} for row in examples(2)])


# Other features of Trainer


def test_activation_checkpointing_changes_no_parameter(tmp_path):
    # transformers 5.23 renamed it.
    name = "activation_checkpointing" if "activation_checkpointing" in FIELDS else None
    name = name or "gradient_checkpointing"
    plain = trained(tmp_path, lm=tiny_lm(lora=True))
    lm = tiny_lm(lora=True)
    trained(tmp_path, lm=lm, **{name: True})
    assert any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    assert_equal(parameters(lm), parameters(plain.lm), rtol=1e-4, atol=1e-6)


def test_bf16_computes_in_half_precision_what_fp32_does(tmp_path):
    full = trained(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    half = trained(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, bf16=True)
    for name in ("loss", "eval_loss"):
        one, other = ([e[name] for e in t.state.log_history if name in e] for t in (full, half))
        assert one != other and one == pytest.approx(other, rel=2e-2)
    assert all(value.dtype == torch.float32 for value in half.lm.parameters())


def test_trainer_writes_to_the_config_of_the_base_and_not_of_the_lm(tmp_path):
    lm = tiny_lm()
    config = lm.config
    trainer = trainer_of(lm, tmp_path, use_cache=True)
    assert trainer.lm is lm and lm.config is config
    assert trainer.model.config is lm.base.config and lm.base.config.use_cache is True


def test_model_init_makes_a_model_for_every_run(tmp_path):
    changes = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = PerturbTrainer(
        args=arguments(tmp_path, **changes),
        model_init=lambda: tiny_lm(),
        train_dataset=examples(20),
    )
    first = trainer.lm
    trainer.train()
    assert trainer.lm is not first
    assert_equal(parameters(trainer.lm), parameters(trained(tmp_path, **changes).lm))


# Models and features that are rejected


def test_a_model_that_is_not_wrapped_raises(tmp_path):
    with pytest.raises(TypeError, match="PerturbedLM, got LlamaForCausalLM: wrap it first"):
        PerturbTrainer(tiny.llama(), arguments(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}, {}),
        ("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}, {}),
        ("compute_metrics", {}, {"compute_metrics": lambda prediction: {}}),
        ("compute_loss_func", {}, {"compute_loss_func": lambda *arguments: 0.0}),
    ],
)
def test_an_unsupported_argument_is_named_in_the_error(tmp_path, name, changes, options):
    with pytest.raises(ValueError, match=f"does not work with {name}"):
        trainer_of(tiny_lm(), tmp_path, options=options, **changes)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_sharded_parameters_raise(tmp_path, kind, monkeypatch):
    prepare = transformers.Trainer.create_accelerator_and_postprocess

    def with_plugin(self):
        prepare(self)
        setattr(self, f"is_{kind}_enabled", True)  # as its plugin would

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", with_plugin)
    with pytest.raises(ValueError, match=f"does not work with {kind}.*accelerate launch"):
        trainer_of(tiny_lm(), tmp_path)


# Two processes

PLANS = ("batched", "chunked")
OF_THE_BATCH = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}


def process(rank, folder):
    with two_processes.joined(rank, folder):
        for plan in PLANS:
            record(rank, folder, plan)


def record(rank, folder, plan):
    trainer = trained(
        folder,
        lm=tiny_lm(plan=plan),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        ddp_backend="gloo",
        **OF_THE_BATCH,
    )
    if rank == 0:
        torch.save((parameters(trainer.lm), trainer.state.log_history), folder / plan)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    # Two rounds of two processes' pairs are a batch of eight.
    one = trained(tmp_path, per_device_train_batch_size=8, **OF_THE_BATCH)
    for plan in PLANS:
        tensors, history = torch.load(tmp_path / plan)
        assert_equal(tensors, parameters(one.lm), rtol=1e-4, atol=1e-5)
        for entry, expected in zip(history, one.state.log_history, strict=True):
            assert entry.keys() == expected.keys()
            for name in entry.keys() & {"loss", "eval_loss", "eval_perplexity"}:
                assert entry[name] == pytest.approx(expected[name], rel=1e-5), name
            # Means of the parts' means: rows have unequal numbers of labels, and ess varies by row.
            for name in entry.keys() & {"ess", "shift", "eval_ess", "eval_shift"}:
                assert entry[name] == pytest.approx(expected[name], rel=5e-2), name
