"""The mixture over samples of a perturbed model's next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor


class Mixture:
    """Log-probs [H, F, V] of all pairs, to which passes add a few samples of a few pairs at a time.

    weighted: the samples count by the probability they give to the context, not alike.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_samples: int, weighted: bool, device: torch.device
    ) -> None:
        self.log_probs = torch.full(shape, -torch.inf, device=device)
        self.weighted = weighted
        self._num_samples = num_samples
        self._log_weights = torch.full(shape[:2], -torch.inf, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, columns: Tensor, logits: Tensor, log_weights: Tensor) -> None:
        """Add m samples' logits [m, P, V], with weights [m, P], of the pairs at rows, columns."""
        at = (rows, columns)
        log_probs = logits.log_softmax(-1)
        if self._num_samples == 1:
            self.log_probs[at] = log_probs[0]
            return
        before = self._log_weights[at]
        after = torch.logaddexp(before, log_weights.logsumexp(0))
        shares = (log_weights - after).float()
        new = (log_probs + shares[..., None]).logsumexp(0)
        old = self.log_probs[at] + (before - after).float()[:, None]
        self.log_probs[at], self._log_weights[at] = torch.logaddexp(old, new), after
