"""The training loop: blocks in, optimizer steps out, the same on any number of processes.

Step s of a run takes the s-th batch of blocks; its noise is keyed by (seed, s) and the blocks' own
numbers, so nothing but dropout, which is keyed by (seed, s, rank), depends on how a batch is split
over processes and micro-batches (of what is logged, ess and shift are means of the parts' means);
and a run that continues from a checkpoint of step s goes on bit for bit.

The loss is a sum over the batch's labelled tokens over their number, which every process knows,
since all of them see the whole batch and take their share: there is nothing to exchange but
gradients, by DDP or FSDP2. A share that is short is filled with blocks without labels, so that
all processes run the same number of passes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from fastperturb import noise
from fastperturb.data.options import Block, TrainingData, collate
from fastperturb.engine.adapters import unadapted
from fastperturb.engine.batch import IGNORED
from fastperturb.model import PerturbedLM
from fastperturb.train import distributed, methods, state
from fastperturb.train.distributed import World
from fastperturb.train.options import TrainOptions
from fastperturb.train.report import Report

# What keys the noise of evaluations; steps count from 0.
EVALUATION = -1
# The transform lives in relative units, in which a rate five times the base's was stable.
TRANSFORM_RATE = 5.0

Batch = dict[str, Any]  # what a call of the model takes


class Loop:
    """One run: its model, optimizer and place in the data, and what it does with them."""

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
        self.run_id: str | None = None  # under which trackers know the run
        self.best: dict[str, float] | None = None  # the evaluation whose model is in best/
        self.worse = 0  # evaluations since then
        self.evaluations: list[dict[str, float]] = []
        self.lm.train()

    def _schedule(self) -> Any:
        """The rate of every step, a function of its number."""
        warmup = int(self.options.warmup * self.total_steps)
        return get_cosine_schedule_with_warmup(
            self.optimizer, warmup, self.total_steps, last_epoch=self.step - 1
        )

    # Running

    def run(self, report: Report) -> None:
        """From self.step to the end."""
        options, self.run_id = self.options, report.run_id
        if self.step == 0 and self.held_out:
            self._judge(report)
        while self.step < self.total_steps and not self._should_stop():
            start = time.perf_counter()
            blocks = self.data.next_blocks(options.batch_size)
            metrics = self._take_step(blocks)
            metrics["tokens_per_second"] = label_count(blocks) / (time.perf_counter() - start)
            self.step += 1
            report.train(self.step, metrics)
            last = self.step == self.total_steps
            if self.held_out and (last or self.step % options.eval_every == 0):
                self._judge(report)
            if last or self._should_stop() or self.step % options.save_every == 0:
                self.save()

    def _should_stop(self) -> bool:
        return self.options.early_stop is not None and self.worse >= self.options.early_stop

    def _take_step(self, blocks: list[Block]) -> dict[str, float]:
        """One update of the parameters, unless something is not finite."""
        sums = distributed.total(self.world, self._gradients_within_memory(blocks))
        loss, nll, ess, shift = sums.tolist()
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(self._non_finite(loss, norm, blocks))
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
        """Gradients; where memory runs out, once more with half as many samples at a time."""
        try:
            return self._gradients(blocks)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Another process may have got through, and waits for this one's gradients.
            if self.world.size > 1 or not self.lm.step_down():
                raise MemoryError(self._memory_advice()) from error
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
            if not is_out_of_memory(error):
                raise
            raise MemoryError(self._memory_advice()) from error

    def _gradients(self, blocks: list[Block]) -> Tensor:
        """Gradients of a batch; and this process's part of its loss, nll, ess and shift."""
        seed = noise.fold_in(self.options.seed, self.step)
        # Processes that share a batch's samples draw dropout of their own, as its copies would.
        torch.manual_seed(int(noise.fold_in(seed, self.world.rank)))
        self.optimizer.zero_grad()
        if not self.options.cross_fit:
            return self._backward(blocks, seed)
        half = (len(blocks) + 1) // 2
        of_base = self._backward(blocks[:half], seed)
        kept = {
            parameter: parameter.grad
            for group in self.optimizer.param_groups
            if group["name"] != "transform"
            for parameter in group["params"]
        }
        self.optimizer.zero_grad()
        held_out = blocks[half:]
        if held_out:
            self._backward(held_out, seed)
        for parameter, gradient in kept.items():
            parameter.grad = gradient
        return of_base

    def _backward(self, blocks: list[Block], seed: Tensor) -> Tensor:
        tokens = max(1, label_count(blocks))
        parts = self.share(blocks)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for index, part in enumerate(parts):
            synced = index == len(parts) - 1
            with distributed.synchronising(self.module, synced), self.autocast():
                out = self.module(**part, seed=seed, num_items_in_batch=tokens)
                (self.world.dp_size * out.loss).backward()  # DDP and FSDP2 average over processes
            with torch.no_grad():
                labelled = (part["labels"][:, 1:] != IGNORED).sum() / tokens
                nll = -out.log_marginal.sum() / tokens
                found = (out.loss, nll, out.ess * labelled, out.shift * labelled)
                sums += torch.stack([each.double() for each in found])
        return sums

    def share(self, blocks: Sequence[Block]) -> list[Batch]:
        """This process's micro-batches of a batch."""
        each = -(-len(blocks) // self.world.dp_size)
        mine = list(blocks[each * self.world.dp_rank :][:each])
        batch = collate(mine + [blocks[0]] * (each - len(mine)))
        batch["labels"][len(mine) :] = IGNORED
        size = self.options.micro_batch_size or each
        batch = {name: value.to(self.world.device) for name, value in batch.items()}
        split = {name: value.split(size) for name, value in batch.items()}
        return [dict(zip(split, parts)) for parts in zip(*split.values())]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.options.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _clip(self) -> float:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        most = self.options.max_grad_norm
        norm: Any = nn.utils.clip_grad_norm_(trained, math.inf if most is None else most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _non_finite(self, loss: float, norm: float, blocks: list[Block]) -> str:
        rows = ", ".join(str(int(block.rows[0])) for block in blocks[:8])
        return (
            f"step {self.step}: the loss is {loss} and its gradient's norm {norm}, on the batch "
            f"whose blocks begin at rows {rows}{', ...' if len(blocks) > 8 else ''}; nothing was "
            f"updated. {self._last_good()} Lower learning_rate or transform_learning_rate, raise "
            "warmup, or look at that batch"
        )

    def _memory_advice(self) -> str:
        config = self.lm.config
        advice = ["lower micro_batch_size or block_size", "set gradient_checkpointing"]
        if config.plan == "batched":
            advice.insert(0, "set perturb.plan to auto or chunked")
        elif (config.chunk_size or 1) > 1:
            advice.insert(0, f"lower perturb.chunk_size ({config.chunk_size}), or leave it unset")
        elif self.world.size > 1:
            advice.insert(0, "set perturb.plan to chunked")
        return (
            f"step {self.step} does not fit the memory of {self.world.device}: "
            f"{'; or '.join(advice)}. {self._last_good()}"
        )

    def _last_good(self) -> str:
        if self.last_saved is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {self.last_saved}; resume=auto continues from it."

    # Judging

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Block]) -> dict[str, float]:
        """Marginal perplexity of blocks, under noise that is always the same."""
        options, world = self.options, self.world
        samples = 1 if options.has_one_draw else options.eval_samples
        seed = noise.fold_in(options.seed, EVALUATION)
        sums = torch.zeros(5, dtype=torch.float64, device=world.device)
        batches = range(0, len(held_out), options.batch_size)
        with self._still(), methods.at_evaluation(self.lm, options), self.autocast():
            for first in batches:
                for part in self.share(held_out[first : first + options.batch_size]):
                    found = self.lm.score(**part, num_samples=samples, seed=seed)
                    sums[0] -= found.sum
                    sums[1] += found.count
                    sums[2] += (found.nll_standard_error * found.count).nan_to_num().square()
                    sums[3] += found.ess.sum()
                    sums[4] += (found.ess > 0).sum()
        # One process's word: all must agree on what was best and when to stop.
        sums = distributed.of_main(world, distributed.total(world, sums))
        total, count, squares, ess, outcomes = sums.tolist()
        metrics = {"nll": total / count, "perplexity": perplexity(total / count)}
        if samples > 1:
            metrics |= {"nll_standard_error": math.sqrt(squares) / count, "ess": ess / outcomes}
        return metrics

    def _judge(self, report: Report) -> None:
        """Evaluate, and keep the model if it is the best so far."""
        with self._explained_memory():
            found = {"step": self.step, **self.evaluate(self.held_out)}
        if not math.isfinite(found["nll"]):
            raise FloatingPointError(
                f"step {self.step}: the held-out nll is {found['nll']}. {self._last_good()} Lower "
                "learning_rate or transform_learning_rate, or look at eval_data"
            )
        self.evaluations.append(found)
        report.evaluation(self.step, {k: v for k, v in found.items() if k != "step"})
        if self.best is None or found["nll"] < self.best["nll"]:
            self.best, self.worse = found, 0
            self.save_model(self.folder / "best")
        else:
            self.worse += 1

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        self.lm.eval()
        try:
            yield
        finally:
            self.lm.train()

    # Keeping

    def save_model(self, folder: Path) -> None:
        """What `fastperturb.load` reads, and the tokenizer."""
        with methods.at_evaluation(self.lm, self.options):
            self.lm.save_pretrained(folder, is_main_process=self.world.is_main)
        if self.world.is_main:
            self.tokenizer.save_pretrained(folder)

    def save(self) -> None:
        """A checkpoint of this step."""
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
            "worse": self.worse,
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
        """Continue from a checkpoint."""
        values = saved.values
        self.options.refuse_changes(values["options"], saved.path)
        of_data, of_training = {}, {}
        for name, value in saved.tensors().items():
            if name.startswith("data."):
                of_data[name.removeprefix("data.")] = value
            else:
                of_training[name] = value
        self.data.restore(values["data"], of_data)
        distributed.load_training_tensors(self.lm, self.optimizer, of_training)
        self.step, self.last_saved = saved.step, saved.path
        self.schedule = self._schedule()
        self.best, self.worse = values["best"], values["worse"]
        self.evaluations, self.run_id = values["evaluations"], values["run_id"]


