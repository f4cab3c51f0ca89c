"""Training on several processes: their mesh, DDP or FSDP2, and tensors gathered whole.

torchrun or accelerate launch starts the processes, as a mesh ("dp", "mc"): batches are split over
dp, and the Monte-Carlo samples of each batch over mc. DDP and FSDP2 average gradients over all
processes. Every loss is divided by the labelled tokens of the global batch, so the backward pass
begins with `loss * dp_size`. All processes of an mc group must get the same batch and seed. sumo
and mlmc give each row a number of samples of its own, in whatever process it is; under FSDP2, where
all processes must run the model equally often, all rows of a step get the first process's.

DDP and FSDP2 are torch's own. This module chooses the modules that FSDP2 shards: the layers of the
trunk, then the wrapper, never the head alone, whose weight the wrapper reads. It turns the state of
training into whole tensors and back, so that a run can go on with another number of processes.
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

# The other processes wait while the first one tokenises the data or writes a checkpoint.
_TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, and the ranks of this one among them; by default, this one alone."""

    device: torch.device
    mesh: DeviceMesh | None = None  # ("dp", "mc"); None for a process that no launcher started
    rank: int = 0
    size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    mc_rank: int = 0
    mc_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(*, mc: int = 1, device: str | None = None) -> World:
    """Join the processes that torchrun or accelerate launch started, if one did.

    mc: the number of processes over which the samples of each batch are split.
    device: "cuda" or "cpu"; default, cuda where there is a GPU. Each process takes its own GPU.
    """
    if mc < 1:
        raise ValueError(f"mc must be a positive number of processes, got {mc}")
    kind = runs.torch_device(device)
    if "WORLD_SIZE" not in os.environ:
        if mc > 1:
            raise ValueError(
                f"mc={mc} splits the samples over {mc} processes, and this is a single one: start "
                f"it by torchrun --nproc-per-node {mc}"
            )
        return World(device=kind)
    size = int(os.environ["WORLD_SIZE"])
    if size % mc:
        raise ValueError(
            f"mc={mc} must divide the number of processes, which is {size}; change one of them"
        )
    local = _local_device(kind.type)
    dist.init_process_group(
        "nccl" if local.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        device_id=local if local.type == "cuda" else None,
    )
    mesh = init_device_mesh(local.type, (size // mc, mc), mesh_dim_names=("dp", "mc"))
    return World(
        device=local,
        mesh=mesh,
        rank=dist.get_rank(),
        size=size,
        dp_rank=mesh.get_local_rank("dp"),
        dp_size=size // mc,
        mc_rank=mesh.get_local_rank("mc"),
        mc_size=mc,
    )


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
    """Return the module to call in place of lm: "ddp" copies the parameters, "fsdp" shards them.

    The module is on world.device; a model that is sharded need not fit there whole. Trainable
    parameters are copied from the first process; frozen weights are assumed equal already.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if world.mesh is None:
        return lm.to(world.device)
    if world.mc_size > 1:
        lm.split_samples(world.mesh["mc"])
    with torch.no_grad():
        for value in _trainable(lm).values():
            value.copy_(from_main(world, value.detach().to(world.device)))
    if kind == "ddp":
        return DistributedDataParallel(lm.to(world.device), init_sync=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    base: Any = unadapted(lm.base)
    for module in list(base.modules()):
        if type(module).__name__ in base._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    register_fsdp_forward_method(lm, "generate")
    return lm


@contextlib.contextmanager
def synchronising(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Let only the last forward and backward of a step average gradients over processes."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    if isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
    else:
        yield


def wait(world: World) -> None:
    """Wait until all processes have called it."""
    if world.mesh is not None:
        dist.barrier()


def check_same(world: World, number: int, name: str) -> None:
    """Raise ValueError if the processes differ in a number."""
    if world.mesh is None:
        return
    local = torch.tensor(number, device=world.device)
    extremes = torch.stack([local, -local])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = int(extremes[0]), -int(extremes[1])
    if highest != lowest:
        raise ValueError(
            f"processes differ in {name}: {lowest} and {highest}; all must see the same output_dir"
        )


def sum_over_dp(world: World, value: Tensor) -> Tensor:
    """Sum a tensor over dp; the processes of an mc group hold the same value."""
    value = value.clone()
    if world.mesh is not None:
        dist.all_reduce(value, group=world.mesh.get_group("dp"))
    return value


def from_main(world: World, value: Tensor) -> Tensor:
    """Copy the first process's tensor into `value` of all processes."""
    if world.mesh is not None:
        dist.broadcast(value, src=0)
    return value


def training_tensors(lm: PerturbedLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy all that training changes, whole and to the CPU, in the first process.

    Keys are "parameter.NAME" for each trainable parameter and "optimizer.NAME.KEY" for each of its
    tensors in the optimizer. All processes must call it; all but the first get an empty dict.
    """
    sharding.reshard(lm)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    copies: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        whole = sharding.whole(value.detach())
        if is_main:
            copies[name] = whole.to("cpu", copy=True)

    for name, parameter in _trainable(lm).items():
        keep(f"parameter.{name}", parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer keeps {key}={value!r} for {name}, and only tensors can be saved; "
                    "use another one, such as AdamW"
                )
            keep(f"optimizer.{name}.{key}", value)
    return copies


@torch.no_grad()
def load_training_tensors(
    lm: PerturbedLM, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Restore the tensors of `training_tensors`, bit for bit, under any number of processes.

    All processes must call it, with all tensors. The optimizer's options (param_groups) stay.
    Raises ValueError, with nothing changed, on tensors that are missing, extra or misshaped.
    """
    sharding.reshard(lm)
    trainable = _trainable(lm)
    _check_shapes(trainable, tensors)
    states = _optimizer_states(tensors)
    for name, parameter in trainable.items():
        parameter.copy_(_as_sharded(tensors[f"parameter.{name}"], parameter))
    names = {parameter: name for name, parameter in trainable.items()}
    # The optimizer's own loading knows the device and dtype of each tensor that it keeps.
    options = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: _as_sharded(value, parameter).clone()
            for key, value in states[names[parameter]].items()
        }
        for index, parameter in enumerate(parameters)
        if states.get(names.get(parameter, ""))
    }
    optimizer.load_state_dict({"state": state, "param_groups": options})


def _optimizer_states(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's tensors by parameter and key."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(parameter, {})[key] = value
    return states


def _check_shapes(trainable: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with the first problems, if tensors do not fit the trainable parameters."""
    states = _optimizer_states(tensors)
    keys = {key for state in states.values() for key in state}
    shapes = {f"parameter.{name}": [value.shape] for name, value in trainable.items()}
    for name in trainable.keys() & states.keys():  # a parameter that had no gradient has none
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
            f"tensors do not fit the trainable parameters: {'; '.join(problems[:5])}{more}; make "
            "the model and its optimizer as they were when the tensors were saved"
        )


def _trainable(lm: PerturbedLM) -> dict[str, nn.Parameter]:
    return {name: value for name, value in lm.named_parameters() if value.requires_grad}


def _as_sharded(value: Tensor, parameter: Any) -> Tensor:
    """Return this process's part of a whole tensor; a scalar is held by all."""
    if value.ndim == 0 or not sharding.is_shard(parameter):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
