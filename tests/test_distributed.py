"""Two processes under DDP and FSDP2: the gradients of one process, whatever the plan."""

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastperturb import PerturbConfig, wrap

WORLD, SEED = 2, 5
PLANS = {
    "batched": {},
    "chunked": {"chunk_size": 2},
    "resample": {"backward_samples": 2},
    "auto": {},
}


def model(plan):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return wrap(base, PerturbConfig(num_samples=6, plan=plan, **PLANS[plan]))


def gradients(lm):
    whole = {}
    for name, value in lm.named_parameters():
        grad = value.grad
        if grad is not None:
            whole[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole


def sharded(lm):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in lm.base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(lm, mesh=mesh)


def process(rank, store, plan):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(1)
    ids = torch.randint(97, (4, 9))
    lm = model(plan)
    lm(input_ids=ids, labels=ids, seed=SEED).loss.backward()
    expected = gradients(lm)
    mine = slice(2 * rank, 2 * rank + 2)
    part = {"input_ids": ids[mine], "labels": ids[mine], "rows": torch.arange(4)[mine]}
    for distribute in (DistributedDataParallel, sharded):
        lm = model(plan)
        distributed = distribute(lm)
        out = distributed(**part, seed=SEED, num_items_in_batch=ids[:, 1:].numel())
        (WORLD * out.loss).backward()  # both average over processes
        found = gradients(lm)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_two_processes_give_the_gradients_of_one(plan, tmp_path):
    multiprocessing.spawn(process, (tmp_path / "store", plan), nprocs=WORLD)
