"""Several documents in one row: their latents, their attention, and what is rejected."""

import pytest
import torch
import transformers
from batches import batch
from tiny import llama, perturbed
from torch.nn import functional as F

from fastperturb.engine.host_copy import HostCopy


def test_packed_document_has_the_latents_of_its_row_id_and_positions():
    lm = perturbed(llama(), num_samples=2, plan="batched")
    ids = batch(size=2, length=5, right=0)["input_ids"]
    seen = []
    lm.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    lm(input_ids=ids, rows=torch.tensor([7, 4]), seed=5)
    lm(
        input_ids=ids.reshape(1, 10),
        position_ids=torch.arange(5).repeat(2)[None],
        rows=torch.tensor([7, 4]).repeat_interleave(5)[None],
        seed=5,
    )
    alone, packed = seen  # (M * B, T, D)
    torch.testing.assert_close(packed.reshape(2, 2, 5, -1), alone.reshape(2, 2, 5, -1))


def varlen_attention(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
):
    """Compute what the flash kernel does for documents laid end to end: [tokens, heads, width]."""
    assert causal and softmax_scale == q.shape[-1] ** -0.5
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    parts = [
        F.scaled_dot_product_attention(
            *(tensor.transpose(0, 1) for tensor in document), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for document in zip(q.split(lengths), k.split(lengths), v.split(lengths))
    ]
    return torch.cat(parts)


@pytest.fixture
def flash_attention(monkeypatch):
    """Run transformers' own flash path, down to the kernel that needs a GPU."""
    utils = transformers.modeling_flash_attention_utils
    kernels = (None, varlen_attention, None, None, None)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(utils, "_loaded_implementation", None)


def test_packed_documents_agree_between_flash_attention_and_sdpa(flash_attention):
    lm = perturbed(llama(), num_samples=3)
    ids = torch.randint(97, (2, 9))
    packed = {
        "input_ids": ids,
        "labels": ids,
        # Documents of one token too, and a row that begins within one.
        "position_ids": torch.tensor([[0, 0, 1, 0, 1, 2, 3, 4, 0], [3, 4, 5, 6, 0, 1, 2, 3, 4]]),
        "rows": torch.tensor([[0, 1, 1, 2, 2, 2, 2, 2, 3], [4, 4, 4, 4, 5, 5, 5, 5, 5]]),
    }
    expected = lm(**packed, seed=4).log_probs
    lm.base.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(lm(**packed, seed=4).log_probs, expected)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_packed_documents_are_measured_once_a_batch(flash_attention, monkeypatch, chunk_size):
    waits, read = [], HostCopy.read

    def recorded(self):
        waits.append(self)
        return read(self)

    monkeypatch.setattr(HostCopy, "read", recorded)
    lm = perturbed(llama(), num_samples=4, plan="chunked", chunk_size=chunk_size)
    lm.base.config._attn_implementation = "flash_attention_2"
    ids, positions = torch.randint(97, (1, 9)), torch.tensor([[0, 0, 1, 0, 1, 2, 3, 4, 0]])
    lm(input_ids=ids, labels=ids, position_ids=positions).loss.backward()
    assert len(waits) == 1  # a CPU's head waits for nothing


def test_packed_documents_take_a_full_attention_mask_only():
    lm = perturbed(llama(), num_samples=3)
    ids = torch.randint(3, 97, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions, "seed": 5}
    mask = torch.ones_like(ids)
    expected = lm(**packed).log_probs
    torch.testing.assert_close(lm(**packed, attention_mask=mask).log_probs, expected)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="packed position_ids take no attention_mask"):
        lm(**packed, attention_mask=mask)
    mask[0, -1], mask[0, 3] = 1, 0  # the end of the first document, which hides no boundary
    with pytest.raises(ValueError, match="packed position_ids take no attention_mask"):
        lm(**packed, attention_mask=mask)


def test_positions_under_padding_do_not_count_as_packing():
    lm = perturbed(llama(), num_samples=3)
    ids, mask = torch.randint(3, 97, (1, 5)), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 0, 1, 2]])  # as `generate` makes them
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask, "seed": 5}
    explicit, counted = lm(**inputs, position_ids=positions), lm(**inputs)
    torch.testing.assert_close(explicit.log_probs[:, :, 2:], counted.log_probs[:, :, 2:])
    hole = torch.tensor([[1, 1, 0, 1, 1]])  # within one document
    lm(**{**inputs, "attention_mask": hole}, position_ids=torch.arange(5)[None])


@pytest.mark.parametrize(
    "packing",
    [
        {"rows": torch.tensor([[0] * 4 + [1] * 5])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
    ],
    ids=["rows", "position_ids"],
)
def test_sequence_marginal_rejects_packed_documents(packing):
    lm = perturbed(llama(), num_samples=3, marginal="sequence")
    ids = torch.randint(3, 97, (1, 9))
    with pytest.raises(ValueError, match="the sequence marginal is of one document a row"):
        lm(ids, labels=ids, **packing)
    with pytest.raises(ValueError, match="the sequence marginal is of one document a row"):
        lm.score(ids, **packing)
