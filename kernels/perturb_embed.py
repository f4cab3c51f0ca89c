"""perturb_embed on GPUs: the M perturbed copies of a batch of embeddings, and their gradients.

Forward. A program owns BT tokens by BD columns: it reads e once, projects it once, then for each
sample draws z in registers and writes a tile of T(e, z). With v = z U (for mlp, C takes U's part):

    diagonal  e + rho s z          lowrank  e + rho v          affine  (1 + z Ua) e + rho z Ub
    gated     e + rho (1 + G) v,   G = tanh((e / rho) A C)
    mlp       e + rho (gelu(h + z B) - gelu(h)) C,   h = (e / rho) A + b

`project_kernel` makes (e / rho) A [N, H] beforehand; G and gelu(h) are made from it once a tile.

Backward, with g the upstream gradient, 0 for U, C, ... where a token does not move, and N = B T:

    diagonal  ds = rho sum g z             lowrank  dU = rho z' g
    affine    dUa = z' (g e), dUb = rho z' g, de = sum_m g (1 + z Ua)
    gated     dU = rho z' (g (1 + G)), k = rho (1 - G^2) sum_m g v, dC = inner' k, q = k C'
    mlp       p_m = rho g C', dB = z' (p_m gelu'(h + z B)), dC = rho (gelu(h + z B) - gelu(h))' g
              q = sum_m p_m (gelu'(h + z B) - gelu'(h)), db = sum q
    both      dA = (e / rho)' q, de = sum_m g + q A' / rho

g is read once for up to 64 latents (32 for gated, affine and in fp32) and 64 hidden units (32 in
fp32 on Ampere), and again for each further block of either. q sums over all columns and is linear
in what a block of columns knows, so blocks store partial sums of it. All partial sums are added up
in a fixed order: the same seed gives the same bits. The table's gradient is torch's own of an
embedding, in fp32, rounded once.

What it costs for M = 8, N = 8192, D = 4096, R = 16, H = 64, bf16, a frozen table, and what to
expect of an H100 at 3.0 TB/s. PREDICTED: this code has been compiled for sm_80, sm_90 and sm_100
and run in the interpreter, never yet on a GPU. Instructions are SASS of the sample loop per output
element and thread; one costs 9.1 us at the issue limit. The output is 537 MB: writing it takes
0.18 ms, copying it 0.36 ms.

              MB moved  floor  GFLOP  instr.  regs  smem   warps/SM  predicted (ms), and its limit
    forward
    diagonal       604   0.20      1    29.6    87   4 KB       20   0.38  issue: Philox per element
    lowrank        604   0.20      9     8.4   104  25 KB       16   0.22  memory
    gated          681   0.23     17    14.8   128  16 KB       16   0.30  memory, issue
    affine         604   0.20     17    11.9   136  19 KB       12   0.23  memory
    mlp            681   0.23     40    14.9   182  41 KB        8   0.30  issue: gelu per block
    backward
    diagonal       537   0.18      1    33.0    63   4 KB       32   0.42  issue: Philox per element
    lowrank        554   0.19     17     9.4    95  27 KB       20   0.20  memory
    gated          847   0.28     40    26.6   250  33 KB        8   0.50  registers, then issue
    affine         638   0.21     34    10.9   158  27 KB       12   0.23  memory
    mlp            805   0.27     86    27.9   231  66 KB        8   0.55  registers, then issue

So gated's and mlp's backward should miss 75% of the speed of a copy: dC of a block of columns
fills the registers, 8 warps a multiprocessor hide little, and their partial sums of q and dC are
half of what they move beyond g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from fastperturb.kernels import perturb_embed_backward as backward
from fastperturb.kernels import perturb_embed_forward as forward
from fastperturb.kernels import perturb_embed_tiles as tiles

if TYPE_CHECKING:
    from fastperturb.ops.embed import EmbedCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def perturb_embed(call: EmbedCall) -> Tensor:  # [M, B, T, D]
    plan = _Plan(call)
    out = call.table.new_empty((plan.M, plan.B, plan.T, plan.D))
    plan.forward(out)
    return out


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
    want_table: bool,
) -> list[Tensor]:
    """The gradients of [table, *parameters]; the table's is empty unless wanted."""
    grad_e, grads = _Plan(call).backward(grad, want_table=want_table, per_sample=False)
    grads = [value[0, 0].to(like.dtype) for value, like in zip(grads, call.parameters)]
    if grad_e is None:
        return [call.table.new_empty(0), *grads]
    if call.ids is None:
        return [grad_e.reshape(call.table.shape), *grads]
    words, D = call.table.shape
    grad_table = torch.ops.aten.embedding_dense_backward(
        grad_e.float().reshape(*call.ids.shape, D), call.ids, words, -1, False
    )
    return [grad_table.to(call.table.dtype), *grads]


