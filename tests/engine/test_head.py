"""The head of a call: the tokens it works on, and all that a batch prepares once."""

import pytest
import torch
from batches import IGNORED, batch
from oracles import loss_and_gradients
from tiny import llama, perturbed

from fastperturb.engine import head, host_copy, labelled, packed
from fastperturb.engine.host_copy import HostCopy
from fastperturb.engine.labelled import LabelledTokens
from fastperturb.engine.packed import PackedDocuments
from fastperturb.ops import head_op
from fastperturb.ops.calls import HeadCall

M = 4
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
HEADS = ("fastperturb::linear_logprob", "fastperturb::linear_quadratic")


def masked(share, size=4, length=33):
    """Return a batch in which this share of the labels is ignored."""
    inputs = batch(size=size, length=length, right=0)
    torch.manual_seed(3)
    ignored = torch.rand(size, length).argsort(1) < share * length
    inputs["labels"][ignored] = IGNORED
    return inputs


def wrapped(plan="chunked", estimator="iwae", **options):
    return perturbed(
        llama(), num_samples=M, latent_dim=4, plan=plan, estimator=estimator, **options
    )


@pytest.fixture
def head_calls(monkeypatch):
    """Record the call of every head op."""
    calls = []
    for name in ("logprob", "quadratic"):
        op = getattr(head_op, name)

        def recorded(*arguments, op=op):
            calls.append(HeadCall(*arguments[: len(HeadCall._fields)]))
            return op(*arguments)

        monkeypatch.setattr(head_op, name, recorded)
    return calls


@pytest.fixture
def reads(monkeypatch):
    """Record the waits for numbers from the device."""
    waits, read = [], HostCopy.read

    def recorded(self):
        waits.append(self)
        return read(self)

    monkeypatch.setattr(HostCopy, "read", recorded)
    return waits


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Find the tokens with labels, and order tokens, by the code that a GPU runs."""
    monkeypatch.setattr(head, "_is_worth_a_wait", lambda device: True)
    for module in (labelled, packed):
        monkeypatch.setattr(module, "true_first", host_copy.sorted_by_truth)


@pytest.mark.parametrize("plan", ["batched", "chunked", "resample"])
@pytest.mark.parametrize("estimator", ["iwae", {"iwae": 0.5, "quadratic": 0.5}])
def test_only_labelled_tokens_reach_the_head(plan, estimator, head_calls, as_on_a_gpu):
    if plan == "resample" and estimator != "iwae":
        pytest.skip("resample takes one estimator")
    inputs = masked(0.6)
    options = {"chunk_size": 2} if plan == "chunked" else {}
    loss_and_gradients(wrapped(plan, estimator, **options), inputs)
    assert head_calls
    for call in head_calls:
        assert torch.equal(call.labelled, (call.target != IGNORED).nonzero()[:, 0])


@pytest.mark.parametrize("estimator", ["iwae", {"iwae": 0.5, "quadratic": 0.5}])
def test_values_and_gradients_are_those_of_a_head_that_computes_all_tokens(
    estimator, monkeypatch, as_on_a_gpu
):
    lm, inputs = wrapped("chunked", estimator, chunk_size=2), masked(0.6)
    out, gradients = loss_and_gradients(lm, inputs)
    monkeypatch.setattr(LabelledTokens, "numbers", lambda self: None)
    expected, expected_gradients = loss_and_gradients(lm, inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.log_probs, expected.log_probs)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


def head_flops(lm, inputs):
    """Return the floating point operations of the head's matrix products in a step."""
    with torch.profiler.profile(record_shapes=True) as profile:
        loss_and_gradients(lm, inputs)
    total = 0
    for event in profile.events():
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        if event.name in GEMMS and any(name.startswith(HEADS) for name in parents):
            left, right = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            assert left[1] in right
            total += 2 * left[0] * right[0] * right[1]
    return total


def test_unlabelled_tokens_cost_the_head_no_flops():
    lm, every, few = wrapped("batched"), masked(0.0), masked(0.6)
    count = [(inputs["labels"][:, 1:] != IGNORED).sum() for inputs in (every, few)]
    ratio = head_flops(lm, few) / head_flops(lm, every)
    assert ratio == pytest.approx(float(count[1] / count[0]), rel=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_a_batch_waits_once_for_its_labelled_tokens(
    plan, chunk_size, reads, head_calls, as_on_a_gpu
):
    loss_and_gradients(wrapped(plan, chunk_size=chunk_size), masked(0.6))
    assert len(reads) == 1 and len(head_calls) > 1


def test_a_head_on_a_cpu_finds_the_labelled_tokens_by_itself(reads, head_calls):
    loss_and_gradients(wrapped("chunked", chunk_size=2), masked(0.6))
    assert head_calls and not reads
    assert all(call.labelled is None for call in head_calls)


@pytest.mark.parametrize("estimator", ["iwae", "quadratic"])
def test_a_batch_without_labels_has_no_loss_and_no_gradient(estimator, as_on_a_gpu):
    inputs = masked(1.0)
    out, gradients = loss_and_gradients(wrapped("batched", estimator), inputs)
    assert out.loss == 0 and gradients
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_tokens_are_not_gathered_where_nearly_all_have_labels(head_calls, as_on_a_gpu):
    loss_and_gradients(wrapped("batched"), masked(0.0, size=2, length=64))
    assert all(call.labelled is None for call in head_calls)


@pytest.mark.parametrize("trains_head", [True, False])
def test_autocast_casts_the_weight_once_a_batch(trains_head, monkeypatch, head_calls):
    casts = []

    def cast(weight):  # as a GPU would; a CPU's heads stay in fp32
        casts.append(weight.detach().bfloat16())
        return casts[-1]

    lm, inputs = wrapped("chunked", chunk_size=1), masked(0.3)
    lm.base.lm_head.requires_grad_(trains_head)
    with monkeypatch.context() as patch:
        patch.setattr(head, "cast_weight", cast)
        out, gradients = loss_and_gradients(lm, inputs)
    assert len(casts) == 1 and len(head_calls) == 2 * M
    assert all(call.cast_weight.data_ptr() == casts[0].data_ptr() for call in head_calls)
    if trains_head:
        assert gradients["base.lm_head.weight"].dtype == torch.float32
    with torch.no_grad():
        lm.base.lm_head.weight.copy_(casts[0])
    expected, expected_gradients = loss_and_gradients(lm, inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize("samples", [1, 3])
def test_the_documents_of_all_samples_are_those_of_one_laid_end_to_end(samples, as_on_a_gpu):
    positions = torch.tensor([[0, 0, 1, 0, 1, 2, 3, 4, 0], [3, 4, 5, 6, 0, 1, 2, 3, 4]])
    ours = PackedDocuments(positions).lengths(samples)
    starts = torch.tensor([0, 1, 3, 8, 9, 13])
    edges = [*(starts + 18 * sample for sample in range(samples)), torch.tensor([18 * samples])]
    assert ours["cu_seq_lens_q"].dtype == torch.int32 and ours["max_length_q"] == 5
    assert ours["cu_seq_lens_q"].tolist() == torch.cat(edges).tolist()
    assert torch.equal(ours["cu_seq_lens_k"], ours["cu_seq_lens_q"])
    assert PackedDocuments(torch.arange(9).expand(2, 9)).lengths(samples) == {}
