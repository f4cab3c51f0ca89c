"""The samples of one call: seed, row ids, count, and the estimators that combine them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastperturb import estimators, noise
from fastperturb.config import INDEPENDENT_SAMPLES


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything that decides how the samples of one call are drawn and combined."""

    seed: Tensor
    rows: Tensor  # [B] or [B, T], the row ids that key the noise
    count: int  # M; of a telescope's rows that have a level, the samples of that level
    strata: int  # samples in a stratified group; 1: independent samples
    equations: dict[str, float]  # the estimators and their weights in the loss
    telescope: estimators.Telescope | None = None
    level: int | None = None  # of the telescope, once the batch is split by levels

    def first_rows(self) -> Tensor:
        """Return a row id for each batch row [B], of packed documents the first one's."""
        return self.rows if self.rows.ndim == 1 else self.rows[:, 0]

    def takes_groups(self, estimator: str) -> bool:
        """Return True if the estimator's units are stratified groups of samples."""
        return self.strata > 1 and estimator in INDEPENDENT_SAMPLES

    def backward_samples(self, config: Any) -> int:
        """Return K of `resample`."""
        return estimators.default_backward_samples(self.count, config.backward_samples)

    def combine(self, log_probs: Tensor, mask: Tensor, config: Any) -> Tensor:
        """Return the value of a telescope or of `resample`, whose own randomness is the seed's."""
        if self.telescope is not None and self.level is not None:
            return self.telescope.combine(log_probs, self.level, mask=mask)[0]
        return estimators.resample(log_probs, self._uniforms(config), mask=mask)[0]

    def resample(self, log_probs: Tensor, mask: Tensor, config: Any) -> estimators.Resampled:
        """Draw the scored samples to run again, with their weights."""
        return estimators.Resampled.of(log_probs, self._uniforms(config), mask=mask)

    def _uniforms(self, config: Any) -> Tensor:
        count = self.backward_samples(config)
        return noise.auxiliary_uniforms(self.seed, count, self.first_rows())
