"""What a training loop needs of several processes: who is who, DDP or FSDP2, whole tensors.

torchrun or accelerate launch starts the processes, as a mesh ("dp", "mc"): batches are split over
dp, and the Monte-Carlo samples of each over mc. Both average gradients over all processes, so with
every loss divided by the labels of the global batch, what is sent backward is `loss * dp_size`.
All processes of an mc group must be given the same batch and seed; with sumo and mlmc, whose
number of samples is random, all processes of a run the same seed.

DDP and FSDP2 are torch's own. What is here knows which modules FSDP2 shards (the trunk's layers,
then the wrapper, never the head alone, whose weight the wrapper reads) and turns the state of
training into whole tensors and back, so that a run goes on with another number of processes.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastperturb import runs
from fastperturb.engine import sharding
from fastperturb.engine.adapters import unadapted
from fastperturb.model import PerturbedLM

KINDS = ("ddp", "fsdp")

# For the others, while the first process tokenises the data or writes a checkpoint.
_LONGEST_WAIT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    dp_rank: int
    dp_size: int
    mc_rank: int
    mc_size: int
    device: torch.device
    mesh: DeviceMesh | None  # ("dp", "mc"); None for a process that nothing launched

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(*, mc: int = 1, device: str | None = None) -> World:
    """Join the processes that torchrun or accelerate launch started, if one did.

    mc: over how many processes the samples of each batch are split.
    device: "cuda" or "cpu", default cuda where there is any; a process of several takes its own.
    """
    if mc < 1:
        raise ValueError(f"mc must be a positive number of processes, got {mc}")
    kind = runs.torch_device(device)
    if "WORLD_SIZE" not in os.environ:
        if mc > 1:
            raise ValueError(
                f"mc={mc} splits the samples over {mc} processes, and this is one alone: start it "
                f"by torchrun --nproc-per-node {mc}"
            )
        return World(0, 1, 0, 1, 0, 1, kind, None)
    size = int(os.environ["WORLD_SIZE"])
    if size % mc:
        raise ValueError(
            f"mc={mc} must divide the number of processes, which is {size}; change one of them"
        )
    local = _local_device(kind.type)
    dist.init_process_group(
        "nccl" if local.type == "cuda" else "gloo",
        timeout=_LONGEST_WAIT,
        device_id=local if local.type == "cuda" else None,
    )
    mesh = init_device_mesh(local.type, (size // mc, mc), mesh_dim_names=("dp", "mc"))
    dp_rank, mc_rank = mesh.get_local_rank("dp"), mesh.get_local_rank("mc")
    return World(dist.get_rank(), size, dp_rank, size // mc, mc_rank, mc, local, mesh)


def _local_device(kind: str) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"there are {count} GPUs here, and this is process {number + 1} of the machine: start "
            f"no more than {count}, by torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def stop() -> None:
    """Leave the processes that `start` joined, if any."""
    # DDP's reducer must not be the last to hold gloo's group: it would end gloo's thread with the
    # GIL held, which that thread may be waiting for.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(lm: PerturbedLM, world: World, kind: str) -> nn.Module:
    """The module to call in place of lm: "ddp" copies the parameters, "fsdp" shards them.

    It is on world.device then; to be sharded, lm need not have fitted there whole. What trains is
    made equal to the first process's; frozen weights are taken to be equal already.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if world.mesh is None:
        return lm.to(world.device)
    if world.mc_size > 1:
        lm.split_samples(world.mesh["mc"])
    with torch.no_grad():
        for value in _trainable(lm).values():
            value.copy_(of_main(world, value.detach().to(world.device)))
    if kind == "ddp":
        return DistributedDataParallel(lm.to(world.device), init_sync=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    base: Any = unadapted(lm.base)
    layers = [each for each in base.modules() if type(each).__name__ in base._no_split_modules]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    register_fsdp_forward_method(lm, "generate")
    return lm


@contextlib.contextmanager
def synchronising(module: nn.Module, synced: bool) -> Iterator[None]:
    """Whether the backward of a forward within it averages the gradients; the last one must."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(synced)
    if isinstance(module, DistributedDataParallel) and not synced:
        with module.no_sync():
            yield
    else:
        yield


def wait(world: World) -> None:
    """Until all processes are here."""
    if world.mesh is not None:
        dist.barrier()


def same(world: World, number: int, what: str) -> None:
    """Refuse to go on with processes that differ in a number."""
    if world.mesh is None:
        return
    mine = torch.tensor(number, device=world.device)
    ours = torch.stack([mine, -mine])
    dist.all_reduce(ours, op=dist.ReduceOp.MAX)
    most, least = int(ours[0]), -int(ours[1])
    if most != least:
        raise ValueError(
            f"processes differ in {what}: {least} and {most}; all must see the same output_dir"
        )


def total(world: World, value: Tensor) -> Tensor:
    """The sum of a tensor over dp; processes of one mc group hold the same."""
    value = value.clone()
    if world.mesh is not None:
        dist.all_reduce(value, group=world.mesh.get_group("dp"))
    return value


def of_main(world: World, value: Tensor) -> Tensor:
    """The first process's tensor, in all."""
    if world.mesh is not None:
        dist.broadcast(value, src=0)
    return value


def training_tensors(lm: PerturbedLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that training changes, whole and on the CPU, in the first process.

    "parameter.NAME" of each trainable parameter and "optimizer.NAME.KEY" of each of its tensors in
    the optimizer. All processes call it; the others get nothing.
    """
    sharding.reshard(lm)
    here = not dist.is_initialized() or dist.get_rank() == 0
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        entries = sharding.whole(value.detach())
        if here:
            found[name] = entries.to("cpu", copy=True)

    for name, parameter in _trainable(lm).items():
        keep(f"parameter.{name}", parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer keeps {key}={value!r} for {name}, and only tensors can be saved; "
                    "use another one, AdamW say"
                )
            keep(f"optimizer.{name}.{key}", value)
    return found


@torch.no_grad()
def load_training_tensors(
    lm: PerturbedLM, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `training_tensors` gave, bit for bit, under any number of processes.

    All processes call it, with all tensors. The optimizer's options (param_groups) stay.
    Raises ValueError, with nothing changed, on tensors that are missing, extra or misshaped.
    """
    sharding.reshard(lm)
    trainable = _trainable(lm)
    states = _checked(trainable, tensors)
    for name, parameter in trainable.items():
        parameter.copy_(_as_sharded(tensors[f"parameter.{name}"], parameter))
    names = {parameter: name for name, parameter in trainable.items()}
    # The optimizer's own loading knows the device and dtype of each tensor that it keeps.
    options = optimizer.state_dict()["param_groups"]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: _as_sharded(value, parameter).clone()
            for key, value in states[names[parameter]].items()
        }
        for index, parameter in enumerate(held)
        if states.get(names.get(parameter, ""))
    }
    optimizer.load_state_dict({"state": state, "param_groups": options})


