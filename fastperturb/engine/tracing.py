"""The parts of a call that torch.compile runs as they are and does not trace.

A traced number becomes a condition of its graph, so each new seed or step would be compiled anew.
The checks of a call look at values, which no graph can. So a compiler gets the model and the loss,
where all that changes from step to step is a tensor.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_disabled = functools.cache(torch.compiler.disable)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function, and all that it calls, out of compiled graphs.

    Unlike `torch.compiler.disable` the decorator does not import the compiler, which would take as
    long as all the rest of `import fastperturb.model`.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            torch._dynamo.skip_frame()
        if "torch._dynamo" in sys.modules:
            return _disabled(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
