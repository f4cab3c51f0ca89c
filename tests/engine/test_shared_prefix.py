"""An unperturbed prefix is encoded once for all samples, and nothing else changes."""

import pytest
import torch
from batches import batch
from oracles import loss_and_gradients, without_shared_prefix
from tiny import base_model, gpt2, llama, perturbed, with_lora

B, T, PREFIX = 3, 12, 5
ARCHITECTURES = {"gpt2": gpt2, "llama": llama, "lora": lambda: with_lora(llama())}
PLANS = {
    "batched": {"plan": "batched"},
    "chunked": {"plan": "chunked", "chunk_size": 2},
    "resample": {"plan": "resample", "backward_samples": 2},
    "quadratic": {"plan": "batched", "estimator": "quadratic"},
}


def inputs_with_a_prefix():
    """Return a batch whose first tokens are not perturbed."""
    return {
        **batch(B, T, left=2),
        "perturb_mask": torch.arange(T).expand(B, T) >= PREFIX,
    }


def run(base, **options):
    lm = perturbed(base, num_samples=4, **options)
    return loss_and_gradients(lm, inputs_with_a_prefix(), return_logits=True)


def record_shapes(base):
    """Return a list that fills with the shape [rows, positions] of each pass of the trunk."""
    shapes = []
    trunk = getattr(base, "get_base_model", lambda: base)().base_model
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefix_changes_no_result_and_no_gradient(architecture, options, monkeypatch):
    base = ARCHITECTURES[architecture]()
    shapes = record_shapes(base)
    ours, grads = run(base, **options)
    assert shapes[0] == (B, PREFIX)
    assert all(length == T - PREFIX for _, length in shapes[1:])
    without_shared_prefix(monkeypatch)
    plain, expected = run(base, **options)
    for name in ("loss", "log_marginal", "log_probs", "ess", "shift", "logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_sliding_window_model_shares_no_prefix():
    base = base_model("Mistral")
    shapes = record_shapes(base)
    run(base, plan="batched")
    assert shapes == [(4 * B, T)]


def test_fully_perturbed_batch_shares_no_prefix():
    base = llama()
    shapes = record_shapes(base)
    lm = perturbed(base, num_samples=4, plan="batched")
    lm(**{**inputs_with_a_prefix(), "perturb_mask": torch.ones(B, T).bool()})
    assert shapes == [(4 * B, T)]


def test_length_dependent_rope_shares_no_prefix():
    base = llama()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base.model.config.rope_parameters = rope
    shapes = record_shapes(base)
    run(base, plan="batched")
    assert shapes == [(4 * B, T)]
