"""Gradient noise: signal and variance of a step's gradient, by estimator and at equal flops.

The gradient g of a loss varies with the latents, with the samples that `resample` draws to send
backward, and with the examples. Over a few seeds, on one batch, traces of variances are

    latents      tr Var g_iwae
    resampling   E |g_resample - g_iwae|^2 at the same seeds. g_iwae is the mean of g_resample over
                 its choice of samples, so this adds to the latents' part. The choices are
                 independent: it is measured with K = 1, and K have 1 / K of it.
    data         E |g_A - g_B|^2 - latents, for random halves A and B of the batch's rows and
                 g = g_A + g_B: rows are independent examples.

and the batch's own signal is |E g|^2 = |mean g|^2 - tr Var g / repeats. A step of resample costs
2M + 4K and has a variance of latents + data + resampling / K; their product is least at
K = sqrt(c M / 2), c = resampling / (latents + data). While all samples weigh alike, resampling is
about M - 1 latents: resample pays where the data's part is even larger. Each of a proposal's P
steps costs 4 more, in every estimator's step, and M is M + 2P in the best K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperturb import estimators, noise
from fastperturb.engine import validate
from fastperturb.engine.architectures import reject_dropout
from fastperturb.engine.batch import IGNORED
from fastperturb.engine.protocol import WrappedModel

PARAMETERS = ("transform", "trainable")

Estimator = str | Mapping[str, float]


class Row(NamedTuple):
    """One estimator, or resample at one K."""

    estimator: Estimator
    backward_samples: int | None  # K of resample
    signal: float  # |E g|^2, the batch held
    variance: float  # tr Var g over latents and resampling, the batch held
    plan: str
    cost: float  # of the trunk, in halves of one sample's forward
    at_equal_flops: float  # signal / (variance + data) / cost, over that of iwae, batched

    @property
    def signal_to_noise(self) -> float:
        """Return the ratio for the batch's own gradient."""
        return self.signal / self.variance if self.variance else math.inf


@dataclass(frozen=True)
class GradientNoise:
    """The result of `PerturbedLM.gradient_noise`; `str` of it is a table.

    data_noise: the data's part of the variance, in units of iwae's latents; 0 if B = 1.
    draw_noise: c, the variance that `resample` adds with K = 1, in units of latents plus data.
    backward_samples: the best K for `resample` at equal flops, sqrt(c M / 2) without a proposal.
    """

    rows: list[Row]
    data_noise: float
    draw_noise: float
    backward_samples: int

    def __str__(self) -> str:
        lines = [f"{'estimator':<16} {'plan':<9} {'cost':>6} {'snr':>9} {'at equal flops':>15}"]
        for row in self.rows:
            kept = "" if row.backward_samples is None else f" K={row.backward_samples}"
            lines.append(
                f"{f'{row.estimator}{kept}':<16} {row.plan:<9} {row.cost:>6.4g} "
                f"{row.signal_to_noise:>9.3g} {row.at_equal_flops:>15.3g}"
            )
        return "\n".join(lines)


