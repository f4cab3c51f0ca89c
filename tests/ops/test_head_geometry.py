"""The sizes of a head's blocks, and what a call costs in products, row passes and bytes.

A call of a real size is counted on tensors without memory, as a GPU would run it.
"""

from types import SimpleNamespace

import pytest
import torch
from head_cases import HEADS

from fastperturb.ops import gemm, head_blocks, head_gradients
from fastperturb.ops.head_geometry import CPU, Geometry, even_parts
from fastperturb.ops.head_gradients import Wanted
from fastperturb.ops.head_labels import Labels

MIB = 2**20
GPUS = {"A100-40": (108, 40), "H100-80": (132, 80), "H200-141": (132, 141), "B200-180": (148, 180)}
VOCABULARIES = [32001, 50257, 128256, 151936]


def of_gpu(name, dim):
    processors, gigabytes = GPUS[name]
    return Geometry.of_gpu(processors, gigabytes * 10**9, dim)


def sizes(parts):
    return [part.stop - part.start for part in parts]


def test_a_cpus_blocks_stay_in_its_cache():
    assert sizes(CPU.row_parts(2048)) == [1024, 1024]
    assert CPU.entries(1024) * 1024 * 4 == 2 * MIB
    assert CPU.padded(50257) == 50257 and not CPU.narrow
    assert Geometry.of(torch.device("cpu"), 4096) is CPU


@pytest.mark.parametrize("dim", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("rows", [12000, 40000, 10**6])
@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpus_blocks_are_tall_and_wide_and_keep_to_their_budget(gpu, rows, dim):
    geometry = of_gpu(gpu, dim)
    parts = sizes(geometry.row_parts(rows))
    assert sum(parts) == rows and parts[0] >= 6000
    entries = geometry.entries(parts[0])
    assert 2000 <= entries <= 16384 and 4 * parts[0] * entries <= geometry.block_bytes
    for vocab in VOCABULARIES:
        blocks = sizes(even_parts(vocab, entries, multiple=64))
        assert sum(blocks) == vocab and blocks[0] <= entries
        assert blocks[0] % 64 == 0 and geometry.padded(blocks[-1]) % 64 == 0


@pytest.mark.parametrize("dim", [2048, 4096, 8192])
@pytest.mark.parametrize("gpu", GPUS)
def test_the_second_product_fills_five_waves_of_the_multiprocessors(gpu, dim):
    processors, _ = GPUS[gpu]
    for rows in (40000, 10**6):
        part = of_gpu(gpu, dim).row_parts(rows)[0]
        tiles = (part.stop / 128) * (dim / 256)
        assert tiles >= 5 * processors


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("tokens", [100, 8192, 65536, 200_000])
def test_the_gradients_of_a_group_of_rows_keep_to_twice_the_budget_in_16_bits(samples, tokens):
    geometry = of_gpu("H200-141", 4096)
    groups = geometry.groups(samples, tokens)
    assert [part.start for group in groups for part in group][1:] == [
        part.stop for group in groups for part in group
    ][:-1]
    for group in groups:
        rows = samples * (group[-1].stop - group[0].start)
        width = geometry.gathered_entries(rows)
        assert rows <= 65536 and width % 64 == 0
        assert 2 * rows * width <= 2 * geometry.block_bytes
        assert 4 * samples * max(sizes(group)) * width <= geometry.block_bytes


class Costs:
    """The products and row passes of a call, whose tensors have no memory."""

    def __init__(self, monkeypatch):
        self.flops = self.products = self.passes = self.bytes = 0
        monkeypatch.setattr(gemm, "product", self.product)
        monkeypatch.setattr(gemm, "add_product", self.add_product)
        names = "online_softmax", "grad_logits", "quadratic_dot", "quadratic_grad_logits"
        passes = dict.fromkeys(names, self.row_pass)
        self.row_passes = SimpleNamespace(**passes, finish_logprob=self.finish)

    def product(self, left, right, out=None):
        rows, columns = left.shape[0], right.shape[1]
        assert left.shape[1] == right.shape[0] and left.dtype == right.dtype
        self.flops += 2 * left.numel() * columns
        self.products += 1
        if out is None:
            out = left.new_empty((rows, columns), dtype=torch.float32)
        assert out.shape == (rows, columns) and out.dtype == torch.float32
        self.bytes += left.nbytes + right.nbytes + out.nbytes
        return out

    def add_product(self, total, left, right, out=None):
        if total is not None:
            self.bytes += total.nbytes
        return self.product(left, right, out if total is None else total)

    def row_pass(self, products, *others):
        self.passes += 1
        self.bytes += products.nbytes
        *_, out = (other for other in others if other is not None)
        if isinstance(out, torch.Tensor) and out.shape == products.shape:
            self.bytes += out.nbytes

    def finish(self, *arguments):
        self.passes += 1


def run(kind, costs, *, dim=4096, vocab=128256, rows=8192, labels=None, frozen, samples=8):
    """Run a head in bf16 on an H200, without memory: forward, and the backward if it trains."""
    tokens = rows if kind == "logprob" else rows // samples
    shape = (tokens, dim) if kind == "logprob" else (samples, tokens, dim)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocab, dim, dtype=torch.bfloat16, device="meta")
    if labels is None:
        target = torch.empty(tokens, dtype=torch.int64, device="meta")
        labels = Labels(target, tokens, None, None)
    options = None, 1.0, None, vocab, torch.bfloat16, of_gpu("H200-141", dim)
    head = head_blocks.Head(costs.row_passes, weight, *options)
    arguments = (None,) if kind == "quadratic" else ()
    metrics = {"want_entropy": False} if kind == "logprob" else {}
    forward = getattr(head_blocks, HEADS[kind])
    result = forward(head, hidden, labels, *arguments, want_grad_hidden=frozen, **metrics)
    if not frozen:
        saved = (result.lse,) if kind == "logprob" else (None, 1, result.lse, result.dot)
        grad = torch.empty(tokens, device="meta")
        wanted = Wanted(hidden=True, weight=True, bias=False)
        backward = getattr(head_gradients, HEADS[kind] + "_backward")
        backward(head, grad, hidden, labels, *saved, wanted)
    return 2 * rows * dim * vocab


