"""Input-switched affine networks, linear and time-varying: targets of known logit rank.

    x_{t+1} = x_t A_t[z_t],   logits after t tokens = x_t B_t,   x_0 given.

L_t[h, (f, z)] is the centred log-prob of z after h f, for all histories h of length t. It is the
product of their states and of a matrix that depends on the future: its rank is at most the states'
dimension d_t. Conversely, any distribution with ranks of at most d has such a form, so learning a
model of low logit rank is learning such a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastperturb.rank.learn.states import StateModel
from fastperturb.rank.types import Floats, Integers


class ISAN(StateModel):
    """A linear network whose matrices depend on the time and on the token read.

    start: x_0 [d_0].
    transitions: A_t [V, d_t, d_{t+1}] for t = 0 .. length - 2.
    outputs: B_t [d_t, V] for t = 0 .. length - 1.
    """

    def __init__(
        self, start: ArrayLike, transitions: Sequence[ArrayLike], outputs: Sequence[ArrayLike]
    ) -> None:
        self.start: Floats = np.asarray(start, dtype=np.float64)
        self.transitions: list[Floats] = [np.asarray(A, dtype=np.float64) for A in transitions]
        self.outputs: list[Floats] = [np.asarray(B, dtype=np.float64) for B in outputs]
        self.length = len(self.outputs)
        if self.length == 0 or len(self.transitions) != self.length - 1:
            raise ValueError(
                "outputs must hold one matrix for every time, and transitions one for all but the "
                f"last, got {self.length} outputs and {len(self.transitions)} transitions"
            )
        self.vocab_size = self.outputs[0].shape[-1]
        self._check_shapes()

    @classmethod
    def random(
        cls, vocab_size: int, length: int, rank: int, *, scale: float = 1.5, seed: int = 0
    ) -> ISAN:
        """Make a network whose states are turned by random orthogonal matrices: no direction fades.

        Logits have the standard deviation `scale`. The rank of L_t is
        min(rank, V^t, V^(length - t) - 1): it has V^t rows, and V^(length - t) - 1 is the number of
        free logits after a history, which count up to a constant.
        """
        for name, value in {"vocab_size": vocab_size, "length": length, "rank": rank}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        random = np.random.default_rng(seed)
        start = random.standard_normal(rank)
        transitions = [
            np.linalg.qr(random.standard_normal((vocab_size, rank, rank)))[0]
            * random.choice([-1.0, 1.0], size=(vocab_size, 1, rank))  # QR alone fixes a sign
            for _ in range(length - 1)
        ]
        outputs = scale * random.standard_normal((length, rank, vocab_size))
        return cls(start / np.linalg.norm(start), transitions, list(outputs))

    def _check_shapes(self) -> None:
        for t, output in enumerate(self.outputs):
            if output.ndim != 2 or output.shape[1] != self.vocab_size:
                raise ValueError(
                    f"outputs[{t}] must be [d_{t}, {self.vocab_size}], got {list(output.shape)}"
                )
        widths = [len(output) for output in self.outputs]
        if self.start.shape != (widths[0],):
            raise ValueError(f"start must be [{widths[0]}], got {list(self.start.shape)}")
        for t, transition in enumerate(self.transitions):
            shape = (self.vocab_size, widths[t], widths[t + 1])
            if transition.shape != shape:
                raise ValueError(
                    f"transitions[{t}] must be {list(shape)}, got {list(transition.shape)}"
                )

    def initial_state(self) -> Floats:
        return self.start

    def advance(self, step: int, states: Floats, tokens: Integers) -> Floats:
        return np.einsum("nd,nde->ne", states, self.transitions[step][tokens])

    def logits(self, step: int, states: Floats) -> Floats:
        return states @ self.outputs[step]


def noisy_parity(bits: int, secret: Sequence[int], *, flip: float) -> ISAN:
    """Make `bits` uniform bits, then the parity of those in `secret`, flipped with a probability.

    Its logit rank is 1: the state is the sign that the parity so far gives the last bit's logit.
    Yet to learn it from samples is the problem of learning parity with noise, for which nothing
    much faster than trying all subsets is known.
    """
    if not 0 < flip < 1:
        raise ValueError(f"flip must be a probability between 0 and 1, got {flip}")
    if not set(secret) <= set(range(bits)):
        raise ValueError(f"secret must hold bits from 0 to {bits - 1}, got {list(secret)}")
    keeps, flips = [[[1.0]], [[1.0]]], [[[1.0]], [[-1.0]]]
    half = 0.5 * math.log((1 - flip) / flip)
    return ISAN(
        start=[1.0],
        transitions=[flips if bit in secret else keeps for bit in range(bits)],
        outputs=[[[0.0, 0.0]]] * bits + [[[half, -half]]],
    )