def check_sizes(lm: PerturbedLM, tokenizer: Any, options: TrainOptions) -> None:
    """Refuse blocks that the model has no positions for, and tokens that it has no rows for."""
    base: Any = unadapted(lm.base)
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and options.block_size > positions:
        raise ValueError(
            f"block_size={options.block_size} is more than the {positions} positions that "
            f"{options.model!r} was made for; lower it"
        )
    rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows}: give the model's own "
            "tokenizer, or resize the model's embeddings and save it"
        )


def adamw(lm: PerturbedLM, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with the transform's own rate and decay; vectors (norms, biases) do not decay."""
    transform = {id(parameter) for parameter in lm.transform.parameters()}
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if id(parameter) not in transform]
    rate, transform_rate = options.learning_rate, options.transform_learning_rate
    groups = [
        ("base", [p for p in rest if p.ndim > 1], rate, options.weight_decay),
        ("vectors", [p for p in rest if p.ndim <= 1], rate, 0.0),
        (
            "transform",
            [p for p in trained if id(p) in transform],
            TRANSFORM_RATE * rate if transform_rate is None else transform_rate,
            options.transform_weight_decay,
        ),
    ]
    return torch.optim.AdamW(
        [
            {"name": name, "params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for name, params, lr, decay in groups
            if params
        ]
    )


def total_steps(options: TrainOptions, data: TrainingData) -> int:
    if options.max_steps is not None:
        return options.max_steps
    assert data.blocks_per_epoch is not None  # streaming has max_steps
    return options.epochs * -(-data.blocks_per_epoch // options.batch_size)


def label_count(blocks: Sequence[Block]) -> int:
    """What divides the loss: the labels that something predicts."""
    return sum(int((block.labels[1:] != IGNORED).sum()) for block in blocks)


def perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