def perturb_embed_per_sample_grad(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
) -> list[Tensor]:
    """Each parameter's gradient from one (sample, row) alone: [M, B, ...]."""
    _, grads = _Plan(call).backward(grad, want_table=False, per_sample=True)
    return [value.to(like.dtype) for value, like in zip(grads, call.parameters)]


# What each parameter of a family is to the kernels, in the family's order.
_ROLES = {"diagonal": "U", "lowrank": "U", "gated": "UAC", "affine": "UV", "mlp": "AUbC"}

# (BT, BD, warps) for a 16-bit table and for fp32, where R <= 16 and H <= 64: the fewest
# instructions an element that the compiler fits into registers. With the embeddings' gradient the
# backward keeps another tile.
_FORWARD = {
    "diagonal": ((8, 256, 4), (8, 256, 4)),
    "lowrank": ((64, 128, 8), (64, 64, 8)),
    "gated": ((32, 128, 8), (32, 64, 8)),
    "affine": ((32, 128, 4), (32, 64, 4)),
    "mlp": ((16, 256, 4), (32, 64, 4)),
}
_BACKWARD = {
    ("diagonal", False): ((4, 256, 4), (4, 256, 4)),
    ("diagonal", True): ((4, 256, 4), (4, 256, 4)),
    ("lowrank", False): ((32, 128, 4), (16, 64, 4)),
    ("lowrank", True): ((32, 128, 4), (16, 64, 4)),
    ("gated", False): ((32, 128, 8), (16, 64, 8)),
    ("gated", True): ((16, 128, 8), (16, 64, 8)),
    ("affine", False): ((32, 128, 4), (16, 64, 4)),
    ("affine", True): ((32, 64, 4), (16, 64, 4)),
    ("mlp", False): ((16, 256, 8), (16, 64, 8)),
    ("mlp", True): ((16, 256, 8), (16, 64, 8)),
}


def _forward_tile(family: str, half: bool, R: int, H: int) -> tuple[int, int, int, int, int]:
    """(BT, BD, BR, BH, warps) that fit the registers, checked up to R = 128 and H = 256."""
    BT, BD, warps = _FORWARD[family][0 if half else 1]
    if family == "mlp" and not half and H > 64:
        BT = BT // 2
    return BT, BD, tiles.block(R, 32), tiles.block(H, 64), warps


