"""A call of `perturb_embed` laid out for its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastperturb.kernels import launch

if TYPE_CHECKING:
    from fastperturb.ops.calls import EmbedCall

# The role of each parameter in the kernels, in the family's order.
ROLES = {"diagonal": "U", "lowrank": "U", "gated": "UAC", "affine": "UV", "mlp": "AUbC"}
# What the kernels may keep for all samples between two passes over them.
BUFFER_BYTES = 32 * 2**20


class Sums(NamedTuple):
    """The shape of a parameter's gradient: a sum for each group of samples and segment of tokens.

    The gradient proper is one group of all samples and one segment of all tokens. Per-sample
    gradients have a group for each sample and a segment for each batch row.
    """

    groups: int
    segments: int
    segment_tokens: int

    def slabs(self, BT: int, column_blocks: int, wanted: int) -> tuple[int, int]:
        """Cut a segment into slabs of whole tiles, for about `wanted` programs in all.

        Return the tokens of a slab and the number of slabs.
        """
        programs = max(1, column_blocks * self.groups * self.segments)  # with one slab a segment
        tiles = triton.cdiv(triton.cdiv(self.segment_tokens, BT), triton.cdiv(wanted, programs))
        slab_tokens = BT * max(1, tiles)
        return slab_tokens, triton.cdiv(self.segment_tokens, slab_tokens)


class Layout:
    """Tokens in one dimension, parameters by role, and the arguments that kernels share.

    Sample numbers, row ids and positions may be expanded views, which are read through their
    strides. Tensors that are read row by row (parameters, ids, mask) become contiguous.
    """

    def __init__(self, call: EmbedCall) -> None:
        table, ids = call.table, call.ids
        launch.check_dtype("table", table)
        # To the kernels context is lowrank, on scaled latents.
        self.family = "lowrank" if call.family == "context" else call.family
        self.dtype, self.device = table.dtype, table.device
        self.half = table.dtype != torch.float32
        self.M, self.D = call.samples.shape[0], table.shape[-1]
        self.B, self.T = call.positions.shape
        self.N = self.B * self.T
        if self.N >= 2**31:
            raise ValueError(f"ids must have fewer than 2^31 entries, got {self.B} x {self.T}")
        if ids is None:
            table = table.reshape(self.N, self.D)
        self.table = table if table.stride(-1) == 1 else table.contiguous()

        values = [value.contiguous() for value in call.parameters]
        roles: dict[str, Any] = dict(zip(ROLES[self.family], values, strict=True))
        self.U, self.V = roles["U"], roles.get("V")
        self.A, self.b, self.C = roles.get("A"), roles.get("b"), roles.get("C")
        self.R = call.latent_dim
        self.H = 1
        if self.C is not None:
            self.C, self.H = self.C.to(table.dtype), self.C.shape[0]

        scale = call.latent_scale
        self.scale = None if scale is None else scale.flatten(0, 1).contiguous()  # [N, R]
        mean = call.dense_mean()
        self.rho = call.embed_rms
        self.source = {
            "table_ptr": self.table,
            "ids_ptr": None if ids is None else ids.contiguous(),
            "table_stride": self.table.stride(0),
            "vocab": self.table.shape[0],
        }
        self.noise = {
            "seed_ptr": call.seed,
            "samples_ptr": call.samples,
            "row_ids_ptr": call.rows,
            "positions_ptr": call.positions,
            "mask_ptr": None if call.mask is None else launch.as_bytes(call.mask),
            "mean_ptr": mean,
            "T": self.T,
            "samples_stride_m": call.samples.stride(0),
            "samples_stride_b": call.samples.stride(1),
            "row_ids_stride_b": call.rows.stride(0),
            "row_ids_stride_t": call.rows.stride(1),
            "positions_stride_b": call.positions.stride(0),
            "positions_stride_t": call.positions.stride(1),
            "mean_stride_b": 0 if mean is None else mean.stride(0),
            "mean_stride_t": 0 if mean is None else mean.stride(1),
            "std": call.latent_std,
            "SCOPE": call.scope,
            "NOISE": (call.latent, call.antithetic, call.strata, launch.has_fast_maths()),
        }

    def sums(self, *, per_sample: bool) -> Sums:
        return Sums(self.M, self.B, self.T) if per_sample else Sums(1, 1, self.N)

    def fp32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


class Piece(NamedTuple):
    """A part of a call's tokens: some batch rows, or some tokens of one."""

    rows: slice
    times: slice

    def of(self, call: EmbedCall) -> EmbedCall:
        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[self.rows, self.times]

        return call._replace(
            ids=cut(call.ids),
            table=call.table[self.rows, self.times] if call.ids is None else call.table,
            samples=call.samples[:, self.rows],
            rows=call.rows[self.rows, self.times],
            positions=call.positions[self.rows, self.times],
            mask=cut(call.mask),
            latent_mean=cut(call.latent_mean),
            latent_scale=cut(call.latent_scale),
        )

    def tokens(self, value: Tensor) -> Tensor:
        """Return this part of [M, B, T, ...], whose tokens follow each other within a sample."""
        return value[:, self.rows, self.times]

    def rows_of(self, value: Tensor, call: EmbedCall) -> Tensor:
        """Return this part of [N, ...]."""
        return value.unflatten(0, call.positions.shape)[self.rows, self.times].flatten(0, 1)


def pieces(call: EmbedCall, token_bytes: int) -> Iterator[Piece]:
    """Cut a call into pieces of which all samples' buffers keep to BUFFER_BYTES.

    Samples are not cut: a kernel reads an embedding once for all of them.
    """
    B, T = call.positions.shape
    bytes_of_all = call.samples.shape[0] * token_bytes
    if B * T * bytes_of_all <= BUFFER_BYTES:
        yield Piece(slice(0, B), slice(0, T))
        return
    tokens = max(1, BUFFER_BYTES // bytes_of_all)
    rows, times = max(1, tokens // T), min(T, tokens)
    for row in range(0, B, rows):
        for time in range(0, T, times):
            yield Piece(slice(row, min(B, row + rows)), slice(time, min(T, time + times)))
