"""How likely a domain's text is under a model, document by document.

The marginal is that of tokens, whatever marginal the model was trained for: it is the one in which
all methods, and the plain model among them, can be compared. `measure` scores the blocks of a
domain batch by batch and sums what `lm.score` finds over each document's labels, in fp64;
Monte-Carlo errors, M-curve and effective samples are combined over batches. `tuned_temperature`
fits the one number that flattens or sharpens a model's predictions, the control against which a
gain must stand, and `unigram` is what can be had without any context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastperturb.data.domains import Domain
from fastperturb.data.packing import Block, collate
from fastperturb.diagnostics.score import Score
from fastperturb.engine.batch import IGNORED
from fastperturb.model import EditedLM, PerturbedLM

# Among which a temperature is sought.
TEMPERATURES = (0.5, 2.0)
# How well a temperature is known, as a share of it: finer than any nll resolves.
_TEMPERATURE_TOLERANCE = 5e-3


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The negative log-likelihood of a domain, as plain data.

    nll_sums, jackknife_sums, counts: of each document, over its labels. The jackknife is the nll
        without the bias that a finite number of draws has; one draw has none, and it is the nll.
    num_samples, temperature: the draws M, and what logits were divided by.
    standard_error: Monte-Carlo error of `nll`; None where there is one draw, as is ess.
    ess: effective samples of a label, from 1 to M.
    curve: num_samples, and the nll and jackknife that so many draws give; None where there is none.
    tokens_per_second: labels scored in a second, all draws of them.
    """

    nll_sums: list[float]
    jackknife_sums: list[float]
    counts: list[int]
    num_samples: int = 1
    temperature: float = 1.0
    standard_error: float | None = None
    ess: float | None = None
    curve: dict[str, list[Any]] = field(default_factory=dict)
    tokens_per_second: float | None = None

    @property
    def nll(self) -> float:
        """A label, in nats."""
        return math.fsum(self.nll_sums) / sum(self.counts)

    @property
    def jackknife(self) -> float:
        return math.fsum(self.jackknife_sums) / sum(self.counts)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with what follows from the sums for whoever reads the file."""
        derived = {"nll": self.nll, "jackknife": self.jackknife, "perplexity": self.perplexity}
        return derived | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Likelihood:
        derived = ("nll", "jackknife", "perplexity")
        return cls(**{name: value for name, value in values.items() if name not in derived})


def measure(
    lm: PerturbedLM,
    domain: Domain,
    *,
    num_samples: int,
    seed: int,
    batch_size: int,
    temperature: float = 1.0,
) -> Likelihood:
    """The likelihood of a domain under M draws; a model that has one draw takes one."""
    device = lm.transform.embed_rms.device
    sums = torch.zeros(3, domain.document_count, dtype=torch.float64, device=device)
    batches = []
    start = time.perf_counter()
    with measured_as_is(lm):
        for first in range(0, len(domain.blocks), batch_size):
            chosen = slice(first, first + batch_size)
            batch: dict[str, Any] = collate(domain.blocks[chosen])
            batch = {name: value.to(device) for name, value in batch.items()}
            found = lm.score(**batch, num_samples=num_samples, seed=seed, temperature=temperature)
            mask = batch["labels"][:, 1:] != IGNORED
            documents = torch.from_numpy(np.stack(domain.documents[chosen])).to(device)[:, 1:][mask]
            for total, each in zip(sums, _outcomes(found)):
                total.index_add_(0, documents, each[mask].double())
            batches.append(_Batch.of(found))
    nll_sums, jackknife_sums, counts = sums.tolist()
    return Likelihood(
        nll_sums=nll_sums,
        jackknife_sums=jackknife_sums,
        counts=[round(count) for count in counts],
        temperature=temperature,
        tokens_per_second=sum(counts) / (time.perf_counter() - start),
        **_combined(batches),
    )


def tuned_temperature(
    lm: PerturbedLM,
    domain: Domain,
    *,
    num_samples: int,
    seed: int,
    batch_size: int,
    bounds: tuple[float, float] = TEMPERATURES,
) -> float:
    """The temperature at which a domain is likeliest: found on validation text, used on others."""
    from scipy.optimize import minimize_scalar

    def nll(log_temperature: float) -> float:
        return measure(
            lm,
            domain,
            num_samples=num_samples,
            seed=seed,
            batch_size=batch_size,
            temperature=math.exp(log_temperature),
        ).nll

    found = minimize_scalar(
        nll,
        bounds=tuple(map(math.log, bounds)),
        method="bounded",
        options={"xatol": _TEMPERATURE_TOLERANCE},
    )
    return math.exp(found.x)


def at_bound(temperature: float) -> bool:
    """Whether a tuned temperature is as far as was sought."""
    low, high = TEMPERATURES
    return not 1.01 * low < temperature < 0.99 * high


def label_counts(blocks: Sequence[Block], vocab_size: int) -> NDArray[np.int64]:
    """How often each token is a label [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block.labels[block.labels != IGNORED], minlength=vocab_size)
    return counts