def gradient_noise(
    lm: WrappedModel,
    inputs: dict[str, Any],
    *,
    repeats: int,
    compared: Sequence[Estimator] | None,
    parameters: str,
    seed: int | Tensor | None,
) -> GradientNoise:
    """Measure a batch's gradient noise; `PerturbedLM.gradient_noise` describes the arguments."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    _check(lm, inputs, repeats)
    M = inputs.get("num_samples") or lm.config.num_samples
    others = [name for name in _compared(lm, M, compared) if name not in ("iwae", "resample")]
    step = _Step(lm, inputs, _parameters(lm, parameters))
    with lm.unsplit():
        measures = _measure(step, ["iwae", *others], repeats, seed)
    latents = measures.iwae.variance
    if latents == 0:
        raise ValueError(
            "the gradient is the same for every seed: no labelled token follows a perturbed one; "
            "give labels after a perturbed token"
        )
    data = _data_variance(step, measures)
    draw_noise = measures.resampling.mean_square / (latents + data)
    scored = M + 2 * estimators.proposal_steps(lm.config)
    return GradientNoise(
        rows=_rows(lm, measures, data, M),
        data_noise=data / latents,
        draw_noise=draw_noise,
        backward_samples=estimators.default_backward_samples(M, None, draw_noise * scored / M),
    )


@dataclass(frozen=True)
class _Step:
    """A batch whose gradient is taken again and again."""

    lm: WrappedModel
    inputs: dict[str, Any]
    parameters: list[nn.Parameter]

    @property
    def size(self) -> int:
        return len(self.inputs["labels"])

    def gradient(
        self, estimator: Estimator, seed: int, *, rows: Tensor | None = None, **changes: Any
    ) -> tuple[Tensor, str]:
        """Return the gradient [P] of the batch's loss, or of these rows' part; and the plan."""
        lm, labels = self.lm, self.inputs["labels"]
        call = {"rows": torch.arange(self.size, device=labels.device), **self.inputs, "seed": seed}
        call.setdefault("num_items_in_batch", (labels[:, 1:] != IGNORED).sum())
        if rows is not None:
            for name, value in call.items():
                if isinstance(value, Tensor) and (value.ndim > 1 or name == "rows"):
                    call[name] = value[rows]
        if lm.config.plan == "resample":
            changes = {"plan": "auto", **changes}
        before = lm.state.report
        try:
            with torch.enable_grad(), lm.overriding(estimator=estimator, **changes):
                loss = lm(**call).loss
                report = lm.state.report
        finally:
            lm.state.report = before
        assert report is not None
        gradients = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten().double() for gradient in gradients]), report.plan


class _Moments:
    """The first two moments of gradients, without keeping the gradients."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.sum: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        self.count += 1
        self.squares += float(gradient.square().sum())
        self.sum = gradient if self.sum is None else self.sum + gradient

    @property
    def mean_square(self) -> float:
        return self.squares / self.count

    @property
    def square_of_mean(self) -> float:
        assert self.sum is not None
        return float((self.sum / self.count).square().sum())

    @property
    def variance(self) -> float:
        spread = self.mean_square - self.square_of_mean
        # A difference below the rounding of the two is taken for 0.
        return spread * self.count / (self.count - 1) if spread > 1e-12 * self.mean_square else 0.0

    @property
    def signal(self) -> float:
        """|E g|^2, unbiased but for its floor."""
        return max(0.0, self.square_of_mean - self.variance / self.count)


class _Measures(NamedTuple):
    """Moments of gradients and of their differences, over the repeats."""

    estimators: list[Estimator]  # iwae first
    plans: Sequence[str]
    moments: list[_Moments]  # of each estimator's gradient
    resampling: _Moments  # of g_resample - g_iwae, with K = 1
    halves: _Moments  # of g_A - g_B

    @property
    def iwae(self) -> _Moments:
        return self.moments[0]


def _measure(
    step: _Step, compared: list[Estimator], repeats: int, seed: int | Tensor | None
) -> _Measures:
    moments = [_Moments() for _ in compared]
    plans: Sequence[str] = ()
    resampling, halves = _Moments(), _Moments()
    for number, half in _repeats(step, repeats, seed):
        gradients, plans = zip(*(step.gradient(estimator, number) for estimator in compared))
        for moment, gradient in zip(moments, gradients):
            moment.add(gradient)
        whole = gradients[0]
        resampled, _ = step.gradient("resample", number, plan="resample", backward_samples=1)
        resampling.add(resampled - whole)
        if step.size > 1:
            part, _ = step.gradient("iwae", number, rows=half)
            halves.add(2 * part - whole)
    return _Measures(compared, plans, moments, resampling, halves)


