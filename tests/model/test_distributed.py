"""Several processes compute what one does: DDP, FSDP2, samples split over them, and saving.

A world of processes costs seconds to start, so each one checks many cases.
"""

import json
import os
import socket
import time

import peft
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from torch import multiprocessing
from torch.distributed.fsdp import FullyShardedDataParallel

from fastperturb import PerturbConfig, wrap
from fastperturb.engine import sharding
from fastperturb.train import distributed

SEED, V, B, T = 5, 97, 4, 9
PATIENCE = 300  # seconds after which processes wait for each other in vain

# plan, estimator, more of the config
SPLIT = [
    ("batched", "iwae", {}),
    ("batched", "iwae", {"num_samples": 5}),
    ("chunked", "iwae", {"num_samples": 5, "chunk_size": 1}),
    ("chunked", "jvi_clip", {"chunk_size": 2}),
    ("resample", "iwae", {"num_samples": 5, "backward_samples": 1}),
    ("resample", "iwae", {"backward_samples": 3, "chunk_size": 1}),
    ("batched", "resample", {}),
    ("auto", "iwae", {"antithetic": True}),
    ("auto", "iwae", {"num_samples": 1}),
    ("batched", "quadratic", {"num_samples": 5}),
    ("chunked", "quadratic", {"num_samples": 3, "chunk_size": 1}),
    ("chunked", {"iwae": 1.0, "quadratic": 10.0}, {"chunk_size": 2}),
    ("batched", "iwae", {"marginal": "sequence"}),
    ("chunked", "sumo", {"chunk_size": 1}),
    ("batched", "mlmc", {"num_samples": 8}),
    ("chunked", "mlmc", {"num_samples": 8, "chunk_size": 1}),
]
WHOLE = [
    ("batched", "iwae", {}),
    ("chunked", "iwae", {"chunk_size": 2}),
    ("resample", "iwae", {"backward_samples": 2}),
    ("auto", "quadratic", {}),
]


def llama(**options):
    torch.manual_seed(0)
    shape = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **options))


def tied():
    return llama(tie_word_embeddings=True)


