"""Hugging Face's Trainer for a PerturbedLM, and for the trainers that build on it (TRL's).

Trainer works as it does for any model, with these differences:

    noise        is keyed by (args.seed, step) and the place of an example in the global batch: it
                 depends on neither micro-batches, processes nor resuming; evaluation has its own
    optimizer    gives the transform its own learning rate and weight decay
    checkpoints  hold the files of `lm.save_pretrained`, beside Trainer's optimizer and scheduler
    evaluation   reports the marginal nll a token, its perplexity, ess and shift; no logits exist

It runs in one process, or in several started by torchrun or `accelerate launch` (DDP). Parameters
that are sharded, by FSDP or DeepSpeed, are rejected: checkpoints could not be written from them.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastperturb import noise
from fastperturb.checkpoint.format import Checkpoint
from fastperturb.config import TELESCOPES, PerturbConfig
from fastperturb.diagnostics.score import for_scoring
from fastperturb.engine.adapters import is_adapted
from fastperturb.engine.batch import IGNORED
from fastperturb.engine.positions import document_starts
from fastperturb.model import PerturbedLM
from fastperturb.train.evaluation import EVALUATION, perplexity
from fastperturb.train.optimizer import TRANSFORM_RATE, clip_gradients

# The row id of a packed document: the number of its batch row, then its own in these low bits.
_DOCUMENT_BITS = 16


class PerturbTrainer(transformers.Trainer):
    """transformers.Trainer for a PerturbedLM, which is `trainer.lm`.

    transform_learning_rate: learning rate of the transform; default, 5 * args.learning_rate.
    transform_weight_decay: weight decay of the transform; args.weight_decay is for the others.
    num_eval_samples: the number of Monte-Carlo samples M in an evaluation.

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
        super().__init__(model if model is None else _as_trainer_view(model), *args, **options)
        self._reject_unsupported()
        self._warn_of_clipping()
        if isinstance(self.lm.config, PerturbConfig):
            self.lm.config.warn_of_proposal(stacklevel=3)
        # Sums of ess, shift and 1 since the last log.
        self._log_sums = torch.zeros(3, device=self.args.device)
        self._eval_sums: list[Tensor] = []  # of the batches of an evaluation

    @property
    def lm(self) -> PerturbedLM:
        return self.model.lm

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return _as_trainer_view(super().call_model_init(trial))

    def _reject_unsupported(self) -> None:
        args = self.args
        no_logits = "needs logits, and the perturbed model's loss makes none: leave it unset"
        sharding = "shards parameters: use DDP, by torchrun or `accelerate launch`"
        copying = "DataParallel would copy lm to: use DDP, by torchrun or `accelerate launch`"
        unsupported = {
            "deepspeed": (self.is_deepspeed_enabled, sharding),
            "fsdp": (self.is_fsdp_enabled, sharding),
            "several GPUs in one process": (args.n_gpu > 1, copying),
            "label_smoothing_factor": (args.label_smoothing_factor, no_logits),
            "compute_loss_func": (self.compute_loss_func, no_logits),
            "compute_metrics": (self.compute_metrics, no_logits),
            "neftune_noise_alpha": (
                args.neftune_noise_alpha,
                "is another noise than lm.config's: leave it unset",
            ),
            "use_liger_kernel": (
                args.use_liger_kernel,
                "replaces a forward that lm does not call: leave it off",
            ),
        }
        for name, (is_set, reason) in unsupported.items():
            if is_set:
                raise ValueError(f"PerturbTrainer does not work with {name}, which {reason}")

    def _warn_of_clipping(self) -> None:
        limit, estimator = self.args.max_grad_norm, self.lm.config.estimator
        if limit > 0 and estimator in TELESCOPES:
            warnings.warn(
                f"max_grad_norm={limit:g} clips the gradient of estimator={estimator!r}, which is "
                "unbiased only without it: set it to 0 for that, with many labels a step",
                stacklevel=3,
            )

    # Training

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return a step's micro-batches, with row ids that count through the global batch."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for index, batch in enumerate(batches):
            _set_rows(batch, self._global_index(index) * self._train_batch_size)
        return batches, count

    def _global_index(self, index: int) -> int:
        """Return the index of this process's batch `index` among those of all processes."""
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
        loss, outputs = transformers.Trainer.compute_loss(
            self,
            model,
            {"seed": seed, **inputs},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        # Summed on the device: reading them would wait for it at every step.
        values = [outputs.ess, outputs.shift, torch.ones_like(outputs.ess)]
        self._log_sums += torch.stack(values).detach()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Return Trainer's optimizer, with the transform in a parameter group of its own."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        transform = [value for value in self.lm.transform.parameters() if value.requires_grad]
        if exists or not transform:
            return optimizer
        transform_ids = {id(value) for value in transform}
        for group in optimizer.param_groups:
            group["params"] = [value for value in group["params"] if id(value) not in transform_ids]
        rate = self.transform_learning_rate
        optimizer.add_param_group(
            {
                "params": transform,
                "lr": TRANSFORM_RATE * self.args.learning_rate if rate is None else rate,
                "weight_decay": self.transform_weight_decay,
            }
        )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of the transform and of all else to max_grad_norm each."""
        self.accelerator.unscale_gradients()
        return clip_gradients(self.lm, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what Trainer logs; ess and shift too, as means over the steps since the last log."""
        if "learning_rate" in logs:  # a training step's, which all processes log together
            ess, shift, count = self.accelerator.reduce(self._log_sums).tolist()
            logs |= {"ess": ess / count, "shift": shift / count}
            self._log_sums.zero_()
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
        """Run Trainer's loop; metrics are means over all tokens, not over the batches' means."""
        self._eval_sums = []
        result = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        nll, ess, shift, tokens = torch.cat(self._eval_sums).double().sum(0).tolist()
        if not tokens:
            raise ValueError("there is no labelled token to evaluate on: every label is ignored")
        metrics = {
            "loss": nll / tokens,
            "perplexity": perplexity(nll / tokens),
            "ess": ess / tokens,
            "shift": shift / tokens,
        }
        result.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch, and keep its sums for `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        _set_rows(inputs, self._global_index(len(self._eval_sums)) * self.args.eval_batch_size)
        seed = noise.fold_in(self.args.seed, EVALUATION)
        changes = for_scoring(self.lm, self.num_eval_samples, self.lm.samples_at_once())
        with torch.no_grad(), self.lm.overriding(**changes):
            outputs = model(**{"seed": seed, **inputs}, num_samples=self.num_eval_samples)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum(1)  # [B]
        nll = -outputs.log_marginal.reshape(len(tokens), -1).sum(1)
        sums = torch.stack([nll, outputs.ess * tokens, outputs.shift * tokens, tokens], dim=1)
        # By example, so that those which only fill up the last batch are left out.
        self._eval_sums.append(self.accelerator.gather_for_metrics(sums))
        return outputs.loss, None, None

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


class _TrainerView(nn.Module):
    """A PerturbedLM with the attributes that trainers expect of a pretrained model.

    Names in `_OF_BASE` are looked up on the base (trainers write to `config`), all others on the
    PerturbedLM.
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

    @functools.wraps(PerturbedLM.forward)  # Trainer keeps the dataset columns that it names
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.lm(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        lm: Any = super().__getattr__("lm")
        if name == "lm":
            return lm
        return getattr(lm.base if name in self._OF_BASE else lm, name)


def _as_trainer_view(model: Any) -> _TrainerView:
    if not isinstance(model, PerturbedLM):
        raise TypeError(
            f"model must be a PerturbedLM, got {type(model).__name__}: wrap it first, by "
            "fastperturb.wrap(model, PerturbConfig(...))"
        )
    return _TrainerView(model)


def _set_rows(batch: Any, first: int) -> None:
    """Add `rows`, the row ids that key the noise, counted from `first`, if a batch has none."""
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
    """Load the files of `lm.save_pretrained` into the model that wrote them, or one made alike."""
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
        saved_base = type(base).from_pretrained(folder, dtype=base.dtype)
        base.load_state_dict(saved_base.state_dict())
