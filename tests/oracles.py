"""Naive code that the wrapper is compared with, and ways to compare."""

import torch
from batches import IGNORED, positions_of

from fastperturb import noise
from fastperturb.engine import shared_prefix


def sample_logits(lm, inputs, *, seed, num_samples):
    """Return each sample's logits [M, B, T, V], one forward of the base model at a time."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    e, real, positions = lm.base.get_input_embeddings()(ids), mask.bool(), positions_of(mask)
    shape = (num_samples, *ids.shape, lm.transform.latent_dim)
    z = noise.latent(seed, shape, positions=positions, strata=lm.config.strata(num_samples))
    return torch.stack(
        [
            lm.base(
                inputs_embeds=torch.where(real[..., None], lm.transform(e, sample), e),
                attention_mask=mask,
                position_ids=positions,  # as `generate` counts them
            ).logits
            for sample in z
        ]
    )


def label_log_probs(logits, labels):
    """Return the labels' log-probs [M, B, T - 1], 0 where ignored, and the mask of the labelled."""
    is_labelled = labels[:, 1:] != IGNORED
    index = labels[:, 1:].where(is_labelled, 0).expand(len(logits), -1, -1)[..., None]
    log_probs = logits[:, :, :-1].float().log_softmax(-1).gather(-1, index)[..., 0]
    return log_probs.where(is_labelled, 0.0), is_labelled


def loss_and_gradients(lm, inputs, **options):
    """Return the output of one step from zero gradients, and the gradients by parameter name."""
    lm.zero_grad()
    out = lm(**inputs, seed=5, **options)
    out.loss.backward()
    return out, {
        name: value.grad.clone() for name, value in lm.named_parameters() if value.grad is not None
    }


def assert_near(value, expected, *, rel, floor, name=""):
    """Assert that the norm of the error is at most `rel` times the expected norm, plus `floor`."""
    error = (value - expected).norm()
    assert error <= rel * expected.norm() + floor, f"{name}: off by {error} of {expected}"


def assert_same_gradients(ours, expected, *, rel, floor, names=None):
    """Assert that gradients are None together and otherwise near in norm."""
    names = range(len(ours)) if names is None else names
    for name, gradient, right in zip(names, ours, expected, strict=True):
        assert (gradient is None) == (right is None), name
        if right is not None:
            assert_near(gradient, right, rel=rel, floor=floor, name=name)


def without_shared_prefix(monkeypatch):
    """Let every sample encode its whole sequence, whatever prefix the samples share."""
    monkeypatch.setattr(shared_prefix, "_cacheable", lambda trunk: False)
