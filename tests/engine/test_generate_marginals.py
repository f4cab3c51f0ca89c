"""Generated texts against enumerated probabilities, of both marginals and of mixtures."""

import itertools
import math

import pytest
import torch
from decoding import SEED, base_model
from torch.nn import functional as F

from fastperturb import PerturbConfig, wrap

VOCAB, LENGTH, LATENTS = 5, 3, 2


def few_valued_lm(scope):
    """Return a model of few tokens, each of whose latents is a sign."""
    model = base_model(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=4,
        initializer_range=0.8,
    )
    config = PerturbConfig(
        latent="rademacher",
        latent_dim=LATENTS,
        init_scale=1.5,
        scope=scope,
        marginal="sequence",
        sampling="independent",
    )
    return wrap(model, config)


@torch.no_grad()
def enumerated_probabilities(lm, first):
    """Return each token's probability in each continuation of `first`, by latent [Z, V^L, L]."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    ids = F.pad(texts, (1, 0), value=first)
    latents = LENGTH if lm.config.scope == "token" else 1
    log_probs = []
    for signs in itertools.product([-1.0, 1.0], repeat=LATENTS * latents):
        z = torch.tensor(signs).view(latents, LATENTS).expand(LENGTH, LATENTS)
        perturbed = lm.transform(lm.base.get_input_embeddings()(ids[:, :-1]), z)
        logits = lm.base(inputs_embeds=perturbed).logits.double()
        log_probs.append(logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0])
    return torch.stack(log_probs).exp()


def enumerated_marginals(lm, first):
    """Return the probability [V^L] of every continuation of `first`, under either marginal."""
    probs = enumerated_probabilities(lm, first)
    return {"sequence": probs.prod(-1).mean(0), "token": probs.mean(0).prod(-1)}


def counts_of(lm, **options):
    """Count every continuation [V^L] of token 2 among 20,000 sampled ones."""
    torch.manual_seed(0)
    ids = lm.generate(
        torch.full((200, 1), 2),
        torch.ones(200, 1),
        seed=SEED,
        do_sample=True,
        num_return_sequences=100,
        max_new_tokens=LENGTH,
        **options,
    )
    code = (ids[:, 1:] * VOCAB ** torch.arange(LENGTH).flip(0)).sum(1)
    return torch.bincount(code, minlength=VOCAB**LENGTH).double()


def chi_square(counts, probabilities):
    """Return the statistic over its 99.9% quantile, cells that expect under five as one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's cube
    return float(statistic) / (freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_texts_follow_their_own_marginal_and_not_the_other(mode, scope):
    lm = few_valued_lm(scope)
    marginals = enumerated_marginals(lm, first=2)
    assert marginals[mode].sum().item() == pytest.approx(1, abs=1e-6)
    counts = counts_of(lm, mode=mode)
    other = "token" if mode == "sequence" else "sequence"
    assert chi_square(counts, marginals[mode]) < 1
    assert chi_square(counts, marginals[other]) > 3


def test_a_mixture_of_one_sample_follows_the_sequence_marginal_and_of_two_neither():
    lm = few_valued_lm("sequence")
    probs = enumerated_probabilities(lm, first=2)
    marginals = {"sequence": probs.prod(-1).mean(0), "token": probs.mean(0).prod(-1)}
    one, two = (counts_of(lm, mode="mixture", num_samples=count) for count in (1, 2))
    assert chi_square(one, marginals["sequence"]) < 1
    pairs = (probs[:, None] + probs) / 2
    assert chi_square(two, pairs.prod(-1).mean((0, 1))) < 1
    assert min(chi_square(two, marginal) for marginal in marginals.values()) > 3
