"""Plans: how the M samples of a batch go through the trunk, all within one forward.

    batched    all at once                              trunk 4MP, M samples' activations
    chunked    `size` samples at a time, each chunk a   trunk 6MP, one chunk's activations
               checkpointed region, trunk and head
    resample   all scored without gradient, then K      trunk (2M + 4K)P, K samples' activations
               drawn ones with it
    auto       batched where M samples' activations fit the free memory, else chunked by what fits;
               a forward of one sample measures them, once for each kind of batch

P is half of one sample's forward. All give the same loss for the same seed, to rounding;
resample's gradient is an unbiased estimate of iwae's. Only log-probs outlive a chunk, but the
quadratic estimator couples the samples' whole distributions: under `chunked` it keeps their last
hidden states too. One ordinary backward follows, as DDP, FSDP2 and trainers expect: the regions
are torch.utils.checkpoint's, whose first pass skips the head's second GEMM.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastperturb import estimators
from fastperturb.engine.architectures import reject_dropout
from fastperturb.engine.batch import Batch
from fastperturb.engine.passes import Pass, Run, joined
from fastperturb.engine.planner import PlanReport, Size
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.sample_split import SampleSplit
from fastperturb.engine.tracing import untraced
from fastperturb.ops import head_op


@dataclass(frozen=True)
class Rerun:
    """The drawn samples of `resample`, run again under a gradient."""

    resampled: estimators.Resampled
    result: Pass


def execute(lm: WrappedModel, batch: Batch, run: Run) -> tuple[Pass, Rerun | None]:
    """Run all samples by the configured plan; `resample` also returns those that it ran again."""
    count = batch.sampling.count
    samples = torch.arange(count, device=batch.embeddings.device)
    split = lm.state.split
    if _resamples(lm, batch):
        return _resample(lm, batch, run, samples)
    report = _choose(lm, batch, run, split.largest_share(count))
    lm.state.report = _with_proposal(report, batch, lm)
    size = None if report.plan == "batched" else report.chunk_size
    return run_split(run, samples, split, size), None


def run_split(run: Run, samples: Tensor, split: SampleSplit, size: int | None) -> Pass:
    """Run samples [M] or [M, B], of which each process of the split runs its share.

    size: how many at a time, each chunk a checkpointed region; None is all at once.
    """
    share, run = split.share(samples), split.never_idle(run)
    if size is None:
        return split.gathered(run(share), len(samples))
    passes = -(-split.largest_share(len(samples)) // size)
    return split.gathered(_chunked(run, share, passes), len(samples))


def _chunked(run: Run, samples: Tensor, passes: int) -> Pass:
    """Run samples [M] or [M, B] in even parts; under a gradient each part is run twice."""
    parts = samples.tensor_split(passes)
    if not torch.is_grad_enabled():
        return joined([run(part) for part in parts])
    return _recomputed(run, parts)


@untraced  # the compiler takes no checkpoint with contexts like ours
def _recomputed(run: Run, parts: tuple[Tensor, ...]) -> Pass:
    return joined([_checkpointed(run, part) for part in parts])


def _checkpointed(run: Run, part: Tensor) -> Pass:
    """Run a part as a checkpointed region, which an error of the first pass leaves as a result.

    Torch below 2.13 would keep the region's hooks and contexts open for as long as the error's
    traceback lives, and an `except` that tries again would run inside them.
    """
    errors: list[Exception] = []
    is_first = True

    def region(part: Tensor) -> Pass | None:
        nonlocal is_first
        if not is_first:
            return run(part)
        is_first = False
        try:
            return run(part)
        except Exception as error:
            errors.append(error)
            return None

    result = checkpoint(region, part, use_reentrant=False, context_fn=_contexts)
    if errors:
        raise errors.pop()
    return result


def _contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return head_op.without_grad_hidden(), contextlib.nullcontext()


def _resamples(lm: WrappedModel, batch: Batch) -> bool:
    plan = lm.config.plan
    by_default = "resample" in batch.sampling.equations and plan == "auto"
    wanted = torch.is_grad_enabled() and (by_default or plan == "resample")
    return wanted and batch.labels is not None and not lm.has_one_draw


def _resample(
    lm: WrappedModel, batch: Batch, run: Run, samples: Tensor
) -> tuple[Pass, Rerun | None]:
    """Score all samples without gradient, then run the drawn ones with it."""
    sampling, config, state = batch.sampling, lm.config, lm.state
    why = "plan='resample' runs the model twice"
    reject_dropout(lm.base, why, remedy="use another estimator and plan")
    count, kept = sampling.count, sampling.backward_samples(config)
    share = state.split.largest_share(kept)
    size = config.chunk_size or state.planner.limited(share)
    size = min(size, state.split.largest_share(count))
    reason = f"{count} samples scored without gradient, {kept} of them run again with it"
    state.report = _with_proposal(PlanReport("resample", size, reason), batch, lm)
    with torch.no_grad():
        scored = run_split(run, samples, state.split, size)
    log_probs = batch.marginal_log_probs(scored.weighted_log_probs())
    resampled = sampling.resample(log_probs, batch.marginal_mask(), config)
    result = run_split(run, resampled.drawn, state.split, size if size < share else None)
    return scored, Rerun(resampled, result)


def _with_proposal(report: PlanReport, batch: Batch, lm: WrappedModel) -> PlanReport:
    """Return the report with the passes of the proposal, if there is one."""
    steps = 0 if batch.latent_mean is None else lm.config.proposal_steps
    return dataclasses.replace(report, proposal_steps=steps)


def _choose(lm: WrappedModel, batch: Batch, run: Run, count: int) -> PlanReport:
    """Return `batched` or `chunked` for `count` samples: as configured, or as planned by memory."""
    config, device = lm.config, batch.embeddings.device
    if config.plan == "batched":
        return PlanReport("batched", count, "as configured")
    if config.plan == "chunked" or config.chunk_size is not None:
        size = min(config.chunk_size or 1, count)
        return PlanReport("chunked", size, "as configured")
    prefix_length = batch.prefix and batch.prefix.hidden.shape[1]
    kind = (
        *(batch.embeddings.shape[1:], batch.embeddings.dtype, batch.return_logits),
        *(batch.labels is None, prefix_length, lm.training, tuple(batch.sampling.equations)),
        *(device, torch.is_autocast_enabled(device.type)),
        sum(value.requires_grad for value in lm.parameters()),
        any(getattr(part, "gradient_checkpointing", False) for part in lm.base.modules()),
    )
    # The parts of a call, one for each level of a telescope, are alive together until its backward.
    pairs = lm.state.split.largest_share(batch.pairs)
    size = Size(rows=len(batch), samples=count, pairs=max(pairs, count * len(batch)))
    return lm.state.planner.choose(run, size, kind, lm, device)
