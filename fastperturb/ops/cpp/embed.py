"""`perturb_embed` by the C++ kernels of `csrc/`, for CPUs.

The kernels compute in fp32. Gated's gain and mlp's hidden layer at z = 0 depend on a token alone
and are GEMMs of torch's; csrc/perturb_embed.h has the rest. The same bits come out for any number
of threads, except where torch's GEMMs differ (gated and mlp).

Measured (bench/results/perturb_embed_cpu*.json): on fresh memory lowrank takes 1.0 of the floor of
writing the output and reading its gradient. Where both stay in cache that floor is several times
lower and lowrank takes 3.2 of it, since its products alone, 4 M N R D flops in all, need about
as long as the floor at this CPU's peak. Diagonal is bound by Philox and Box-Muller, gated by
torch's GEMMs around the kernels, mlp by 4 times lowrank's flops.

Forward and backward with 8 stratified samples take 1.03 of the time of independent ones for
lowrank, 1.01 for affine, gated and mlp, and 0.95 to 1.03 for diagonal, which draws D latents a
token: its quantiles are polynomials (csrc/quantile.h). Compiled without AVX-512 diagonal takes 1.1,
and without AVX2, where a quantile takes a logarithm and a root, 1.7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastperturb.ops.calls import EmbedCall, Embedded


def perturb_embed(call: EmbedCall, want_shift: bool) -> Embedded:
    shape = (call.samples.shape[0], *call.positions.shape)
    out = call.table.new_empty((*shape, call.table.shape[-1]))
    squared_shift = out.new_empty(shape, dtype=torch.float32) if want_shift else None
    inputs = _Inputs.of(call)
    projected = inputs.project()
    if out.numel():
        arguments = inputs.arguments(inputs.per_token(projected))
        torch.ops.fastperturb_cpp.forward(out, *arguments, squared_shift)
    return Embedded(out, squared_shift, projected)


def perturb_embed_backward(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
    projected: Tensor | None,  # [N, H], from the forward
    want_table: bool,
) -> list[Tensor]:
    """Return the gradients of [table, *parameters, latent_scale if there is one].

    The table's is empty unless wanted.
    """
    scales = [] if call.latent_scale is None else [call.latent_scale]
    if grad.numel() == 0:
        grad_table = torch.zeros_like(call.table) if want_table else call.table.new_empty(0)
        return [grad_table, *(torch.zeros_like(value) for value in (*call.parameters, *scales))]
    inputs = _Inputs.of(call)
    grad_embeddings, grads = _gradients(
        inputs, grad, projected, want_embeddings=want_table, per_row=False
    )
    grad_scales = [grads.pop()] if scales else []
    if grad_embeddings is None:
        grad_table = call.table.new_empty(0)
    else:
        grad_table = _table_gradient(grad_embeddings, call)
    results = (value[0].to(like.dtype) for value, like in zip(grads, call.parameters, strict=True))
    return [grad_table, *results, *grad_scales]


def perturb_embed_per_sample_grad(
    grad: Tensor,  # [M, B, T, D]
    call: EmbedCall,
) -> list[Tensor]:
    """Return every parameter's gradient from each sample and batch row alone: [M, B, ...].

    A latent_scale's comes last.
    """
    M, B = call.samples.shape
    results = [value.new_zeros((M, B, *value.shape)) for value in call.parameters]
    if call.latent_scale is not None:
        results.append(call.latent_scale.new_zeros((M, *call.latent_scale.shape)))
    if grad.numel():
        projected = _Inputs.of(call).project()
        for m in range(M):
            sample = slice(m, m + 1)
            inputs = _Inputs.of(call._replace(samples=call.samples[sample]))
            _, grads = _gradients(
                inputs, grad[sample], projected, want_embeddings=False, per_row=True
            )
            for result, value in zip(results, grads, strict=True):
                result[m] = value
    return results


@dataclass
class _Inputs:
    """A call laid out for the kernels: contiguous, parameters in fp32, N = B T tokens."""

    source: Tensor  # the table [V, D], or embeddings [N, D]
    ids: Tensor | None  # [N]
    mask: Tensor | None  # [N]
    numbers: tuple[Tensor, ...]  # seed, samples, rows, positions
    parameters: list[Tensor]
    embed_rms: Tensor
    family: str
    options: tuple[str, bool, bool, int]  # latent, sequence scope, antithetic, strata
    mean: Tensor | None  # [B, T, R], its last dimension dense
    deviation: float
    scale: Tensor | None  # context: [N, R]

    @classmethod
    def of(cls, call: EmbedCall) -> _Inputs:
        table, ids = call.table, call.ids
        if ids is not None and table.stride(-1) != 1:
            table, ids = F.embedding(ids, table), None
        return cls(
            table if ids is not None else table.reshape(-1, table.shape[-1]).contiguous(),
            None if ids is None else ids.reshape(-1).contiguous(),
            None if call.mask is None else call.mask.reshape(-1).contiguous(),
            (call.seed, *(x.contiguous() for x in (call.samples, call.rows, call.positions))),
            [value.float().contiguous() for value in call.parameters],
            call.embed_rms.float(),
            call.family,
            (call.latent, call.scope == "sequence", call.antithetic, call.strata),
            call.dense_mean(),
            call.latent_std,
            None if call.latent_scale is None else call.latent_scale.float().flatten(0, 1),
        )

    def embeddings(self) -> Tensor | None:
        """Return the embeddings [N, D] in fp32, for the families that project them."""
        if self.family not in ("gated", "mlp"):
            return None
        e = self.source if self.ids is None else F.embedding(self.ids, self.source)
        return e.float()

    def project(self) -> Tensor | None:
        """Return (e / rho) A [N, H], for mlp + b; None for a family without A."""
        e = self.embeddings()
        if e is None:
            return None
        if self.family == "gated":
            return e @ (self.parameters[1] / self.embed_rms)
        A, _, b, _ = self.parameters
        return (e @ (A / self.embed_rms)).add_(b)

    def per_token(self, projected: Tensor | None) -> Tensor | None:
        """Return gated's gain rho (1 + tanh(P C)), mlp's hidden layer at z = 0, context's scale."""
        if self.family == "context":
            return self.scale
        if projected is None or self.family == "mlp":
            return projected
        return torch.mm(projected, self.parameters[2]).tanh_().add_(1).mul_(self.embed_rms)

    def weights(self, *, backward: bool) -> list[Tensor]:
        """Return the kernels' weights, with rho folded in."""
        first, *others = self.parameters
        if self.family == "gated":
            return [first]
        if self.family == "affine":
            return [first, others[0] * self.embed_rms]
        if self.family == "mlp":
            C = others[2] * self.embed_rms
            return [C, others[0], *([C.T.contiguous()] if backward else [])]
        return [first * self.embed_rms]

    def arguments(self, per_token: Tensor | None, *, backward: bool = False) -> tuple:
        weights = self.weights(backward=backward)
        tensors = (self.source, self.ids, self.mask, *self.numbers, weights, per_token)
        return (*tensors, self.family, *self.options, self.mean, self.deviation)


