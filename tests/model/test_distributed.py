"""Several processes compute what one does: DDP, FSDP2 and samples split over them.

A world of processes costs seconds to start, so each one checks many cases.
"""

import pytest
import torch
import torch.distributed as dist
from batches import IGNORED
from oracles import assert_near
from torch.distributed.fsdp import FullyShardedDataParallel
from worlds import SEED, B, T, adapted, batch, check, in_processes, model, tied

from fastperturb import EditConfig
from fastperturb.train import distributed

EDITS = EditConfig(rate=0.4, kinds=("replace", "insert", "delete", "swap"))
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
    ("chunked", "iwae", {"sampling": "stratified", "num_samples": 8, "chunk_size": 3}),
    ("chunked", "jvi_clip", {"sampling": "stratified", "num_samples": 8, "chunk_size": 3}),
    ("batched", "quadratic", {"sampling": "stratified", "num_samples": 8}),
    ("chunked", "iwae", {"proposal": "gradient", "chunk_size": 2}),
    ("resample", "iwae", {"proposal": "gradient", "scope": "sequence", "marginal": "sequence"}),
    ("chunked", "iwae", {"edits": EDITS, "sampling": "stratified", "chunk_size": 1}),
    ("chunked", "iwae", {"transform": "context", "chunk_size": 2}),
    ("batched", "mlmc", {"transform": "context", "context_source": "trunk", "num_samples": 8}),
]
WHOLE = [
    ("batched", "iwae", {}),
    ("chunked", "iwae", {"chunk_size": 2}),
    ("resample", "iwae", {"backward_samples": 2}),
    ("auto", "quadratic", {}),
    ("batched", "mlmc", {"num_samples": 16}),
    ("chunked", "sumo", {"chunk_size": 2}),
    ("batched", "iwae", {"proposal": "gradient", "scope": "sequence", "marginal": "sequence"}),
    ("chunked", "iwae", {"edits": EDITS, "chunk_size": 2}),
    ("batched", "mlmc", {"edits": EDITS, "num_samples": 8}),
    ("batched", "iwae", {"transform": "context"}),
    ("chunked", "iwae", {"transform": "context", "context_source": "trunk", "chunk_size": 2}),
]


def disagreeing():
    world = distributed.start(device="cpu")
    distributed.check_same(world, 3, "the step")
    with pytest.raises(ValueError, match="processes differ in the step: 0 and 1"):
        distributed.check_same(world, world.rank, "the step")
    assert int(distributed.from_main(world, torch.tensor(world.rank))) == 0


@pytest.mark.slow
def test_value_that_differs_between_processes_raises():
    in_processes(2, disagreeing)


def half_with_a_prefix():
    """Return a batch whose first rows begin with an unperturbed prefix."""
    perturb_mask = torch.ones(B, T, dtype=torch.bool)
    perturb_mask[: B // 2, :4] = False
    return batch() | {"perturb_mask": perturb_mask}


def half_ignored():
    inputs = batch()
    inputs["labels"][B // 2 :] = IGNORED
    return inputs


def whole_samples():
    world = distributed.start()
    for kind in distributed.KINDS:
        for case in WHOLE:
            check(world, kind, case)
        check(world, kind, ("batched", "iwae"), inputs=half_ignored)
        check(world, kind, ("chunked", "iwae", {"chunk_size": 4}), inputs=half_with_a_prefix)
        check(world, kind, ("chunked", "iwae", {"chunk_size": 3}), base=adapted, tolerance=2e-2)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one():
    in_processes(2, whole_samples)


def other_seeds():
    """The level decides how often shards are gathered, so processes must share it."""
    world, inputs = distributed.start(), batch()
    lm = model("chunked", "mlmc", {"num_samples": 16, "chunk_size": 1})
    distributed.distribute(lm, world, "fsdp")
    torch.manual_seed(world.rank)
    for _ in range(4):
        lm(**inputs).loss.backward()
        assert all(torch.isfinite(value.grad.to_local()).all() for value in lm.parameters())


@pytest.mark.slow
def test_processes_with_different_seeds_draw_the_same_mlmc_level():
    in_processes(2, other_seeds)


def split_samples():
    world = distributed.start(mc=2)
    for kind in distributed.KINDS:
        for case in SPLIT:
            check(world, kind, case)
        for seed in range(3):  # levels of a few samples and of many
            check(world, kind, ("chunked", "mlmc", {"num_samples": 16, "chunk_size": 1}), seed=seed)
        for case in (("batched", "quadratic"), ("chunked", "iwae", {"chunk_size": 2})):
            check(world, kind, case, base=adapted, tolerance=2e-2)
            check(world, kind, case, base=tied)


@pytest.mark.slow
def test_samples_split_over_two_processes_have_the_step_of_one():
    in_processes(2, split_samples)


def split_both():
    world = distributed.start(mc=2)
    assert (world.dp_size, world.mc_size) == (2, 2)
    assert world.rank == 2 * world.dp_rank + world.mc_rank
    for kind in distributed.KINDS:
        for case in SPLIT[1::4]:
            check(world, kind, case)
        check(world, kind, ("chunked", "iwae", {"chunk_size": 2}), inputs=half_ignored)


@pytest.mark.slow
def test_batches_and_samples_split_over_four_processes_have_the_step_of_one():
    in_processes(4, split_both)


def besides_training():
    world = distributed.start(mc=2)
    inputs, alone = batch(), model().eval()
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
            torch.testing.assert_close(call(lm), call(alone), rtol=1e-3, atol=1e-5)
        with lm.exact(), alone.exact():
            assert_near(lm(**inputs).loss, alone(**inputs).loss, rel=1e-5, floor=1e-6)
        torch.manual_seed(world.rank)
        ours = lm(**inputs).log_probs  # each process draws another seed and uses the first one's
        torch.manual_seed(0)
        assert_near(ours, alone(**inputs).log_probs, rel=1e-5, floor=1e-6)


@pytest.mark.slow
def test_scores_logits_noise_and_texts_agree_in_every_process():
    in_processes(2, besides_training)


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = distributed.start(device="cpu")
    assert (world.rank, world.size, world.dp_size, world.mc_size, world.mesh) == (0, 1, 1, 1, None)
    lm = model()
    assert all(distributed.distribute(lm, world, kind) is lm for kind in distributed.KINDS)
    assert distributed.sum_over_dp(world, torch.tensor(3.0)) == 3
    distributed.stop()


def test_mc_that_does_not_divide_the_processes_is_rejected(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="mc=2 .* torchrun --nproc-per-node 2"):
        distributed.start(mc=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="mc=2 must divide the number of processes, which is 3"):
        distributed.start(mc=2)


def test_split_samples_rejects_what_is_no_process_group():
    with pytest.raises(TypeError, match="group must be a DeviceMesh or a ProcessGroup .* got 2"):
        model().split_samples(2)


@pytest.mark.filterwarnings("ignore")  # FSDP1's own, of one process among others
@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_is_rejected_by_name(original):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lm = FullyShardedDataParallel(
            model(), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="under FSDP1 .* use FSDP2"):
            lm(**batch())
    finally:
        dist.destroy_process_group()


def test_zero3_is_rejected_by_name():
    lm = model()
    lm.base.get_input_embeddings().weight.ds_id = 0  # as DeepSpeed marks what it manages
    with pytest.raises(ValueError, match="ZeRO-3, .* use FSDP2"):
        lm(**batch())
