"""A step without attention mask reads no value from its device, but the count of its labels.

A meta tensor has no values, so a step on this device raises wherever it would wait for a GPU.
"""

import pytest
import torch
import transformers
from batches import batch
from tiny import llama, perturbed

from fastperturb.engine import labelled


@pytest.fixture
def meta_device(monkeypatch):
    """Let a step run on the meta device; return the counts that were read."""
    reads = []

    class Count:
        def __init__(self, values):
            assert values.device.type == "meta"

        def read(self):
            reads.append(self)
            return [9]

    monkeypatch.setattr(labelled, "HostCopy", Count)
    # Transformers looks for packed documents in each run of a trunk, and waits.
    masks = transformers.masking_utils
    monkeypatch.setattr(masks, "find_packed_sequence_indices", lambda position_ids: None)
    # The meta device has no autocast to ask for.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    return reads


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["iwae", "resample", "quadratic"])
@pytest.mark.parametrize("plan", ["batched", "chunked", "resample"])
def test_a_step_waits_once_for_its_device(plan, estimator, marginal, meta_device):
    if estimator == "quadratic" and (plan == "resample" or marginal == "sequence"):
        pytest.skip("quadratic is of the token marginal, and needs all samples")
    options = {"chunk_size": 2} if plan == "chunked" else {}
    options |= {"estimator": estimator, "marginal": marginal, "plan": plan}
    lm = perturbed(llama(), num_samples=4, latent_dim=4, **options).train().to("meta")
    inputs = {name: value.to("meta") for name, value in batch(right=0).items()}
    lm(input_ids=inputs["input_ids"], labels=inputs["labels"], seed=3).loss.backward()
    assert len(meta_device) == 1
    assert all(value.grad is not None for value in lm.transform.parameters())
