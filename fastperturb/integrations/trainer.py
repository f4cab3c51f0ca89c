"""Hugging Face's Trainer for a PerturbedLM, and for the trainers that build on it (TRL's).

Everything of Trainer's works as for any model; what is particular:

    noise        keyed by (args.seed, step) and an example's place in the step's global batch, so
                 that micro-batches, processes and resuming change none; evaluation has its own
    optimizer    the transform has its own learning rate and weight decay
    checkpoints  hold what `lm.save_pretrained` writes, beside Trainer's optimizer and scheduler
    evaluation   the nll a token of the marginal, its perplexity, ess and shift; no logits exist

One process or many by torchrun or `accelerate launch` (DDP). Parameters that are sharded, by FSDP
or DeepSpeed, are refused: checkpoints could not be written from them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastperturb import noise
from fastperturb.checkpoint.format import Checkpoint
from fastperturb.engine.adapters import is_adapted
from fastperturb.engine.batch import IGNORED
from fastperturb.engine.positions import document_starts
from fastperturb.model import PerturbedLM
from fastperturb.train.loop import EVALUATION, TRANSFORM_RATE, perplexity

# A packed document's number: that of its row, then its own within the row.
_DOCUMENT_BITS = 16


class PerturbTrainer(transformers.Trainer):
    """transformers.Trainer for a PerturbedLM; `trainer.lm` is the model that was given.

    transform_learning_rate: default five times args.learning_rate.
    transform_weight_decay: args.weight_decay is for the other parameters.
    num_eval_samples: M of evaluations.

    The other arguments are Trainer's. To derive from another trainer too, name this one first:
    `class PerturbSFTTrainer(PerturbTrainer, trl.SFTTrainer)`.
    """

    def __init__(
        self,
        model: PerturbedLM | None = None,
        *args: Any,
        transform_learning_rate: float | None = None,
        transform_weight_decay: float = 0.0,
        num_eval_samples: int = 32,
        **options: Any,
    ) -> None:
        self.transform_learning_rate = transform_learning_rate
        self.transform_weight_decay = transform_weight_decay
        self.num_eval_samples = num_eval_samples
        super().__init__(model if model is None else _presented(model), *args, **options)
        self._refuse_unsupported()
        self._window = torch.zeros(3, device=self.args.device)  # sums of ess, shift and 1
        self._evaluated: list[Tensor] = []

    @property
    def lm(self) -> PerturbedLM:
        return self.model.lm

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return _presented(super().call_model_init(trial))

    def _refuse_unsupported(self) -> None:
        args, no_logits = self.args, "needs logits, and the perturbed model's loss makes none"
        sharding = "shards parameters: use DDP, by torchrun or `accelerate launch`"
        copying = "DataParallel would copy lm to: use DDP, by torchrun or `accelerate launch`"
        refused = {
            "deepspeed": (self.is_deepspeed_enabled, sharding),
            "fsdp": (self.is_fsdp_enabled, sharding),
            "several GPUs in one process": (args.n_gpu > 1, copying),
            "label_smoothing_factor": (args.label_smoothing_factor, no_logits),
            "compute_loss_func": (self.compute_loss_func, no_logits),
            "compute_metrics": (self.compute_metrics, no_logits),
            "neftune_noise_alpha": (args.neftune_noise_alpha, "is another noise than lm.config's"),
            "use_liger_kernel": (args.use_liger_kernel, "replaces the forward that lm goes around"),
        }
        for name, (given, why) in refused.items():
            if given:
                raise ValueError(f"PerturbTrainer does not work with {name}, which {why}")

    # Training

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """A step's micro-batches, their examples numbered through the global batch."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for index, batch in enumerate(batches):
            _number(batch, self._place(index) * self._train_batch_size)
        return batches, count

    def _place(self, index: int) -> int:
        """Of this process's batch `index`, among those of all processes."""
        return index * self.accelerator.num_processes + self.accelerator.process_index

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        seed = noise.fold_in(self.args.seed, self.state.global_step)
        # The loss is the model's own, whatever other trainer this class is mixed into.
        loss, found = transformers.Trainer.compute_loss(
            self,
            model,
            {"seed": seed, **inputs},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        # Summed where they are: reading them would wait for the device at every step.
        self._window += torch.stack([found.ess, found.shift, torch.ones_like(found.ess)]).detach()
        return (loss, found) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Trainer's optimizer, the transform's parameters in a group of their own."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        learned = [value for value in self.lm.transform.parameters() if value.requires_grad]
        if given or not learned:
            return optimizer
        moved = {id(value) for value in learned}
        for group in optimizer.param_groups:
            group["params"] = [value for value in group["params"] if id(value) not in moved]
        rate = self.transform_learning_rate
        optimizer.add_param_group(
            {
                "params": learned,
                "lr": TRANSFORM_RATE * self.args.learning_rate if rate is None else rate,
                "weight_decay": self.transform_weight_decay,
            }
        )
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:  # a training step's, which all processes log together
            ess, shift, count = self.accelerator.reduce(self._window).tolist()
            logs |= {"ess": ess / count, "shift": shift / count}
            self._window.zero_()
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's loop; the metrics are of all tokens, not means of batches' means."""
        self._evaluated = []
        result = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        nll, ess, shift, tokens = torch.cat(self._evaluated).double().sum(0).tolist()
        if not tokens:
            raise ValueError("there is no labelled token to evaluate on: every label is ignored")
        metrics = {
            "loss": nll / tokens,
            "perplexity": perplexity(nll / tokens),
            "ess": ess / tokens,
            "shift": shift / tokens,
        }
        result.metrics.update({f"{metric_key_prefix}_{k}": each for k, each in metrics.items()})
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        _number(inputs, self._place(len(self._evaluated)) * self.args.eval_batch_size)
        seed = noise.fold_in(self.args.seed, EVALUATION)
        plan = {"estimator": "iwae", "plan": "chunked", "chunk_size": self.lm.samples_at_once()}
        with torch.no_grad(), self.lm.overriding(**plan):
            found = model(**{"seed": seed, **inputs}, num_samples=self.num_eval_samples)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum(1)  # [B]
        nll = -found.log_marginal.reshape(len(tokens), -1).sum(1)
        sums = torch.stack([nll, found.ess * tokens, found.shift * tokens, tokens], dim=1)
        # By example, so that those which only fill up the last batch are left out.
        self._evaluated.append(self.accelerator.gather_for_metrics(sums))
        return found.loss, None, None

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.lm.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore(self.lm, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore(self.lm, self.state.best_model_checkpoint)


class _Presented(nn.Module):
    """A PerturbedLM as trainers expect a model: its `config` is the base's, for them to write to.

    What else they look for on a pretrained model, and only the base has, is the base's; the rest
    is the lm's.
    """

    _OF_BASE = (
        "activation_checkpointing_enable",
        "add_model_tags",
        "config",
        "generation_config",
        "gradient_checkpointing_enable",
    )

    def __init__(self, lm: PerturbedLM) -> None:
        super().__init__()
        self.lm = lm

    @functools.wraps(PerturbedLM.forward)  # whose arguments Trainer keeps of a dataset's columns
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.lm(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        lm: Any = super().__getattr__("lm")
        if name == "lm":
            return lm
        return getattr(lm.base if name in self._OF_BASE else lm, name)


def _presented(model: Any) -> _Presented:
    if not isinstance(model, PerturbedLM):
        raise TypeError(
            f"model must be a PerturbedLM, got {type(model).__name__}: wrap it first, by "
            "fastperturb.wrap(model, PerturbConfig(...))"
        )
    return _Presented(model)


def _number(batch: Any, first: int) -> None:
    """Give a batch the `rows` that key its noise, counted from `first`, unless it brings some."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"a batch needs labels and has only {list(batch)}: give the dataset a column of them, "
            "or use DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    rows = first + torch.arange(len(labels), device=labels.device)
    positions = batch.get("position_ids")
    if positions is not None:
        document = document_starts(positions, batch.get("attention_mask")).cumsum(1)
        if document.max() > 1:
            rows = (rows[:, None] << _DOCUMENT_BITS) + document
    batch.setdefault("rows", rows)


def restore(lm: PerturbedLM, folder: str | os.PathLike[str]) -> None:
    """Put what `lm.save_pretrained` wrote back into the model that wrote it, or one made alike."""
    saved = Checkpoint.read(Path(folder))
    base: Any = lm.base
    if (saved.config, saved.has_adapter) != (lm.config, is_adapted(base)):
        raise ValueError(
            f"{folder} holds another model than the one to continue: {saved.config} "
            f"{'with' if saved.has_adapter else 'without'} an adapter, not {lm.config} "
            f"{'with' if is_adapted(base) else 'without'} one; make the model as it was, or "
            "start from fastperturb.load(base, folder, is_trainable=True)"
        )
    lm.transform.load_state_dict(saved.transform_tensors())
    if saved.has_adapter:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(base, saved.adapter_tensors(), adapter_name=base.active_adapter)
    elif any(value.requires_grad for value in base.parameters()):
        written = type(base).from_pretrained(folder, dtype=base.dtype)
        base.load_state_dict(written.state_dict())