def _backward_tile(
    family: str, want_table: bool, half: bool, R: int, H: int, major: int
) -> tuple[int, int, int, int, int]:
    """(BT, BD, BR, BH, warps) that fit the registers, checked up to R = 128 and H = 256.

    The gradients of U [BR, BD] and C [BH, BD] stay in registers, so more latents or hidden units
    take a smaller tile; the smallest still moves 16 bytes a thread. Before Hopper the operands of
    a product take registers too.
    """
    BT, BD, warps = _BACKWARD[family, want_table][0 if half else 1]
    BR, BH = tiles.block(R, 64 if half else 32), tiles.block(H, 64)
    ampere = major < 9
    if family in ("gated", "affine") and (R > 16 or H > 128):
        return 16, 64 if half else 32, 32, 64, 4
    if family == "gated":  # dC of fewer rows is not the warpgroup's product, and spills
        BD, BH = (BD // 2, 64 if half else 32) if ampere else (BD, 64)
    if family == "mlp" and half and (R != 16 or H > 64 or ampere):  # at R = 16 it only just fits
        BD = BD // 2
    if family == "mlp" and not half and ampere:
        BH = min(BH, 32)
    return BT, BD, BR, BH, warps


# Programs enough for a few waves; gated and mlp store more per program, so fewer.
_PROGRAMS = {"diagonal": 1024, "lowrank": 1024, "affine": 1024, "gated": 512, "mlp": 512}


class _Plan:
    """A call laid out for the kernels: tokens in one dimension, parameters by role, strides.

    The numbers may be expanded views and are read through their strides. What the kernels read
    row by row (parameters, ids, mask, the upstream gradient) is made contiguous if it is not.
    """

    def __init__(self, call: EmbedCall) -> None:
        table, ids, mask = call.table, call.ids, call.mask
        if table.dtype not in DTYPES:
            raise TypeError(f"table must have one of the dtypes {DTYPES}, got {table.dtype}")
        self.family, self.half = call.family, table.dtype != torch.float32
        self.M, self.D = call.samples.shape[0], table.shape[-1]
        self.B, self.T = call.positions.shape
        self.N = self.B * self.T
        if self.N >= 2**31:
            raise ValueError(f"ids must have fewer than 2^31 entries, got {self.B} x {self.T}")
        if ids is None:
            table = table.reshape(self.N, self.D)
        self.table = table if table.stride(-1) == 1 else table.contiguous()
        self.rho = call.embed_rms

        values = [value.contiguous() for value in call.parameters]
        roles: dict[str, Any] = dict(zip(_ROLES[call.family], values, strict=True))
        self.A, self.b = roles.get("A"), roles.get("b")
        self.U, self.V, self.C = roles["U"], roles.get("V"), roles.get("C")
        self.R = 1 if call.family == "diagonal" else self.U.shape[0]
        self.H = 1
        if self.C is not None:
            self.C, self.H = self.C.to(table.dtype), self.C.shape[0]

        self.source = {
            "table_ptr": self.table,
            "ids_ptr": None if ids is None else ids.contiguous(),
            "rho_ptr": call.embed_rms,
            "table_stride": self.table.stride(0),
            "N": self.N,
            "vocab": self.table.shape[0],
            "D": self.D,
            "H": self.H,
        }
        self.numbers = {
            "seed_ptr": call.seed,
            "samples_ptr": call.samples,
            "rows_ptr": call.rows,
            "positions_ptr": call.positions,
            "mask_ptr": None if mask is None else mask.contiguous().view(torch.uint8),
            "T": self.T,
            "samples_m": call.samples.stride(0),
            "samples_b": call.samples.stride(1),
            "rows_b": call.rows.stride(0),
            "rows_t": call.rows.stride(1),
            "positions_b": call.positions.stride(0),
            "positions_t": call.positions.stride(1),
            "R": self.R,
            "SCOPE": call.scope,
            "LATENT": call.latent,
            "ANTITHETIC": call.antithetic,
            "FAST": tiles.fast_maths(),
        }
        self.parameters = {"U_ptr": self.U, "V_ptr": self.V, "C_ptr": self.C}

    def forward(self, out: Tensor) -> None:
        BT, BD, BR, BH, num_warps = _forward_tile(self.family, self.half, self.R, self.H)
        BD = tiles.block(self.D, BD)
        tiles.launch(
            forward.forward_kernel,
            (triton.cdiv(self.N, BT) * triton.cdiv(self.D, BD),),
            {
                **self.source,
                **self.numbers,
                **self.parameters,
                "out_ptr": out,
                "inner_ptr": self.inner(),
                "M": self.M,
                "FAMILY": self.family,
                "BT": BT,
                "BD": BD,
                "BR": BR,
                "BH": BH,
            },
            num_warps=num_warps,
        )

    def backward(
        self, grad: Tensor, *, want_table: bool, per_sample: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The embeddings' gradient [N, D], and the parameters' [groups, segments, ...] in fp32.

        Per sample there is a group for each sample and a segment for each row, else one of each.
        """
        groups, segments = (self.M, self.B) if per_sample else (1, 1)
        segment = self.T if per_sample else self.N
        major = tiles.capability(self.table.device)
        BT, BD, BR, BH, num_warps = _backward_tile(
            self.family, want_table, self.half, self.R, self.H, major
        )
        BD = tiles.block(self.D, BD)
        ND, NR, NH = (triton.cdiv(*each) for each in ((self.D, BD), (self.R, BR), (self.H, BH)))
        split, splits = _split(segment, BT, ND * groups * segments, _PROGRAMS[self.family])
        parts = NR if self.family in ("gated", "affine") else 1

        lead = (groups, segments, splits)
        shapes: dict[str, tuple[int, ...]] = {
            "U": (1, self.R, self.D),
            "V": (1, self.R, self.D),
            "C": (parts, self.H, self.D),
        }
        if self.family == "diagonal":
            shapes["U"] = (1, self.D)
        if self.family == "mlp":
            shapes["U"] = (ND, self.R, self.H)
        partial = {
            role: self._fp32(*lead, *shapes[role]) for role in _ROLES[self.family] if role in shapes
        }
        grad_inner = None if self.A is None else self._fp32(parts * ND, groups, self.N, self.H)
        grad_e = None
        if want_table and self.A is None and parts == 1:
            grad_e = self.table.new_empty((1, self.N, self.D))
        elif want_table:
            grad_e = self._fp32(parts if self.A is None else 1, self.N, self.D)
        tiles.launch(
            backward.backward_kernel,
            (segments * splits * ND, groups, NR * NH),
            {
                **self.source,
                **self.numbers,
                **self.parameters,
                "grad_ptr": grad.contiguous(),
                "grad_e_ptr": grad_e,
                "grad_U_ptr": partial["U"],
                "grad_V_ptr": partial.get("V"),
                "grad_C_ptr": partial.get("C"),
                "grad_inner_ptr": grad_inner,
                "inner_ptr": self.inner(),
                "M": self.M // groups if self.M else 0,
                "segment": segment,
                "split": split,
                "FAMILY": self.family,
                "BT": BT,
                "BD": BD,
                "BR": BR,
                "BH": BH,
            },
            num_warps=num_warps,
            # In fp32 the tensor cores want g transposed, which async copies do word by word.
            num_stages=3 if self.half else 1,
        )
        grads = {role: value.sum((2, 3)) for role, value in partial.items()}
        if grad_inner is not None:
            grad_inner = grad_inner.sum(0)
            grads["b"] = grad_inner.view(groups, segments, segment, self.H).sum(2)
            grads["A"], grad_e = self.through_inner(grad_inner, grad_e, segments, segment)
        elif grad_e is not None:
            grad_e = grad_e[0] if parts == 1 else grad_e.sum(0).to(self.table.dtype)
        return grad_e, [grads[role] for role in _ROLES[self.family]]

    def inner(self) -> Tensor | None:
        """(e / rho) A [N, H], for mlp + b, in fp32."""
        if self.A is None:
            return None
        # Triton 3.5 fails on the chained products of 64 rows for Blackwell.
        wide = self.half and tiles.capability(self.table.device) < 10
        BT, BD, BH = 64 if wide else 32, 64, tiles.block(self.H, 64)
        # A few programs along D, since there are too few along N to fill a GPU.
        part = BD * triton.cdiv(triton.cdiv(self.D, BD), 4)
        parts = triton.cdiv(self.D, part)
        inner = self._fp32(parts, self.N, self.H)
        tiles.launch(
            forward.project_kernel,
            (triton.cdiv(self.N, BT), parts, triton.cdiv(self.H, BH)),
            {
                **self.source,
                "inner_ptr": inner,
                "A_ptr": self.A,
                "PART": part,
                "BT": BT,
                "BD": BD,
                "BH": BH,
            },
            num_warps=4,
        )
        inner = inner.sum(0)
        return inner if self.b is None else inner + self.b

    def through_inner(
        self,
        grad_inner: Tensor,  # [groups, N, H]
        grad_sum: Tensor | None,  # sum_m g [1, N, D]
        segments: int,
        segment: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of A [groups, segments, D, H] and, given sum_m g, of e [N, D]."""
        groups = grad_inner.shape[0]
        BT = 32 if self.H <= 64 else 16
        BD, BH = tiles.block(self.D, 64), tiles.block(self.H, 64)
        ND = triton.cdiv(self.D, BD)
        split, splits = _split(segment, BT, ND * groups * segments, 512)
        grad_A = self._fp32(groups, segments, splits, self.D, self.H)
        grad_e = None if grad_sum is None else self.table.new_empty((self.N, self.D))
        tiles.launch(
            backward.inner_kernel,
            (segments * splits * ND, groups, triton.cdiv(self.H, BH)),
            {
                **self.source,
                "grad_A_ptr": grad_A,
                "grad_e_ptr": grad_e,
                "sum_ptr": grad_sum,
                "grad_inner_ptr": grad_inner,
                "A_ptr": self.A,
                "segment": segment,
                "split": split,
                "BT": BT,
                "BD": BD,
                "BH": BH,
            },
            num_warps=4,
        )
        return grad_A.sum(2), grad_e

    def _fp32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.table.device)


def _split(segment: int, BT: int, programs: int, wanted: int) -> tuple[int, int]:
    """How many tokens of a segment one program takes, and how many programs that makes."""
    tiles_each = triton.cdiv(triton.cdiv(segment, BT), triton.cdiv(wanted, max(1, programs)))
    split = BT * max(1, tiles_each)
    return split, triton.cdiv(segment, split)
