"""perturb_embed: M perturbed samples of a batch of token embeddings, as one registered op.

The noise is regenerated in the backward from the counters, so nothing of size [M, B, T, R] is
kept between the passes. The projection of gated and mlp is kept: N H numbers, an H / (M D) of the
output.
"""

from __future__ import annotations

import copy
import math
from types import ModuleType
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.ops import context, dispatch, reference
from fastperturb.ops.calls import EmbedCall, schema
from fastperturb.transforms import Transform


class EmbedOptions(TypedDict, total=False):
    """The options that perturb_embed and its per-sample gradients take."""

    rows: Tensor | None
    positions: Tensor | None
    antithetic: bool
    strata: int
    latent_mean: Tensor | None
    latent_std: float
    latent_scale: Tensor | None
    perturb_mask: Tensor | None


@overload
def perturb_embed(
    ids: Tensor,
    table: Tensor | None,
    transform: Transform,
    seed: int | Tensor,
    samples: int | Tensor,
    *,
    return_shift: Literal[False] = False,
    **options: Unpack[EmbedOptions],
) -> Tensor: ...


@overload
def perturb_embed(
    ids: Tensor,
    table: Tensor | None,
    transform: Transform,
    seed: int | Tensor,
    samples: int | Tensor,
    *,
    return_shift: Literal[True],
    **options: Unpack[EmbedOptions],
) -> tuple[Tensor, Tensor]: ...