def unigram(domain: Domain, counts: NDArray[np.int64], *, smoothing: float = 1.0) -> Likelihood:
    """Every label predicted by how often it came in another text: no context at all.

    counts: [V] of that text, to each of which smoothing is added. The domain's own counts without
    smoothing give the entropy of its token frequencies, below which no unigram model comes.
    """
    with np.errstate(divide="ignore"):
        log_probs = np.log(counts + smoothing) - math.log(counts.sum() + smoothing * len(counts))
    sums, labels = np.zeros((2, domain.document_count))
    for block, documents in zip(domain.blocks, domain.documents):
        labelled = block.labels != IGNORED
        np.add.at(sums, documents[labelled], -log_probs[block.labels[labelled]])
        np.add.at(labels, documents[labelled], 1)
    if not np.isfinite(sums).all():
        raise ValueError(f"{domain.name!r} has tokens that counts has not: set smoothing above 0")
    nll_sums = sums.tolist()
    return Likelihood(
        nll_sums=nll_sums, jackknife_sums=nll_sums, counts=labels.astype(int).tolist()
    )


@contextlib.contextmanager
def measured_as_is(lm: PerturbedLM) -> Iterator[None]:
    """Within it the model is in eval mode, takes one draw if nothing moves, and predicts tokens."""
    was_training = lm.training
    lm.eval()
    try:
        with contextlib.ExitStack() as stack:
            if not moves(lm):
                stack.enter_context(lm.exact())
            stack.enter_context(lm.overriding(marginal="token"))
            yield
    finally:
        lm.train(was_training)


def moves(lm: PerturbedLM) -> bool:
    """Whether the transform moves anything; its shift is linear in its outer parameters."""
    if isinstance(lm, EditedLM):
        return True
    transform = lm.transform
    return any(bool(transform.get_parameter(name).any()) for name in transform.outer)


def _outcomes(found: Score) -> tuple[Tensor, Tensor, Tensor]:
    """Each label's nll, jackknifed nll and 1 [B, T-1]."""
    nll = -found.log_marginal
    jackknife = nll if len(found.curve.num_samples) == 1 else -found.jackknife
    return nll, jackknife, torch.ones_like(nll)


@dataclass(frozen=True)
class _Batch:
    """What a batch adds to a domain's errors and curve."""

    count: int
    squared_error: float  # of the sum over its labels
    ess: tuple[float, int]  # its sum and the labels it is over
    num_samples: list[int]
    nll: Tensor
    jackknife: Tensor

    @classmethod
    def of(cls, found: Score) -> _Batch:
        count = int(found.count)
        error = float(found.nll_standard_error) * count
        ess = (float(found.ess.sum(dtype=torch.float64)), int((found.ess > 0).sum()))
        sizes, nll, jackknife = found.curve
        return cls(count, error**2, ess, sizes, nll.cpu() * count, jackknife.cpu() * count)


def _combined(batches: Sequence[_Batch]) -> dict[str, Any]:
    """Monte-Carlo error, effective samples and M-curve over batches, whose noise is independent."""
    # A batch may have no labels, and then its nll is 0 / 0.
    batches = [batch for batch in batches if batch.count]
    if not batches:
        raise ValueError("the text has nothing to predict: each of its documents is one token")
    count = sum(batch.count for batch in batches)
    sizes = batches[0].num_samples
    nll, jackknife = (
        [_finite(value) for value in torch.stack(each).sum(0).div(count).tolist()]
        for each in ([b.nll for b in batches], [b.jackknife for b in batches])
    )
    curve = {"num_samples": sizes, "nll": nll, "jackknife": jackknife}
    if sizes[-1] == 1:
        return {"num_samples": 1, "curve": curve}
    return {
        "num_samples": sizes[-1],
        # Of a single pair of antithetic draws there is none.
        "standard_error": _finite(math.sqrt(sum(b.squared_error for b in batches)) / count),
        "ess": sum(b.ess[0] for b in batches) / sum(b.ess[1] for b in batches),
        "curve": curve,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
