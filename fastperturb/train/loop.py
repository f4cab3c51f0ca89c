"""The training loop: blocks in, optimizer steps out, the same on any number of processes.

Step s of a run takes the s-th batch of blocks. Its noise is keyed by (seed, s) and the row ids of
the blocks, so it does not depend on how a batch is split over processes and micro-batches. Dropout
does: it is keyed by (seed, s, rank). Of the metrics, ess and shift are means over the parts of a
batch. A run that continues from a checkpoint of step s goes on bit for bit.

The loss is a sum over the labelled tokens of the batch, over their number. Every process knows that
number, since all see the whole batch and take their share, so only gradients are exchanged.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.checkpoint.pretrained import check_positions
from fastperturb.data import Block, TrainingData
from fastperturb.engine.adapters import unadapted
from fastperturb.engine.batch import IGNORED
from fastperturb.model import PerturbedLM
from fastperturb.train import distributed, failures, methods, state
from fastperturb.train.batches import autocast, label_count, micro_batches
from fastperturb.train.distributed import World
from fastperturb.train.evaluation import evaluate, perplexity
from fastperturb.train.optimizer import adamw, clip_gradients, cosine_schedule
from fastperturb.train.options import TrainOptions
from fastperturb.train.report import Report


class Loop:
    """One run: its model, its optimizer, its position in the data, and its steps."""

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        data: TrainingData,
        held_out: Sequence[Block],
        tokenizer: Any,
        folder: Path,
    ) -> None:
        self.options, self.world, self.folder = options, world, folder
        self.data, self.held_out, self.tokenizer = data, held_out, tokenizer
        self.lm = methods.build(options)
        check_sizes(self.lm, tokenizer, options)
        self.module = distributed.distribute(self.lm, world, options.parallel)
        self.total_steps = total_steps(options, data)
        self.optimizer = adamw(self.lm, options)
        self.step = 0
        self.schedule = self._schedule()
        self.last_saved: Path | None = None
        self.run_id: str | None = None  # the run's name in trackers
        self.best: dict[str, float] | None = None  # the evaluation of the model in best/
        self.evaluations_since_best = 0
        self.evaluations: list[dict[str, float]] = []
        self.lm.train()

    def _schedule(self) -> Any:
        return cosine_schedule(
            self.optimizer,
            warmup=self.options.warmup,
            total_steps=self.total_steps,
            step=self.step,
        )

    # Running

    def run(self, report: Report) -> None:
        """Train from self.step to the end."""
        options, self.run_id = self.options, report.run_id
        if self.step == 0 and self.held_out:
            self._evaluate(report)
        while self.step < self.total_steps and not self._should_stop():
            start = time.perf_counter()
            blocks = self.data.next_blocks(options.batch_size)
            metrics = self._take_step(blocks)
            metrics["tokens_per_second"] = label_count(blocks) / (time.perf_counter() - start)
            self.step += 1
            report.train(self.step, metrics)
            is_last = self.step == self.total_steps
            if self.held_out and (is_last or self.step % options.eval_every == 0):
                self._evaluate(report)
            if is_last or self._should_stop() or self.step % options.save_every == 0:
                self.save()

    def _should_stop(self) -> bool:
        limit = self.options.early_stop
        return limit is not None and self.evaluations_since_best >= limit

    def _take_step(self, blocks: list[Block]) -> dict[str, float]:
        """Update the parameters and return metrics; raise if the loss or gradient is not finite."""
        sums = distributed.sum_over_dp(self.world, self._gradients_within_memory(blocks))
        loss, nll, ess, shift = sums.tolist()
        norm = float(clip_gradients(self.lm, self.options.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise failures.non_finite_step(self.step, loss, norm, blocks, self.last_saved)
        rates = {f"learning_rate_{g['name']}": g["lr"] for g in self.optimizer.param_groups}
        with self._explained_memory():
            self.optimizer.step()
        self.schedule.step()
        return {
            "loss": loss,
            "nll": nll,
            "perplexity": perplexity(nll),
            "ess": ess,
            "shift": shift,
            "gradient_norm": norm,
            **rates,
            "epoch": self.data.epoch,
        }

    def _gradients_within_memory(self, blocks: list[Block]) -> Tensor:
        """Run `_gradients`; out of memory, once more with half as many samples at a time."""
        try:
            return self._gradients(blocks)
        except RuntimeError as error:
            if not failures.is_out_of_memory(error):
                raise
            # Another process may have succeeded, and waits for this one's gradients.
            if self.world.size > 1 or not self.lm.step_down():
                raise self._out_of_memory() from error
        # Not in the handler, which keeps the failed pass alive.
        self.optimizer.zero_grad()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        with self._explained_memory():
            return self._gradients(blocks)

    @contextlib.contextmanager
    def _explained_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not failures.is_out_of_memory(error):
                raise
            raise self._out_of_memory() from error

    def _out_of_memory(self) -> MemoryError:
        return failures.out_of_memory(self.step, self.lm, self.world, self.last_saved)

    def _gradients(self, blocks: list[Block]) -> Tensor:
        """Compute a batch's gradients; return this process's part of loss, nll, ess and shift."""
        seed = noise.fold_in(self.options.seed, self.step)
        # Processes that share a batch's samples must not share their dropout.
        torch.manual_seed(int(noise.fold_in(seed, self.world.rank)))
        self.optimizer.zero_grad()
        if self.options.cross_fit:
            return self._cross_fit(blocks, seed)
        return self._backward(blocks, seed)

    def _cross_fit(self, blocks: list[Block], seed: Tensor) -> Tensor:
        """Take the transform's gradient from the second half, all others from the first."""
        half = (len(blocks) + 1) // 2
        sums = self._backward(blocks[:half], seed)
        first_half = {
            parameter: parameter.grad
            for group in self.optimizer.param_groups
            if group["name"] != "transform"
            for parameter in group["params"]
        }
        self.optimizer.zero_grad()
        if blocks[half:]:
            self._backward(blocks[half:], seed)
        for parameter, gradient in first_half.items():
            parameter.grad = gradient
        return sums

    def _backward(self, blocks: list[Block], seed: Tensor) -> Tensor:
        tokens = max(1, label_count(blocks))
        parts = micro_batches(blocks, self.options, self.world)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with (
                distributed.synchronising(self.module, is_last),
                autocast(self.options, self.world),
            ):
                out = self.module(**part, seed=seed, num_items_in_batch=tokens)
                (self.world.dp_size * out.loss).backward()  # DDP and FSDP2 average over processes
            with torch.no_grad():
                share = (part["labels"][:, 1:] != IGNORED).sum() / tokens
                nll = -out.log_marginal.sum() / tokens
                values = (out.loss, nll, out.ess * share, out.shift * share)
                sums += torch.stack([value.double() for value in values])
        return sums

    # Evaluating

    def _evaluate(self, report: Report) -> None:
        """Evaluate, and keep the model if it is the best so far."""
        with self._explained_memory():
            metrics = evaluate(self.lm, self.held_out, self.options, self.world)
        if not math.isfinite(metrics["nll"]):
            raise failures.non_finite_evaluation(self.step, metrics["nll"], self.last_saved)
        evaluation = {"step": self.step, **metrics}
        self.evaluations.append(evaluation)
        report.evaluation(self.step, metrics)
        if self.best is None or metrics["nll"] < self.best["nll"]:
            self.best, self.evaluations_since_best = evaluation, 0
            self.save_model(self.folder / "best")
        else:
            self.evaluations_since_best += 1

    # Saving and resuming

    def save_model(self, folder: Path) -> None:
        """Write the folder that `fastperturb.load` reads, and the tokenizer."""
        with methods.at_evaluation(self.lm, self.options):
            self.lm.save_pretrained(folder, is_main_process=self.world.is_main)
        if self.world.is_main:
            self.tokenizer.save_pretrained(folder)

    def save(self) -> None:
        """Write the checkpoint of this step."""
        tensors = distributed.training_tensors(self.lm, self.optimizer)
        if not self.world.is_main:
            self.save_model(self.folder)  # takes part in gathering, and writes nothing
            self.last_saved = state.path_of(self.folder / "checkpoints", self.step)
            distributed.wait(self.world)
            return
        data_values, data_tensors = self.data.state()
        tensors |= {f"data.{name}": value for name, value in data_tensors.items()}
        values = {
            "options": self.options.to_dict(),
            "data": data_values,
            "best": self.best,
            "worse": self.evaluations_since_best,
            "evaluations": self.evaluations,
            "run_id": self.run_id,
        }
        self.last_saved = state.save(
            self.folder / "checkpoints",
            self.step,
            tensors=tensors,
            values=values,
            write_model=self.save_model,
            keep=self.options.keep,
        )
        distributed.wait(self.world)

    def restore(self, saved: state.SavedState) -> None:
        """Continue from a checkpoint; raise ValueError if it is of a run with other options."""
        values = saved.values
        self.options.check_resumable(values["options"], saved.path)
        data_tensors, training_tensors = {}, {}
        for name, value in saved.tensors().items():
            if name.startswith("data."):
                data_tensors[name.removeprefix("data.")] = value
            else:
                training_tensors[name] = value
        self.data.restore(values["data"], data_tensors)
        distributed.load_training_tensors(self.lm, self.optimizer, training_tensors)
        self.step, self.last_saved = saved.step, saved.path
        self.schedule = self._schedule()
        self.best, self.evaluations_since_best = values["best"], values["worse"]
        self.evaluations, self.run_id = values["evaluations"], values["run_id"]


def check_sizes(lm: PerturbedLM, tokenizer: Any, options: TrainOptions) -> None:
    """Raise ValueError on blocks or tokens for which the model has no positions or embeddings."""
    base: Any = unadapted(lm.base)
    check_positions(options.model, base, options.block_size)
    vocab_size = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: give the "
            "model's own tokenizer, or resize the model's embeddings and save it"
        )


def total_steps(options: TrainOptions, data: TrainingData) -> int:
    if options.max_steps is not None:
        return options.max_steps
    assert data.blocks_per_epoch is not None  # streaming has max_steps
    return options.epochs * -(-data.blocks_per_epoch // options.batch_size)