def perturb_embed(
    ids: Tensor,
    table: Tensor | None,
    transform: Transform,
    seed: int | Tensor,
    samples: int | Tensor,
    *,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    antithetic: bool = False,
    strata: int = 1,
    latent_mean: Tensor | None = None,
    latent_std: float = 1.0,
    latent_scale: Tensor | None = None,
    perturb_mask: Tensor | None = None,
    return_shift: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Embed `ids` and perturb each embedding by `transform`, once per sample: [M, B, T, D].

    ids: token ids [B, T] with their `table` [V, D], or embeddings [B, T, D] with `table=None`.
    seed: an int or an int64 tensor; samples, rows, positions: the numbers that key the noise
        (see `fastperturb.noise`), M or [M] or [M, B]; [B] or [B, T]; [B, T].
    antithetic: the latent of sample 2j + 1 is the negative of sample 2j's.
    strata: the number G of samples in a stratified group; 1 draws them independently.
    latent_mean, latent_std: take z = latent_mean [B, T, R] + latent_std times the noise; fp32.
    latent_scale: s [B, T, R] of a context transform, as `context_scale` returns it; default that of
        rows without padding, in which a document starts where a position does not follow the last.
    perturb_mask: bool [B, T], the embeddings to perturb; default all.
    return_shift: return also each embedding's shift |T(e, z) - e| [M, B, T], before the output is
        rounded and without a gradient.

    Computed in fp32 (fp64 for an fp64 table), returned in the table's dtype. Gradients flow to
    the transform's parameters and to the table or embeddings where they require it.
    """
    call = _call(
        ids,
        table,
        transform,
        seed,
        samples,
        rows=rows,
        positions=positions,
        antithetic=antithetic,
        strata=strata,
        latent_mean=latent_mean,
        latent_std=latent_std,
        latent_scale=latent_scale,
        perturb_mask=perturb_mask,
    )
    differentiable = [call.table, *call.parameters]
    if call.latent_scale is not None:
        differentiable.append(call.latent_scale)
    dispatch.reject_forward_mode("perturb_embed", *differentiable)
    out, squared_shift, _ = torch.ops.fastperturb.perturb_embed(*call, return_shift)
    return (out, squared_shift.sqrt()) if return_shift else out


def perturb_embed_per_sample_grad(
    grad: Tensor,
    ids: Tensor,
    table: Tensor | None,
    transform: Transform,
    seed: int | Tensor,
    samples: int | Tensor,
    **options: Unpack[EmbedOptions],
) -> dict[str, Tensor]:
    """Return every parameter's gradient from each sample and batch row alone, {name: [M, B, ...]}.

    grad: the upstream gradient [M, B, T, D] of `perturb_embed` with the same arguments, which are
    documented there. The sums over M and B are its parameter gradients; the parts are the
    estimating equation's psi.
    """
    call = _call(ids, table, transform, seed, samples, **options)
    shape = (*call.samples.shape, call.positions.shape[1], call.table.shape[-1])
    if grad.shape != shape or not grad.is_floating_point() or grad.device != call.table.device:
        raise ValueError(
            f"grad must be floating point [M, B, T, D] = {list(shape)} on {call.table.device}, "
            f"got {grad.dtype} {list(grad.shape)} on {grad.device}"
        )
    run = _implementation(call).perturb_embed_per_sample_grad
    with torch.no_grad(), dispatch.full_precision(grad.device):
        psi = run(grad, call)
    if call.latent_scale is not None:
        *psi, grad_scale = psi
        psi += context.parameter_gradients(transform, call.latent_scale, grad_scale)
    if transform.min_scale > 0:
        psi = _stored_gradients(transform, psi)
    return dict(zip(transform.parameter_names, psi, strict=True))


def _stored_gradients(transform: Transform, psi: list[Tensor]) -> list[Tensor]:
    """Turn gradients of the effective parameters into those of the stored ones."""
    M, B = psi[0].shape[:2]
    # A copy, because the caller's may be frozen, and gradients may be off.
    transform = copy.deepcopy(transform).requires_grad_()
    with torch.enable_grad():
        effective = transform.effective_parameters()
    stored = [getattr(transform, name) for name in transform.parameter_names]
    upstream = [value.flatten(0, 1) for value in psi]
    grads = torch.autograd.grad(effective, stored, upstream, is_grads_batched=True)
    return [grad.unflatten(0, (M, B)) for grad in grads]


def _call(
    ids: Tensor,
    table: Tensor | None,
    transform: Transform,
    seed: int | Tensor,
    samples: int | Tensor,
    *,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    antithetic: bool = False,
    strata: int = 1,
    latent_mean: Tensor | None = None,
    latent_std: float = 1.0,
    latent_scale: Tensor | None = None,
    perturb_mask: Tensor | None = None,
) -> EmbedCall:
    """Validate the arguments and lay them out for the op."""
    embeddings = _check_embeddings(ids, table, transform)
    shape, device = (ids.shape[0], ids.shape[1]), embeddings.device
    if device != transform.embed_rms.device:
        raise ValueError(
            f"transform must be on {device}, like the embeddings, got "
            f"{transform.embed_rms.device}; use .to(device)"
        )
    if perturb_mask is not None and (
        perturb_mask.dtype != torch.bool
        or perturb_mask.shape != shape
        or perturb_mask.device != device
    ):
        raise ValueError(
            f"perturb_mask must be bool [B, T] = {list(shape)} on {device}, got "
            f"{perturb_mask.dtype} {list(perturb_mask.shape)} on {perturb_mask.device}"
        )
    wanted = (*shape, transform.latent_dim)
    if latent_mean is not None and (
        latent_mean.dtype != torch.float32
        or latent_mean.shape != wanted
        or latent_mean.device != device
    ):
        raise ValueError(
            f"latent_mean must be float32 [B, T, R] = {list(wanted)} on {device}, got "
            f"{latent_mean.dtype} {list(latent_mean.shape)} on {latent_mean.device}"
        )
    if not math.isfinite(latent_std) or latent_std <= 0:
        raise ValueError(f"latent_std must be a finite number above 0, got {latent_std!r}")
    numbers = noise.counters(
        samples, rows, positions, shape, antithetic=antithetic, strata=strata, device=device
    )
    latent_scale = context.scale_of_call(transform, latent_scale, ids, table, numbers[2])
    if numbers[0].shape[0] == 0:
        raise ValueError(f"samples must number at least 1, got {samples!r}")
    return EmbedCall(
        None if table is None else ids,
        embeddings,
        transform.op_parameters(),
        transform.embed_rms,
        noise.seed_tensor(seed, device),
        *numbers,
        perturb_mask,
        None if latent_mean is None else latent_mean.detach(),
        latent_scale,
        transform.family,
        transform.latent,
        transform.scope,
        antithetic,
        strata,
        latent_std,
    )


def _check_embeddings(ids: Tensor, table: Tensor | None, transform: Transform) -> Tensor:
    if not isinstance(transform, Transform):
        raise TypeError(f"transform must come from make_transform, got {type(transform).__name__}")
    if table is None:
        source, name, layout = ids, "embeddings (ids with table=None)", "[B, T, D]"
    else:
        source, name, layout = table, "table", "[V, D]"
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.device != table.device:
            raise ValueError(
                f"ids must be int64 [B, T] on the table's device {table.device}, "
                f"got {ids.dtype} {list(ids.shape)} on {ids.device}"
            )
    if (
        not source.is_floating_point()
        or source.ndim != layout.count(",") + 1
        or source.shape[-1] != transform.embed_dim
    ):
        raise ValueError(
            f"{name} must be floating point {layout} with D = {transform.embed_dim}, the "
            f"transform's embed_dim, got {source.dtype} {list(source.shape)}"
        )
    return source


def _implementation(call: EmbedCall) -> ModuleType:
    return dispatch.implementation("perturb_embed", call.table.device, call.table.dtype)


@torch.library.custom_op(
    "fastperturb::perturb_embed",
    mutates_args=(),
    schema=f"({schema(EmbedCall)}, bool want_shift) -> (Tensor, Tensor, Tensor)",
)
def _op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of `Embedded`, empty where there is none."""
    *fields, want_shift = arguments
    call = EmbedCall(*fields)
    _check_ids(call.ids, call.table)
    with dispatch.full_precision(call.table.device):
        out, *others = _implementation(call).perturb_embed(call, want_shift)
    squared_shift, projected = (out.new_empty(0) if value is None else value for value in others)
    return out, squared_shift, projected


@torch.library.custom_op(
    "fastperturb::perturb_embed_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {schema(EmbedCall)}, Tensor projected, bool want_table) -> Tensor[]",
)
def _op_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, projected, want_table = arguments
    call = EmbedCall(*fields)
    kept = None if call.projection_width is None else projected
    with dispatch.full_precision(call.table.device):
        return _implementation(call).perturb_embed_backward(grad, call, kept, want_table)


def _check_ids(ids: Tensor | None, table: Tensor) -> None:
    """Raise for ids out of range, where looking at them costs no synchronisation."""
    if ids is None or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= table.shape[0]:
        raise IndexError(f"ids must lie in [0, {table.shape[0]}), got {low}..{high}")


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, want_shift = arguments
    call = EmbedCall(*fields)
    shape, width = (call.samples.shape[0], *call.positions.shape), call.projection_width
    out = call.table.new_empty((*shape, call.table.shape[-1]))
    dtype = reference.accumulation_dtype(call.table)
    squared_shift, projected = out.new_empty(0), out.new_empty(0)
    if want_shift:
        squared_shift = out.new_empty(shape, dtype=dtype)
    if width is not None:
        projected = out.new_empty((call.positions.numel(), width), dtype=dtype)
    return out, squared_shift, projected


@_op_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, _, want_table = arguments
    call = EmbedCall(*fields)
    grad_table = torch.empty_like(call.table) if want_table else call.table.new_empty(0)
    grads = [grad_table, *(torch.empty_like(value) for value in call.parameters)]
    return grads if call.latent_scale is None else [*grads, torch.empty_like(call.latent_scale)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, _ = inputs
    ids, table, parameters, *rest = EmbedCall(*fields)
    count = EmbedCall._fields.index("family") - 3
    tensors, options = rest[:count], rest[count:]
    _, squared_shift, projected = output
    ctx.options, ctx.count = options, len(parameters)
    ctx.save_for_backward(ids, table, *parameters, *tensors, projected)
    ctx.mark_non_differentiable(squared_shift, projected)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *others: None) -> tuple[Any, ...]:
    ids, table, *saved, projected = ctx.saved_tensors
    parameters, tensors = saved[: ctx.count], saved[ctx.count :]
    want_table = ctx.needs_input_grad[1]
    grad_table, *grads = torch.ops.fastperturb.perturb_embed_backward(
        grad, ids, table, parameters, *tensors, *ctx.options, projected, want_table
    )
    of_tensors: list[Tensor | None] = [None] * len(tensors)
    if tensors[-1] is not None:  # latent_scale is the last
        *grads, of_tensors[-1] = grads
    rest = [None] * (len(ctx.options) + 1)
    return (None, grad_table if want_table else None, grads, *of_tensors, *rest)


_op.register_autograd(_backward, setup_context=_setup_context)
