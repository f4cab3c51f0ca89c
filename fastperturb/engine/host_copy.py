"""A device's integers for Python, copied while the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Integers of a device, whose copy to the host starts at once and is waited for when read.

    A GPU copies to pinned memory, on the current stream. A read waits for the work that came before
    the copy, not for what was queued since.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._ready: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[int]:
        """Return the numbers, once they have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        numbers: list[int] = self._values.tolist()
        return numbers


def true_first(mask: Tensor) -> Tensor:
    """Return numbers of which those of a mask's true entries come first, in rising order."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else sorted_by_truth(mask)


def sorted_by_truth(mask: Tensor) -> Tensor:
    """Return `true_first` followed by the other numbers: a GPU need not wait for their counts."""
    return (~mask).to(torch.uint8).argsort(stable=True)
