"""Ops and steps on a CUDA device keep to the current stream: CUDA graphs, side streams, waits.

`make gpu` runs these tests.
"""

import contextlib

import pytest
import tiny
import torch
import transformers
from batches import IGNORED

from fastperturb import PerturbConfig, ops, wrap
from fastperturb.config import TRANSFORMS
from fastperturb.engine import head
from fastperturb.ops import head_op
from fastperturb.ops.calls import HeadCall
from fastperturb.transforms import make_transform

pytestmark = pytest.mark.gpu

M, N, D, V = 3, 40, 64, 500
# GPU cycles, some 50 ms: longer than it takes Python to launch what follows.
PAUSE = 100_000_000


class Case:
    """A computation, and the tensors on the device that it reads."""

    def __init__(self, inputs, compute):
        self.inputs, self.compute = inputs, compute

    def refill(self, seed):
        """Write new values into the inputs, in place, on the current stream."""
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for value in self.inputs:
                if value.is_floating_point():
                    value.normal_(generator=generator)
                else:
                    value.random_(0, 97, generator=generator)

    def __call__(self):
        return [value.clone() for value in self.compute()]


def perturb_embed_case(family, dtype, *, with_table, length=21):
    floor = 0.01 if with_table else 0.0
    config = PerturbConfig(transform=family, latent_dim=6, hidden_dim=20, min_scale=floor)
    transform = make_transform(config, D).cuda()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    shape = (97, D) if with_table else (2, length, D)
    source = torch.zeros(shape, device="cuda", dtype=dtype, requires_grad=True)
    ids = torch.zeros(2, length, dtype=torch.int64, device="cuda")
    upstream = torch.zeros(4, 2, length, D, device="cuda", dtype=dtype)
    leaves = [source, *transform.parameters()]

    def compute():
        tokens = (ids, source) if with_table else (source, None)
        out = ops.perturb_embed(*tokens, transform, seed, 4)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    return Case([source, *transform.parameters(), seed, ids, upstream], compute)