def _checked(
    trainable: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter and key, all found to fit."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            owner, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(owner, {})[key] = value
    keys = {key for state in states.values() for key in state}
    shapes = {f"parameter.{name}": [value.shape] for name, value in trainable.items()}
    for name in trainable.keys() & states.keys():  # a parameter that met no gradient has none
        scalar_or_like = [torch.Size(()), trainable[name].shape]
        shapes |= {f"optimizer.{name}.{key}": scalar_or_like for key in keys}
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, value in tensors.items():
        if name not in shapes:
            problems.append(f"{name} belongs to no trainable parameter")
        elif value.shape not in shapes[name]:
            wanted = " or ".join(str(list(shape)) for shape in shapes[name])
            problems.append(f"{name} is {list(value.shape)} and must be {wanted}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"tensors do not fit what trains here: {'; '.join(problems[:5])}{more}; make the model "
            "and its optimizer as they were when the tensors were saved"
        )
    return states


def _trainable(lm: PerturbedLM) -> dict[str, nn.Parameter]:
    return {name: value for name, value in lm.named_parameters() if value.requires_grad}


def _as_sharded(value: Tensor, parameter: Any) -> Tensor:
    """The part of a whole tensor that this process holds; a scalar is held by all."""
    if value.ndim == 0 or not hasattr(parameter, "full_tensor"):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