def _gradients(
    inputs: _Inputs,
    grad: Tensor,
    projected: Tensor | None,
    *,
    want_embeddings: bool,
    per_row: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of the embeddings [N, D], where wanted, and the parameters'.

    The parameters' have a dimension in front: the batch rows with `per_row`, else one slot for all.
    The gradient of a latent_scale [B, T, R] comes last.
    """
    family, rho, parameters = inputs.family, inputs.embed_rms, inputs.parameters
    _, B, T, D = grad.shape
    slots = B if per_row else 1
    e, per_token = inputs.embeddings(), inputs.per_token(projected)
    # The parameters whose gradients the kernel sums.
    summed = {"affine": (0, 1), "mlp": (3, 1)}.get(family, (0,))
    sums = [rho.new_empty((slots, *parameters[index].shape)) for index in summed]
    upstream_sum = rho.new_empty((B * T, D)) if want_embeddings else None
    through = None
    if family == "context":
        through = rho.new_empty((B, T, parameters[0].shape[0]))
    elif e is not None or (family == "affine" and want_embeddings):
        through = rho.new_empty((B * T, parameters[1].shape[1] if family == "mlp" else D))
    upstream = grad.to(inputs.source.dtype)
    torch.ops.fastperturb_cpp.backward(
        upstream if upstream.stride(-1) == 1 else upstream.contiguous(),
        *inputs.arguments(per_token, backward=True),
        *(per_row, sums, upstream_sum, through),
    )
    if family == "affine":
        return _add(upstream_sum, through), [sums[0], sums[1].mul_(rho)]
    if family == "context" and through is not None:
        return upstream_sum, [sums[0].mul_(rho), through]
    if e is None or projected is None or per_token is None or through is None:
        return upstream_sum, [sums[0].mul_(rho)]

    def outer(left: Tensor, right: Tensor) -> Tensor:
        """Sum left [N, I] times right [N, J] over the tokens of each slot."""
        left, right = (value.unflatten(0, (slots, -1)) for value in (left, right))
        return left.transpose(1, 2) @ right

    if family == "gated":
        _, A, C = parameters
        # rho (1 - tanh^2) = gain (2 - gain / rho)
        grad_gate = through.mul_(per_token).mul_(per_token.div_(-rho).add_(2))
        grad_projected = grad_gate @ C.T
        grads = [sums[0], outer(e, grad_projected).div_(rho), outer(projected, grad_gate)]
    else:
        A, grad_projected = parameters[0], through
        grad_bias = grad_projected.unflatten(0, (slots, -1)).sum(1)
        grads = [outer(e, grad_projected).div_(rho), sums[1], grad_bias, sums[0].mul_(rho)]
    return _add(upstream_sum, grad_projected @ (A.T / rho) if want_embeddings else None), grads


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return total if total is None or more is None else total.add_(more)


def _table_gradient(grad_embeddings: Tensor, call: EmbedCall) -> Tensor:
    """Return the gradient of the table, or of the embeddings where there is none."""
    if call.ids is None:
        return grad_embeddings.to(call.table.dtype).view(call.table.shape)
    grad_table = torch.zeros(call.table.shape, dtype=call.table.dtype)
    ids = call.ids.reshape(-1).contiguous()
    order = ids.argsort(stable=True)
    torch.ops.fastperturb_cpp.scatter_rows(grad_table, grad_embeddings, ids, order)
    return grad_table