def head_case(op, dtype, *, frozen):
    shape = (N, D) if op is ops.linear_logprob else (M, N, D)
    hidden = torch.zeros(shape, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.zeros(V, D, device="cuda", dtype=dtype, requires_grad=not frozen)
    bias = torch.zeros(V, device="cuda", dtype=dtype, requires_grad=not frozen)
    target = torch.zeros(N, dtype=torch.int64, device="cuda")
    upstream = torch.zeros(N, device="cuda")
    leaves = [hidden] if frozen else [hidden, weight, bias]

    def compute():
        ignored = torch.arange(N, device="cuda") % 5 == 0
        value = op(hidden, weight / 8, target.masked_fill(ignored, IGNORED), bias=bias)
        return [value, *torch.autograd.grad(value, leaves, upstream)]

    return Case([hidden, weight, bias, target, upstream], compute)


def combine_case(marginal):
    log_probs = torch.zeros(8, 5, 70, device="cuda", requires_grad=True)
    chosen = torch.zeros(5, 70, dtype=torch.int64, device="cuda")
    upstream = torch.zeros((5, 70) if marginal == "token" else (5,), device="cuda")

    def compute():
        result = ops.combine(log_probs, chosen < 80, "jvi_clip", marginal=marginal)
        return [*result, *torch.autograd.grad(result.value, log_probs, upstream)]

    return Case([log_probs, chosen, upstream], compute)


CASES = {
    **{
        f"perturb_embed-{family}-{name}-{'table' if with_table else 'embeddings'}": (
            lambda family=family, dtype=dtype, with_table=with_table: perturb_embed_case(
                family, dtype, with_table=with_table
            )
        )
        for family in TRANSFORMS
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for with_table in (True, False)
    },
    # Another kernel of torch's sums the table's gradient from 3073 tokens on.
    "perturb_embed-many-tokens": lambda: perturb_embed_case(
        "lowrank", torch.bfloat16, with_table=True, length=2100
    ),
    **{
        f"{op.__name__}-{name}-{'frozen' if frozen else 'trained'}": (
            lambda op=op, dtype=dtype, frozen=frozen: head_case(op, dtype, frozen=frozen)
        )
        for op in (ops.linear_logprob, ops.linear_quadratic)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for frozen in (True, False)
    },
    **{
        f"combine-{marginal}": lambda marginal=marginal: combine_case(marginal)
        for marginal in ("token", "sequence")
    },
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@contextlib.contextmanager
def no_waits():
    """Raise where anything waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def assert_same(results, expected):
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


def warm_up(compute):
    """Run on a side stream, as PyTorch wants it before a capture: kernels compile and load."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)


def assert_replays(case):
    """A CUDA graph of the case gives on new inputs what it gives without."""
    case.refill(0)
    warm_up(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case()
    for seed in (1, 2):
        case.refill(seed)
        graph.replay()
        assert_same(captured, case())


def test_an_op_in_a_cuda_graph_gives_on_new_inputs_what_it_gives_without(case):
    assert_replays(case)


def test_an_op_on_a_side_stream_waits_for_that_stream_only(case):
    case.refill(0)
    case()
    case.refill(1)
    expected = case()
    case.refill(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(PAUSE)
        case.refill(1)  # any other stream would still see the values before
        results = case()
    torch.cuda.current_stream().wait_stream(side)
    assert_same(results, expected)


def test_an_op_does_not_wait_for_the_device(case):
    case.refill(0)
    case()
    with no_waits():
        case()


@pytest.fixture
def quiet_masks(monkeypatch):
    """Leave out transformers' search for packed documents, which waits in each run of a trunk."""
    masks = transformers.masking_utils
    monkeypatch.setattr(masks, "find_packed_sequence_indices", lambda position_ids: None)


def step_case(plan, estimator, *, share_ignored=0.0):
    """A training step of a wrapped model, with this share of the labels ignored."""
    options = {"chunk_size": 2} if plan == "chunked" else {}
    config = PerturbConfig(num_samples=4, latent_dim=4, plan=plan, estimator=estimator, **options)
    lm = wrap(tiny.llama().train(), config).cuda()
    ids = torch.zeros(2, 20, dtype=torch.int64, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    ignored = torch.arange(20, device="cuda") < 20 * share_ignored

    def compute():
        out = lm(input_ids=ids, labels=ids.masked_fill(ignored, IGNORED), seed=seed)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, list(lm.transform.parameters()))]

    return Case([ids, seed], compute)


@pytest.mark.parametrize("estimator", ["iwae", "quadratic"])
def test_a_step_in_a_cuda_graph_gives_on_new_inputs_what_it_gives_without(estimator, quiet_masks):
    case = step_case("batched", estimator)
    assert_replays(case)


@pytest.mark.parametrize("share_ignored", [0.0, 0.6])
@pytest.mark.parametrize(
    ("plan", "estimator"),
    [("batched", "iwae"), ("batched", "quadratic"), ("chunked", "iwae"), ("resample", "iwae")],
)
def test_a_step_waits_for_its_count_of_labels_only(plan, estimator, share_ignored, quiet_masks):
    case = step_case(plan, estimator, share_ignored=share_ignored)
    case.refill(0)
    expected = case()
    with no_waits():  # which do not see that an event is waited for
        results = case()
    assert_same(results, expected)


@pytest.mark.parametrize("plan", ["batched", "chunked"])
def test_a_step_on_a_side_stream_gives_what_it_gives_on_the_default_one(plan):
    case = step_case(plan, "iwae", share_ignored=0.6)
    case.refill(1)
    expected = case()
    case.refill(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(PAUSE)
        case.refill(1)
        results = case()
    torch.cuda.current_stream().wait_stream(side)
    assert_same(results, expected)


@pytest.mark.parametrize("trains_head", [True, False])
def test_autocast_casts_the_weight_of_the_head_once_a_batch(trains_head, monkeypatch):
    casts, used, cast_weight, logprob = [], [], head.cast_weight, head_op.logprob

    def cast(weight):
        casts.append(cast_weight(weight))
        return casts[-1]

    def recorded(*arguments):
        used.append(HeadCall(*arguments[: len(HeadCall._fields)]).cast_weight.data_ptr())
        return logprob(*arguments)

    monkeypatch.setattr(head, "cast_weight", cast)
    monkeypatch.setattr(head_op, "logprob", recorded)
    config = PerturbConfig(num_samples=4, latent_dim=4, plan="chunked", chunk_size=1)
    lm = wrap(tiny.llama(), config).cuda()
    lm.base.lm_head.requires_grad_(trains_head)
    ids = torch.randint(97, (2, 20), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = lm(input_ids=ids, labels=ids, seed=3).loss
    loss.backward()
    assert [value.dtype for value in casts] == [torch.bfloat16]
    assert used == [casts[0].data_ptr()] * 8  # a first pass and a second one of each sample
    if trains_head:
        assert lm.base.lm_head.weight.grad.dtype == torch.float32
