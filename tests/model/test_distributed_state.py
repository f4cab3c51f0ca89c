"""Saving, loading and continuing a training whose parameters and optimizer may be sharded."""

import json

import pytest
import safetensors.torch
import torch
from oracles import assert_near
from tiny import llama
from worlds import B, adapted, batch, in_processes, model, optimizer_of, step

from fastperturb.engine import sharding
from fastperturb.train import distributed
from fastperturb.train.optimizer import clip_gradients


def states(folder):
    world = distributed.start()
    rows = torch.arange(B).tensor_split(2)[world.rank]
    mine = {name: value[rows] for name, value in batch().items()}
    for base in (llama, adapted):
        alone = model(base=base)
        of_alone = optimizer_of(alone)
        for _ in range(2):
            step(alone, batch())
            of_alone.step()
            of_alone.zero_grad()
        path = folder / f"{base.__name__}.safetensors"
        tensors = distributed.training_tensors(alone, of_alone)
        assert bool(tensors) == world.is_main
        if world.is_main:
            safetensors.torch.save_file(tensors, path)
        distributed.wait(world)
        tensors = safetensors.torch.load_file(path)

        lm = model(base=base)
        distributed.distribute(lm, world, "fsdp")
        of_lm = optimizer_of(lm)
        distributed.load_training_tensors(lm, of_lm, tensors)
        with torch.no_grad():
            lm(**mine)  # leaves the root unit gathered
        assert_equal(distributed.training_tensors(lm, of_lm), tensors if world.is_main else {})

        lm.save_pretrained(folder / base.__name__ / "sharded")
        alone.save_pretrained(folder / base.__name__ / "whole", is_main_process=world.is_main)
        distributed.wait(world)
        sharded, whole = ((folder / base.__name__ / kind) for kind in ("sharded", "whole"))
        assert contents(sharded) == contents(whole)

        step(lm, mine, scale=2)
        step(alone, batch())
        norms = [clip_gradients(wrapped, 0.1) for wrapped in (lm, alone)]
        assert_near(norms[0], norms[1], rel=1e-2, floor=1e-6)
        of_lm.step()
        of_alone.step()
        for name, value in lm.named_parameters():
            expected = alone.get_parameter(name)
            whole = sharding.whole(value.detach())
            assert_near(whole, expected, rel=1e-3, floor=1e-6, name=name)


def contents(folder):
    """Return the contents of files without the headers of safetensors, whose order is free."""
    files = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            files[path.name] = {name: value.tolist() for name, value in tensors.items()}
        else:
            values = json.loads(path.read_text())
            files[path.name] = {k: v for k, v in values.items() if k not in ("files", "sha256")}
    return files


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_shards_save_load_and_continue_as_one_process_does(tmp_path):
    in_processes(2, states, tmp_path)


def test_training_tensors_round_trip_bit_for_bit():
    lm, other = model(base=adapted), model(base=adapted)
    optimizer, fresh = optimizer_of(lm), optimizer_of(other)
    step(lm, batch())
    optimizer.step()
    tensors = distributed.training_tensors(lm, optimizer)
    distributed.load_training_tensors(other, fresh, tensors)
    assert_equal(distributed.training_tensors(other, fresh), tensors)
    before = {name: value.clone() for name, value in tensors.items()}
    optimizer.zero_grad()
    step(lm, batch())
    optimizer.step()
    assert_equal(tensors, before)  # copies, which the next step does not change
    step(other, batch())
    fresh.step()
    assert_equal(
        distributed.training_tensors(other, fresh), distributed.training_tensors(lm, optimizer)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("parameter.transform.U"), "parameter.transform.U is missing"),
        (lambda t: t.pop("optimizer.transform.U.step"), "optimizer.transform.U.step is missing"),
        (lambda t: t.update({"parameter.W": torch.ones(1)}), "parameter.W belongs to no trainable"),
        (
            lambda t: t.update({"optimizer.transform.U.exp_avg": torch.ones(3)}),
            r"optimizer.transform.U.exp_avg is \[3\] and must be \[\] or \[4, 32\]",
        ),
    ],
)
def test_training_tensors_that_do_not_fit_are_rejected_and_change_nothing(change, message):
    lm = model()
    optimizer = optimizer_of(lm)
    step(lm, batch())
    optimizer.step()
    before = distributed.training_tensors(lm, optimizer)
    tensors = {name: value + 1 for name, value in before.items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        distributed.load_training_tensors(lm, optimizer, tensors)
    assert_equal(distributed.training_tensors(lm, optimizer), before)
