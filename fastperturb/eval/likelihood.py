"""Likelihood of a domain's text under a model, document by document.

Texts are scored under the token marginal, whatever marginal the model was trained for: it is the
one under which all methods can be compared. A model of the sequence marginal can be scored by its
own as well. There a sequence is a piece: the part of a document that lies in one block. Both
marginals see the same noise, which is keyed by the piece. `measure` scores the
blocks of a domain batch by batch and sums the results of `lm.score` over each document's labels,
in fp64; Monte-Carlo errors, the curve over numbers of samples and effective samples are combined
over batches. `tuned_temperature` fits the one number that flattens or sharpens a model's
predictions: a gain must exceed what this control gains. `unigram` predicts without any context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastperturb.data.domains import Domain
from fastperturb.data.packing import Block, collate
from fastperturb.diagnostics.score import Score
from fastperturb.engine.batch import IGNORED
from fastperturb.model import PerturbedLM
from fastperturb.report.bootstrap import DocumentSums

# The range that is searched for a temperature.
TEMPERATURES = (0.5, 2.0)
# Relative precision of a tuned temperature: finer than any nll resolves.
_TEMPERATURE_TOLERANCE = 5e-3


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The negative log-likelihood of a domain, as plain data.

    nll_sums, jackknife_sums, counts: for each document, the sum over its labels and their number.
        The jackknife is the nll without the bias that a finite number of samples has; for one
        sample there is no such correction, and it equals the nll.
    num_samples, temperature: the samples M, and the number that logits were divided by.
    standard_error: Monte-Carlo error of `nll`; None with one sample, as is ess.
    ess: effective samples of a label (sequence marginal: of a sequence), from 1 to M.
    curve: lists num_samples, nll and jackknife: the results with fewer samples; None where a
        number is undefined.
    tokens_per_second: labels scored per second, with all their samples.
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
        """Mean over labels, in nats."""
        return math.fsum(self.nll_sums) / sum(self.counts)

    @property
    def jackknife(self) -> float:
        return math.fsum(self.jackknife_sums) / sum(self.counts)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    @property
    def document_sums(self) -> DocumentSums:
        """The nll of each document, as the bootstrap takes it."""
        return DocumentSums(self.nll_sums, self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with derived numbers for those who read the file."""
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
    marginal: str = "token",
) -> Likelihood:
    """Return the likelihood of a domain with M samples; a model without randomness takes one."""
    device = lm.transform.embed_rms.device
    by_sequence = marginal == "sequence"
    sums = torch.zeros(3, domain.document_count, dtype=torch.float64, device=device)
    batches = []
    start = time.perf_counter()
    with evaluation_mode(lm, marginal):
        for inputs, owners in (_sequences if by_sequence else _blocks)(domain, batch_size):
            batch: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
            score = lm.score(**batch, num_samples=num_samples, seed=seed, temperature=temperature)
            labels = (batch["labels"][:, 1:] != IGNORED).long()
            counts = labels.sum(1) if by_sequence else labels
            scored = counts > 0
            documents = owners.to(device)[scored]
            for total, values in zip(sums, (*_nll_and_jackknife(score), counts)):
                # Not index_add_, which adds in any order on a GPU.
                total.index_put_((documents,), values[scored].double(), accumulate=True)
            batches.append(_BatchScore.of(score))
    nll_sums, jackknife_sums, label_sums = sums.tolist()
    return Likelihood(
        nll_sums=nll_sums,
        jackknife_sums=jackknife_sums,
        counts=[round(count) for count in label_sums],
        temperature=temperature,
        tokens_per_second=sum(label_sums) / (time.perf_counter() - start),
        **_combined(batches),
    )


# Arguments of `lm.score`, and the document of each of its results.
_Batches = Iterator[tuple[dict[str, Tensor], Tensor]]


def _blocks(domain: Domain, batch_size: int) -> _Batches:
    """Yield blocks, and the document of each label [B, T-1]."""
    for first in range(0, len(domain.blocks), batch_size):
        chosen = slice(first, first + batch_size)
        documents = torch.from_numpy(np.stack(domain.documents[chosen]))
        yield collate(domain.blocks[chosen]), documents[:, 1:]


def _sequences(domain: Domain, batch_size: int) -> _Batches:
    """Yield pieces with labels as rows of their own, and the document of each [B]."""
    pieces = [
        (block, piece, documents[piece[0]])
        for block, documents in zip(domain.blocks, domain.documents)
        for piece in np.split(np.arange(len(block.rows)), np.flatnonzero(np.diff(block.rows)) + 1)
        if (block.labels[piece] != IGNORED).any()
    ]
    for first in range(0, len(pieces), batch_size):
        blocks, places, documents = zip(*pieces[first : first + batch_size])
        tokens, labels = (
            [torch.from_numpy(getattr(block, name)[piece]) for block, piece in zip(blocks, places)]
            for name in ("tokens", "labels")
        )
        batch = {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence(list(map(torch.ones_like, tokens)), batch_first=True),
            "rows": torch.tensor([block.rows[piece[0]] for block, piece in zip(blocks, places)]),
        }
        yield batch, torch.tensor(documents)


