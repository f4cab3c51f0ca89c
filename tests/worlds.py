"""Steps of several processes and of one on the same batch, and processes that compare them."""

import contextlib
import functools
import os
import socket
import time
from unittest import mock

import pytest
import torch
from batches import IGNORED, labelled
from oracles import assert_near
from tiny import llama, perturbed, with_lora
from torch import multiprocessing

from fastperturb.engine import levels, sharding
from fastperturb.train import distributed

SEED, V, B, T = 5, 97, 4, 9
PATIENCE = 300  # seconds after which processes wait for each other in vain


def tied():
    return llama(tie_word_embeddings=True)


def adapted():
    """Return a frozen bf16 model with LoRA in fp32."""
    return with_lora(llama().to(torch.bfloat16))


def model(plan="batched", estimator="iwae", options=None, base=llama):
    """Wrap a base model; the arguments are those of a case."""
    options = {"num_samples": 6, "latent_dim": 4, **(options or {})}
    return perturbed(base(), plan=plan, estimator=estimator, **options)


def batch():
    """Return the global batch, whose row 1 has few labels."""
    torch.manual_seed(1)
    ids = torch.randint(V, (B, T))
    labels = ids.clone()
    labels[1, 4:] = IGNORED
    return {"input_ids": ids, "labels": labels, "rows": torch.arange(B) + 7}


def step(lm, inputs, *, module=None, scale=1, **options):
    """Run a forward and a backward of a part of the global batch."""
    count = labelled(batch()).sum()
    out = (module or lm)(**inputs, num_items_in_batch=count, **{"seed": SEED, **options})
    (scale * out.loss).backward()
    return out


def gradients(lm):
    """Return the gradients by parameter name, gathered from all shards."""
    grads = {name: value.grad for name, value in lm.named_parameters() if value.grad is not None}
    return {name: sharding.whole(grad) for name, grad in grads.items()}


def optimizer_of(lm):
    return torch.optim.AdamW([value for value in lm.parameters() if value.requires_grad], lr=1e-2)


def one_level_a_step():
    """Let a telescope draw one level for all rows, as where parameters are sharded."""
    return mock.patch.object(levels.sharding, "is_sharded", lambda module: True)


def check(world, kind, case, *, base=llama, tolerance=1e-4, inputs=batch, **options):
    """Compare a step of these processes with the step of one on the same global batch."""
    alone, lm = model(*case, base=base), model(*case, base=base)
    with one_level_a_step() if kind == "fsdp" else contextlib.nullcontext():
        expected = step(alone, inputs(), **options)
    module = distributed.distribute(lm, world, kind)
    rows = torch.arange(B).tensor_split(world.dp_size)[world.dp_rank]
    mine = {name: value[rows] for name, value in inputs().items()}
    out = step(lm, mine, module=module, scale=world.dp_size, **options)
    near = functools.partial(assert_near, rel=tolerance, floor=1e-6)
    where = f"{kind} {case} {options} {world}"
    near(distributed.sum_over_dp(world, out.loss.detach()), expected.loss, name=where)
    log_probs = expected.log_probs[: len(out.log_probs), rows]  # the rows' own deepest level
    assert torch.equal(out.log_probs.isnan(), log_probs.isnan()), where
    near(out.log_probs.nan_to_num(), log_probs.nan_to_num(), name=where)
    if world.dp_size == 1:
        for name in ("log_marginal", "ess", "shift", "log_prob_variance"):
            near(getattr(out, name), getattr(expected, name), name=f"{where}: {name}")
    ours, grads = gradients(lm), gradients(alone)
    assert ours.keys() == grads.keys(), where
    for name, gradient in ours.items():
        near(gradient, grads[name], name=f"{where}: {name}")


def in_processes(count, work, *arguments):
    """Run work(*arguments) in `count` processes whose environment is that of torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = multiprocessing.spawn(
        _process, (count, port, work, arguments), nprocs=count, join=False
    )
    deadline = time.monotonic() + PATIENCE
    while not running.join(timeout=1):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            pytest.fail(f"{work.__name__}: the processes wait for each other in vain")


def _process(rank, count, port, work, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    work(*arguments)
    distributed.stop()
