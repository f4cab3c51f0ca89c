"""Prompts, models and naive greedy loops for the tests of `generate`."""

import tiny
import torch
import transformers
from batches import positions_of
from torch.nn import functional as F

from fastperturb import PerturbConfig, noise, wrap

STEPS, SEED = 6, 5
# Gemma2 has scaled embeddings, capped logits, and a window shorter than the prompts.
ARCHITECTURES = ("GPT2", "Llama", "Gemma2")

MODES = {
    "sequence": {"mode": "sequence"},
    "token": {"mode": "token"},
    "mixture": {"mode": "mixture", "num_samples": 3},
}


def base_model(architecture="Llama", **changes):
    """Return a tiny model whose configuration ends no text by itself."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return tiny.base_model(architecture, **{**special, **changes})


def perturbed(architecture="Llama", **options):
    return wrap(base_model(architecture), PerturbConfig(**{"init_scale": 0.7, **options}))


def prompts(size=3, length=7, padding=True):
    """Return prompts [B, T] of different lengths, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, tiny.SMALL["vocab_size"], (size, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :3] = 0
        ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def samples_of(mode, step):
    """Return the sample numbers whose probabilities are averaged at this step."""
    return {"sequence": [0], "token": [step], "mixture": [0, 1, 2]}[mode]


@torch.no_grad()
def mean_probs(lm, ids, mask, samples, *, perturb_mask=None, antithetic=False):
    """Return the mean over samples of next-token probabilities, one full forward each."""
    embeddings = lm.base.get_input_embeddings()(ids)
    positions = positions_of(mask)
    z = noise.latent(
        SEED,
        (len(samples), *ids.shape, lm.transform.latent_dim),
        scope=lm.config.scope,
        samples=torch.tensor(samples),
        positions=positions,
        antithetic=antithetic,
    )
    total = 0
    for sample in z:
        perturbed = lm.transform(embeddings.float(), sample).to(embeddings.dtype)
        if perturb_mask is not None:
            perturbed = torch.where(perturb_mask[..., None], perturbed, embeddings)
        total = total + lm.base(
            inputs_embeds=perturbed, attention_mask=mask, position_ids=positions
        ).logits[:, -1].softmax(-1)
    return total / len(samples)


def naive_greedy(lm, input_ids, attention_mask, mode, *, steps=STEPS, perturb_mask=None):
    """Return the prompts followed by the likeliest tokens, by a full forward for each."""
    ids, mask = input_ids, attention_mask
    for step in range(steps):
        samples = samples_of(mode, step)
        probs = mean_probs(lm, ids, mask, samples, perturb_mask=perturb_mask)
        ids = torch.cat([ids, probs.argmax(-1, keepdim=True)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
        if perturb_mask is not None:
            perturb_mask = F.pad(perturb_mask, (0, 1), value=True)
    return ids


class Recorder(transformers.LogitsProcessor):
    """Keeps the scores of every step."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores)
        return scores


def recorded_scores(lm, inputs, **options):
    """Return the scores that logits processors see in two steps."""
    recorder = Recorder()
    lm.generate(**inputs, seed=SEED, max_new_tokens=2, logits_processor=[recorder], **options)
    return recorder.scores