def tuned_temperature(
    lm: PerturbedLM,
    domain: Domain,
    *,
    num_samples: int,
    seed: int,
    batch_size: int,
    bounds: tuple[float, float] = TEMPERATURES,
) -> float:
    """Return the temperature at which a domain, a validation text, is likeliest."""
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

    minimum = minimize_scalar(
        nll,
        bounds=tuple(map(math.log, bounds)),
        method="bounded",
        options={"xatol": _TEMPERATURE_TOLERANCE},
    )
    return math.exp(minimum.x)


def at_bound(temperature: float) -> bool:
    """Tell if a tuned temperature lies at an end of the searched range."""
    low, high = TEMPERATURES
    return not 1.01 * low < temperature < 0.99 * high


def label_counts(blocks: Sequence[Block], vocab_size: int) -> NDArray[np.int64]:
    """Count how often each token is a label [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block.labels[block.labels != IGNORED], minlength=vocab_size)
    return counts


def unigram(domain: Domain, counts: NDArray[np.int64], *, smoothing: float = 1.0) -> Likelihood:
    """Return the likelihood of a domain under token frequencies, without any context.

    counts: [V], from a training text; smoothing is added to each. The domain's own counts without
    smoothing give the entropy of its token frequencies, the least nll of any unigram model.
    """
    with np.errstate(divide="ignore"):
        log_probs = np.log(counts + smoothing) - math.log(counts.sum() + smoothing * len(counts))
    sums, labels = np.zeros((2, domain.document_count))
    for block, documents in zip(domain.blocks, domain.documents):
        labelled = block.labels != IGNORED
        np.add.at(sums, documents[labelled], -log_probs[block.labels[labelled]])
        np.add.at(labels, documents[labelled], 1)
    if not np.isfinite(sums).all():
        raise ValueError(
            f"domain {domain.name!r} has tokens whose count is 0: set smoothing above 0"
        )
    nll_sums = sums.tolist()
    return Likelihood(
        nll_sums=nll_sums, jackknife_sums=nll_sums, counts=labels.astype(int).tolist()
    )


@contextlib.contextmanager
def evaluation_mode(lm: PerturbedLM, marginal: str = "token") -> Iterator[None]:
    """Put a model in eval mode under a marginal; one that perturbs nothing is exact."""
    was_training = lm.training
    lm.eval()
    try:
        with contextlib.ExitStack() as stack:
            if not perturbs(lm):
                stack.enter_context(lm.exact())
            stack.enter_context(lm.overriding(marginal=marginal))
            # The report has a column of effective samples; a warning a batch says no more.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "on average fewer than .* effective samples")
            yield
    finally:
        lm.train(was_training)


def perturbs(lm: PerturbedLM) -> bool:
    """Tell if the model perturbs anything: the shift is linear in the outer parameters."""
    if not lm.perturbation.keeps_prefix:  # edits
        return True
    transform = lm.transform
    return any(bool(transform.get_parameter(name).any()) for name in transform.outer)


def has_own_marginal(lm: PerturbedLM) -> bool:
    """Tell if the model was trained for the sequence marginal and is random."""
    return lm.config.marginal == "sequence" and perturbs(lm) and not lm.has_one_draw


def _nll_and_jackknife(score: Score) -> tuple[Tensor, Tensor]:
    """Return the nll of each label [B, T-1] or sequence [B], and its jackknife."""
    nll = -score.log_marginal
    return nll, nll if len(score.curve.num_samples) == 1 else -score.jackknife


@dataclass(frozen=True)
class _BatchScore:
    """A batch's contribution to the errors and the curve of its domain."""

    count: int
    squared_error: float  # of the sum over labels
    ess: tuple[float, int]  # sum over labels or sequences, and their number
    num_samples: list[int]
    nll: Tensor
    jackknife: Tensor

    @classmethod
    def of(cls, score: Score) -> _BatchScore:
        count = int(score.count)
        error = float(score.nll_standard_error) * count
        ess = (float(score.ess.sum(dtype=torch.float64)), int((score.ess > 0).sum()))
        sizes, nll, jackknife = score.curve
        return cls(count, error**2, ess, sizes, nll.cpu() * count, jackknife.cpu() * count)


def _combined(batches: Sequence[_BatchScore]) -> dict[str, Any]:
    """Combine Monte-Carlo error, effective samples and curve; the noise of batches is independent.

    Return them under the names of the fields of `Likelihood`.
    """
    # A batch may have no labels, and then its nll is 0 / 0.
    batches = [batch for batch in batches if batch.count]
    if not batches:
        raise ValueError("the text has no token to predict: every document is a single token")
    count = sum(batch.count for batch in batches)
    sizes = batches[0].num_samples
    nll, jackknife = (
        [_finite(value) for value in torch.stack(parts).sum(0).div(count).tolist()]
        for parts in ([b.nll for b in batches], [b.jackknife for b in batches])
    )
    curve = {"num_samples": sizes, "nll": nll, "jackknife": jackknife}
    if sizes[-1] == 1:
        return {"num_samples": 1, "curve": curve}
    return {
        "num_samples": sizes[-1],
        # Infinite for a single pair of antithetic samples.
        "standard_error": _finite(math.sqrt(sum(b.squared_error for b in batches)) / count),
        "ess": sum(b.ess[0] for b in batches) / sum(b.ess[1] for b in batches),
        "curve": curve,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
