"""Parameters that are sharded over processes: gather FSDP2 shards; reject other sharded tensors.

FSDP2 (`torch.distributed.fsdp.fully_shard` of the wrapper) is supported. FSDP1 cannot hold frozen
and trained weights of different dtypes, and its shards look like ordinary tensors. ZeRO-3 gathers a
weight when its module is called, and the fused head reads its weight without a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_shard(value: Any) -> bool:
    """Return whether a tensor is FSDP2's shard of a whole one, without importing DTensor."""
    return hasattr(value, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 sharded parameters, which processes then gather together."""
    return bool(_shards(module))


def _shards(module: nn.Module) -> list[Any]:
    return [value for value in module.parameters() if is_shard(value)]


def from_first(module: nn.Module, value: Tensor) -> Tensor:
    """Return the value of the first process in all those that share FSDP2's shards."""
    shards = _shards(module)
    if not shards:
        return value
    value, mesh = value.clone(), shards[0].device_mesh
    for dimension in range(mesh.ndim):
        dist.broadcast(value, group=mesh.get_group(dimension), group_src=0)
    return value


def whole(value: Any) -> Tensor:
    """Gather a tensor's entries from all processes, which call this together."""
    return value.full_tensor() if is_shard(value) else value


def reshard(module: nn.Module) -> None:
    """Put FSDP2's shards back in place: a forward without a backward leaves the root gathered."""
    if is_sharded(module):
        from torch.distributed.fsdp import FSDPModule

        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def gather_root(module: nn.Module) -> None:
    """Gather FSDP2's root again, inside its forward: a backward through the trunk lets go of it."""
    if is_sharded(module):
        from torch.distributed.fsdp import FSDPModule

        if isinstance(module, FSDPModule):
            module.unshard()


@contextlib.contextmanager
def made_whole(module: nn.Module, *, here: bool) -> Iterator[None]:
    """Make all parameters whole, on the CPU, in the processes with `here` set, for the body.

    All processes enter it together; the others take part in the gathering and keep their shards.
    """
    reshard(module)
    places = [
        (owner, name, value)
        for owner in module.modules()
        for name, value in owner._parameters.items()
        if value is not None and is_shard(value)
    ]
    once = {id(value): value for _, _, value in places}  # however often one is tied
    gathered: dict[int, nn.Parameter] = {}
    for key, value in once.items():
        entries = whole(value.detach())
        if here:
            gathered[key] = nn.Parameter(entries.cpu(), value.requires_grad)
    # A buffer, such as an embedding's scale, meets its module's parameters on the CPU.
    buffers = [(owner, dict(owner._buffers)) for owner in {owner for owner, _, _ in places}]
    try:
        if here:
            for owner, name, value in places:
                owner._parameters[name] = gathered[id(value)]
            for owner, held in buffers:
                owner._buffers.update({k: None if v is None else v.cpu() for k, v in held.items()})
        yield
    finally:
        for owner, name, value in places:
            owner._parameters[name] = value
        for owner, held in buffers:
            owner._buffers.update(held)


def reject_foreign(embed: nn.Module) -> None:
    """Raise on an embedding whose weights FSDP1 or ZeRO-3 manages."""
    instead = "use FSDP2: fully_shard of the wrapper, or accelerate's fsdp_version: 2"
    if any(hasattr(value, "ds_id") for value in embed.parameters()):
        raise ValueError(
            "the model's weights are under DeepSpeed ZeRO-3, which gathers them for calls of "
            f"their own modules only, and the fused head calls none; {instead}, or ZeRO stage 1 "
            "or 2"
        )
    # In its forward FSDP1 puts views of a flat parameter in place of parameters.
    if getattr(embed, "_is_fsdp_managed_module", False) and not isinstance(
        embed.weight, nn.Parameter
    ):
        raise ValueError(
            "the model is under FSDP1 (FullyShardedDataParallel), which is not supported; "
            f"{instead}"
        )
