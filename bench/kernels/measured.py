"""Each kernel of each call, timed by itself on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import ahead_of_time
from bench.ahead_of_time import Launch
from bench.harness import Row, Variant, measure
from bench.kernels.calls import Calls, Sizes
from fastperturb.kernels import launch

SIZES = Sizes()


def rows(device: torch.device, *, repeats: int) -> Iterator[list[Row]]:
    """Yield the rows of each call: provider `call` is all of it, the others are its kernels."""
    for case in Calls(device, SIZES).cases():
        with ahead_of_time.observed() as launches:
            case.run()
        variants = [Variant("call", "full", case.run, opaque=True)]
        for name, group in ahead_of_time.by_kernel(launches).items():

            def again(group: list[Launch] = group) -> None:
                for kernel, grid, arguments, options in group:
                    launch.start(kernel, grid, arguments, **options)

            variants.append(Variant(name, "full", again, opaque=True))
        yield measure(
            case.op, variants, x={"call": case.name}, least_bytes={}, device=device, repeats=repeats
        )