def adapted():
    """In bf16 and frozen, with LoRA in fp32."""
    base = llama().to(torch.bfloat16).requires_grad_(False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, value in model.named_parameters():
        if "lora" in name:
            value.data = torch.randn(value.shape) / 10
    return model


def model(plan="batched", estimator="iwae", options=None, base=llama):
    config = {"num_samples": 6, "latent_dim": 4, **(options or {})}
    found = base()
    torch.manual_seed(2)
    return wrap(found, PerturbConfig(plan=plan, estimator=estimator, **config))


def batch():
    torch.manual_seed(1)
    ids = torch.randint(V, (B, T))
    labels = ids.clone()
    labels[1, 4:] = -100
    return {"input_ids": ids, "labels": labels, "rows": torch.arange(B) + 7}


def step(lm, inputs, *, module=None, scale=1, **options):
    count = (batch()["labels"][:, 1:] != -100).sum()
    out = (module or lm)(**inputs, num_items_in_batch=count, **{"seed": SEED, **options})
    (scale * out.loss).backward()
    return out


def gradients(lm):
    found = {name: value.grad for name, value in lm.named_parameters() if value.grad is not None}
    return {name: sharding.whole(grad) for name, grad in found.items()}


def optimizer_of(lm):
    return torch.optim.AdamW([value for value in lm.parameters() if value.requires_grad], lr=1e-2)


def check(world, kind, case, *, base=llama, tolerance=1e-4, inputs=batch, **options):
    """A step of these processes against the step of one, on the same global batch."""
    one, lm = model(*case, base=base), model(*case, base=base)
    expected = step(one, inputs(), **options)
    module = distributed.distribute(lm, world, kind)
    rows = torch.arange(B).tensor_split(world.dp_size)[world.dp_rank]
    mine = {name: value[rows] for name, value in inputs().items()}
    out = step(lm, mine, module=module, scale=world.dp_size, **options)
    where = f"{kind} {case} {options} {world}"
    assert_near(distributed.sum_over_dp(world, out.loss.detach()), expected.loss, where, tolerance)
    assert_near(out.log_probs, expected.log_probs[:, rows], where, tolerance)
    if world.dp_size == 1:
        for name in ("log_marginal", "ess", "shift", "log_prob_variance"):
            assert_near(getattr(out, name), getattr(expected, name), where, tolerance)
    found, wanted = gradients(lm), gradients(one)
    assert found.keys() == wanted.keys(), where
    for name, gradient in found.items():
        assert_near(gradient, wanted[name], f"{where}: {name}", tolerance)


def assert_near(found, expected, where, tolerance):
    error = (found - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-6, f"{where}: off by {error} of {expected}"


def in_processes(count, work, *arguments):
    """work(*arguments) in as many processes, whose environment is that of torchrun."""
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


def disagreeing():
    world = distributed.start(device="cpu")
    distributed.check_same(world, 3, "the step")
    with pytest.raises(ValueError, match="processes differ in the step: 0 and 1"):
        distributed.check_same(world, world.rank, "the step")
    assert int(distributed.from_main(world, torch.tensor(world.rank))) == 0


@pytest.mark.slow
def test_processes_that_disagree_are_told():
    in_processes(2, disagreeing)


def half_still():
    """The first rows begin with a prefix in which nothing moves, the others do not."""
    still = torch.ones(B, T, dtype=torch.bool)
    still[: B // 2, :4] = False
    return batch() | {"perturb_mask": still}


def half_ignored():
    inputs = batch()
    inputs["labels"][B // 2 :] = -100
    return inputs


def whole_samples():
    world = distributed.start()
    for kind in distributed.KINDS:
        for case in WHOLE:
            check(world, kind, case)
        check(world, kind, ("batched", "iwae"), inputs=half_ignored)
        check(world, kind, ("chunked", "iwae", {"chunk_size": 4}), inputs=half_still)
        check(world, kind, ("chunked", "iwae", {"chunk_size": 3}), base=adapted, tolerance=2e-2)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    in_processes(2, whole_samples)


def other_seeds():
    """The level, and with it how often shards are gathered, must not be each process's own."""
    world, inputs = distributed.start(), batch()
    lm = model("chunked", "mlmc", {"num_samples": 16, "chunk_size": 1})
    distributed.distribute(lm, world, "fsdp")
    torch.manual_seed(world.rank)
    for _ in range(4):
        lm(**inputs).loss.backward()
        assert all(torch.isfinite(value.grad.to_local()).all() for value in lm.parameters())


@pytest.mark.slow
def test_processes_with_seeds_of_their_own_take_the_same_level():
    in_processes(2, other_seeds)


def split_samples():
    world = distributed.start(mc=2)
    for kind in distributed.KINDS:
        for case in SPLIT:
            check(world, kind, case)
        for seed in range(3):  # levels of a few draws and of many
            check(world, kind, ("chunked", "mlmc", {"num_samples": 16, "chunk_size": 1}), seed=seed)
        for case in (("batched", "quadratic"), ("chunked", "iwae", {"chunk_size": 2})):
            check(world, kind, case, base=adapted, tolerance=2e-2)
            check(world, kind, case, base=tied)


@pytest.mark.slow
def test_samples_split_over_two_processes_give_the_step_of_one():
    in_processes(2, split_samples)


def split_both():
    world = distributed.start(mc=2)
    assert (world.dp_size, world.mc_size) == (
        2,
        2,
    ) and world.rank == 2 * world.dp_rank + world.mc_rank
    for kind in distributed.KINDS:
        for case in SPLIT[1::4]:
            check(world, kind, case)
        check(world, kind, ("chunked", "iwae", {"chunk_size": 2}), inputs=half_ignored)


@pytest.mark.slow
def test_batches_and_samples_split_over_four_processes_give_the_step_of_one():
    in_processes(4, split_both)


def besides_training():
    world = distributed.start(mc=2)
    inputs, one = batch(), model().eval()
    for kind in distributed.KINDS:
        lm = model().eval()
        distributed.distribute(lm, world, kind)
        for call in (
            lambda lm: lm.score(**inputs, num_samples=5, seed=SEED).log_marginal,
            lambda lm: lm(**inputs, seed=SEED, return_logits=True).logits,
            lambda lm: lm.gradient_noise(**inputs, seed=SEED, repeats=2).draw_noise,
            lambda lm: lm.generate(
                inputs["input_ids"], mode="mixture", seed=SEED, max_new_tokens=3
            ),
        ):
            torch.testing.assert_close(call(lm), call(one), rtol=1e-3, atol=1e-5)
        with lm.exact(), one.exact():
            assert_near(lm(**inputs).loss, one(**inputs).loss, "exact", 1e-5)
        torch.manual_seed(world.rank)
        drawn = lm(**inputs).log_probs  # each process draws another seed, and takes the first one's
        torch.manual_seed(0)
        assert_near(drawn, one(**inputs).log_probs, "seed", 1e-5)


@pytest.mark.slow
def test_what_is_not_a_training_step_says_the_same_in_every_process():
    in_processes(2, besides_training)


def states(folder):
    world = distributed.start()
    rows = torch.arange(B).tensor_split(2)[world.rank]
    mine = {name: value[rows] for name, value in batch().items()}
    for base in (llama, adapted):
        one = model(base=base)
        of_one = optimizer_of(one)
        for _ in range(2):
            step(one, batch())
            of_one.step()
            of_one.zero_grad()
        path = folder / f"{base.__name__}.safetensors"
        tensors = distributed.training_tensors(one, of_one)
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
        one.save_pretrained(folder / base.__name__ / "whole", is_main_process=world.is_main)
        distributed.wait(world)
        sharded, whole = ((folder / base.__name__ / kind) for kind in ("sharded", "whole"))
        assert contents(sharded) == contents(whole)

        step(lm, mine, scale=2)
        step(one, batch())
        norms = [clip_gradients(each) for each in (lm, one)]
        assert_near(norms[0], norms[1], "norm", 1e-2)
        of_lm.step()
        of_one.step()
        for name, value in lm.named_parameters():
            expected = one.get_parameter(name)
            assert_near(sharding.whole(value.detach()), expected, name, 1e-3)


def contents(folder):
    """Of files, but for safetensors' headers, whose order is free, and their digests."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            found[path.name] = {name: value.tolist() for name, value in tensors.items()}
        else:
            values = json.loads(path.read_text())
            found[path.name] = {k: v for k, v in values.items() if k not in ("files", "sha256")}
    return found


def clip_gradients(lm):
    return sharding.whole(torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.1))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_shards_save_load_and_go_on_as_one_process_does(tmp_path):
    in_processes(2, states, tmp_path)


def test_training_tensors_go_back_bit_for_bit():
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
    assert_equal(tensors, before)  # copies, of which the next step changes none
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
def test_training_tensors_that_do_not_fit_are_named_and_change_nothing(change, message):
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


def test_one_process_is_a_world_without_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = distributed.start(device="cpu")
    assert (world.rank, world.size, world.dp_size, world.mc_size, world.mesh) == (0, 1, 1, 1, None)
    lm = model()
    assert all(distributed.distribute(lm, world, kind) is lm for kind in distributed.KINDS)
    assert distributed.sum_over_dp(world, torch.tensor(3.0)) == 3
    distributed.stop()


def test_worlds_that_cannot_be_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="mc=2 .* torchrun --nproc-per-node 2"):
        distributed.start(mc=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="mc=2 must divide the number of processes, which is 3"):
        distributed.start(mc=2)


def test_samples_are_split_over_a_group_and_nothing_else():
    with pytest.raises(TypeError, match="group must be a DeviceMesh or a ProcessGroup .* got 2"):
        model().split_samples(2)


@pytest.mark.filterwarnings("ignore")  # FSDP1's own, of one process among others
@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_is_refused_by_name(original):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lm = FullyShardedDataParallel(
            model(), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="under FSDP1 .* use FSDP2"):
            lm(**batch())
    finally:
        dist.destroy_process_group()


def test_zero3_is_refused_by_name():
    lm = model()
    lm.base.get_input_embeddings().weight.ds_id = 0  # as DeepSpeed marks what it manages
    with pytest.raises(ValueError, match="ZeRO-3, .* use FSDP2"):
        lm(**batch())