def test_a_frozen_head_takes_two_products_and_a_pass_a_block_and_few_bytes_a_logit(monkeypatch):
    costs = Costs(monkeypatch)
    one_product = run("logprob", costs, frozen=True)
    assert costs.flops == 2 * one_product
    assert (costs.products, costs.passes) == (16, 8 + 1)  # 8 blocks, and the finish
    # 4 + 4 + 2 + 2 bytes. Then weight is read twice, hidden and the sum [rows, D] once a block.
    assert 12 < costs.bytes / (8192 * 128256) < 17


def test_a_trained_head_takes_four_products_and_one_over_all_rows_for_its_weight(monkeypatch):
    costs = Costs(monkeypatch)
    one_product = run("logprob", costs, frozen=False, rows=32768)
    assert costs.flops == 4 * one_product
    # Forward: 3 parts of the rows by 11 blocks. Backward, of 8 blocks: logits of 4 parts, two sums.
    assert costs.products == 3 * 11 + 8 * (4 + 2)


def test_the_quadratic_head_takes_two_products_and_three_passes_a_block(monkeypatch):
    costs = Costs(monkeypatch)
    one_product = run("quadratic", costs, frozen=True)
    assert costs.flops == 2 * one_product
    assert (costs.products, costs.passes) == (2 * 4 * 2, 2 * 4 * 3)  # 2 parts of 4 blocks


@pytest.mark.parametrize("vocab", [50257, 32001])
def test_products_of_odd_vocabularies_have_sides_of_multiples_of_64(vocab, monkeypatch):
    shapes = []
    costs = Costs(monkeypatch)

    def product(left, right, out=None):
        shapes.extend([*left.shape, *right.shape])
        return costs.product(left, right, out)

    monkeypatch.setattr(gemm, "product", product)
    for kind in HEADS:
        run(kind, costs, vocab=vocab, frozen=True)
    assert all(side % 64 == 0 for side in shapes)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_on_a_gpu_that_knows_the_labelled_tokens_the_others_cost_nothing(kind, frozen, monkeypatch):
    tokens = {"logprob": 8192, "quadratic": 1024}[kind]
    labelled = torch.empty(tokens * 4 // 10, dtype=torch.int64, device="meta")
    target = torch.empty(tokens, dtype=torch.int64, device="meta")
    labels = Labels.of(target, -100, labelled)
    costs = Costs(monkeypatch)
    one_product = run(kind, costs, labels=labels, frozen=frozen)
    share = len(labelled) / tokens
    assert costs.flops == pytest.approx((2 if frozen else 4) * share * one_product)