def _rows(lm: WrappedModel, measures: _Measures, data: float, M: int) -> list[Row]:
    """Return a row for each estimator, and for resample at each power of two up to M."""
    iwae, steps = measures.iwae, estimators.proposal_steps(lm.config)

    def at_equal_flops(signal: float, variance: float, cost: float) -> float:
        # A signal of 0 is hidden by the noise, so how it compares with iwae's is not known.
        scale = 1.0 if signal == iwae.signal else math.nan
        if signal and iwae.signal:
            scale = iwae.signal / signal
        total = variance * scale + data
        return (iwae.variance + data) / total * 4 * (M + steps) / cost if total else math.inf

    rows = []
    for name, plan, moment in zip(measures.estimators, measures.plans, measures.moments):
        signal, variance = moment.signal, moment.variance
        config = dataclasses.replace(lm.config, estimator=name, plan="auto")
        samples = estimators.expected_samples(config, M) - steps
        cost = (6 if plan == "chunked" else 4) * samples + 4 * steps
        gain = at_equal_flops(signal, variance, cost)
        rows.append(Row(name, None, signal, variance, plan, cost, gain))
    for kept in (2**k for k in range(M.bit_length())):
        variance = iwae.variance + measures.resampling.mean_square / kept
        again = 6 if kept > (lm.config.chunk_size or kept) else 4
        cost = 2 * M + again * kept + 4 * steps
        gain = at_equal_flops(iwae.signal, variance, cost)
        rows.append(Row("resample", kept, iwae.signal, variance, "resample", cost, gain))
    return rows


def _data_variance(step: _Step, measures: _Measures) -> float:
    """Return the variance that the choice of examples adds, from the halves' difference."""
    if step.size == 1:
        return 0.0
    iwae, halves = measures.iwae, measures.halves
    # An odd batch has halves that differ by a row, and so by that share of the gradient.
    share = (step.size % 2 / step.size) ** 2
    both = (halves.mean_square - share * iwae.mean_square) / (1 - share)
    return max(0.0, both - iwae.variance)


def _repeats(step: _Step, repeats: int, seed: int | Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield a seed and a random half of the rows per repeat; only read torch's generator."""
    generator = torch.Generator()
    if seed is None:
        generator.set_state(torch.get_rng_state())
    else:
        generator.manual_seed(int(noise.seed_tensor(seed, torch.device("cpu"))))
    for _ in range(repeats):
        number = int(noise.drawn_seed(generator))
        order = torch.randperm(step.size, generator=generator)
        yield number, order[: (step.size + 1) // 2].to(step.inputs["labels"].device)


def _check(lm: WrappedModel, inputs: dict[str, Any], repeats: int) -> None:
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 2:
        raise ValueError(f"repeats must be an int of 2 or more, got {repeats!r}")
    if "labels" not in inputs:
        raise ValueError(f"labels are needed for a loss, got only {list(inputs)}; pass labels=")
    validate.tensor("labels", inputs["labels"], "[B, T]", (torch.int64,))
    if lm.is_exact:
        raise ValueError("lm.exact() perturbs nothing, so its gradient has no noise")
    if lm.config.deterministic:
        raise ValueError("deterministic=True has one sample, so its gradient has no noise")
    reject_dropout(lm.base, "would add its own noise")


def _compared(
    lm: WrappedModel, num_samples: int, wanted: Sequence[Estimator] | None
) -> Sequence[Estimator]:
    """Return the estimators to compare with iwae: those wanted, or the config's and jvi_clip."""
    if isinstance(wanted, str | Mapping):
        raise TypeError(f"estimators must be a list of estimators or None, got {wanted!r}")
    if wanted is not None:
        return wanted
    own = lm.config.estimator
    if own == "jvi_clip" or not _takes(lm, "jvi_clip", num_samples):
        return [own]
    return [own, "jvi_clip"]


def _takes(lm: WrappedModel, estimator: Estimator, num_samples: int) -> bool:
    """Return True if the estimator can use so many samples as the config draws them."""
    try:
        dataclasses.replace(lm.config, estimator=estimator, num_samples=num_samples, plan="auto")
    except ValueError:
        return False
    return True


def _parameters(lm: WrappedModel, parameters: str) -> list[nn.Parameter]:
    if parameters not in PARAMETERS:
        raise ValueError(f"parameters must be one of {PARAMETERS}, got {parameters!r}")
    owner = lm.transform if parameters == "transform" else lm
    trained = [value for value in owner.parameters() if value.requires_grad]
    if not trained:
        raise ValueError(f"none of the {parameters!r} parameters requires a gradient")
    return trained
