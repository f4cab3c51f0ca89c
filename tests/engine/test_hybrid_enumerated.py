"""Edits and noise together, against every edit and every latent of a short prefix, enumerated.

Latents have one entry, 1 or -1, so that a copy of n tokens has 2^n of them.
"""

import functools
import itertools
import math

import pytest
import torch
from edit_cases import SEED, base_model, hybrid_lm, naive_prefix

from fastperturb.engine.edit_layout import KINDS

V = 8  # of which 3 are special
DRAWABLE = V - 3
PROMPT, TEXT = torch.tensor([[4, 6]]), torch.tensor([[4, 6, 5]])
# A mean of draws is within so many standard errors of its expectation.
ERRORS = 4.5


def small_lm(*, kinds=KINDS, neighbors=2, learn_rates=False, **options):
    """Return a model of a small vocabulary whose edits and latents can be enumerated."""
    base = base_model(vocab_size=V, hidden_size=16, num_hidden_layers=1)
    edits = {"rate": 0.3, "kinds": kinds, "neighbors": neighbors, "learn_rates": learn_rates}
    noise = {"latent": "rademacher", "latent_dim": 1, "init_scale": 0.8}
    return hybrid_lm(base=base, edits=edits, **noise | options)


def actions(config, rates):
    """Return the actions of a token: their probabilities, and random numbers that choose them."""
    counts = {"replace": config.neighbors, "insert": DRAWABLE, "delete": 1, "swap": 1}
    result = [(1 - sum(rates), (2**32 - 1, 0, 0, 0))]
    for index, kind in enumerate(config.kinds):
        for choice in range(counts[kind]):
            probability = rates[index] / counts[kind]
            number = (0, -(-(index << 32) // len(config.kinds)), -(-(choice << 32) // counts[kind]))
            result.append((probability, (*number, 0)))
    return result


def omegas(config, length, rates=None):
    """Return each choice of edits: its probability, and the random numbers of the tokens."""
    if rates is None:
        rates = [config.rate / len(config.kinds)] * len(config.kinds)
    for drawn in itertools.product(actions(config, rates), repeat=length):
        probabilities, numbers = zip(*drawn)
        yield math.prod(probabilities), numbers


def copy_of(lm, tokens, numbers):
    """Return the edited copy that predicts the token after these."""
    prefix = naive_prefix(lm, tokens, numbers, [True] * len(tokens), room=64)
    return tuple(token for token, _ in prefix)


def latents(length):
    """Return all latents [2^n, n, 1]."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=length)))[..., None]


def next_probs(lm, copy, z):
    """Return the probabilities [len(z), V] of the next token under these latents."""
    e = lm.base.get_input_embeddings()(torch.tensor(copy))
    perturbed = lm.transform(e, z[:, : len(copy)])
    return lm.base(inputs_embeds=perturbed).logits[:, -1].softmax(-1)


def marginal_probs(lm, tokens, rates=None):
    """Return E_omega E_z pi(. | T(E(omega(tokens)), z)), [V]."""
    of_copy = functools.cache(lambda copy: next_probs(lm, copy, latents(len(copy))).mean(0))
    config = lm.config.edits
    parts = [p * of_copy(copy_of(lm, tokens, w)) for p, w in omegas(config, len(tokens), rates)]
    return torch.stack(parts).sum(0)


def joint_probs(lm, tokens, appended, rates=None):
    """Return the probabilities [V, V] of a next token of `tokens` and one of those and `appended`.

    Both have one choice of edits and one latent.
    """

    @functools.cache
    def of_copies(first, second):
        z = latents(max(len(first), len(second)))
        one, two = (next_probs(lm, copy, z) for copy in (first, second))
        return torch.einsum("zi,zj->ij", one, two) / len(z)

    total = torch.zeros(V, V)
    for p, numbers in omegas(lm.config.edits, len(tokens) + 1, rates):
        first = copy_of(lm, tokens, numbers[:-1])
        total = total + p * of_copies(first, copy_of(lm, [*tokens, appended], numbers))
    return total


def label_probs(lm, marginal, rates=None):
    """Return the probabilities of the two labels of TEXT, or of both together."""
    first, *labels = TEXT[0].tolist()
    if marginal == "sequence":
        return joint_probs(lm, [first], labels[0], rates)[labels[0], labels[1]][None]
    one, two = marginal_probs(lm, [first], rates), marginal_probs(lm, [first, labels[0]], rates)
    return torch.stack([one[labels[0]], two[labels[1]]])


def test_enumerated_edits_have_a_probability_of_one():
    lm = small_lm()
    assert sum(p for p, _ in omegas(lm.config.edits, 2)) == pytest.approx(1)
    assert len(list(omegas(lm.config.edits, 2))) == (1 + 2 + DRAWABLE + 1 + 1) ** 2
    assert marginal_probs(lm, [4, 6]).sum().item() == pytest.approx(1, abs=1e-6)
    assert joint_probs(lm, [4], 6).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sampling", ["independent", "antithetic", "stratified"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
@torch.no_grad()
def test_the_marginal_is_the_mean_over_every_edit_and_every_latent(marginal, sampling):
    lm = small_lm(marginal=marginal, sampling=sampling)
    log_probs = lm(TEXT, labels=TEXT, num_samples=16384, seed=SEED).log_probs[:, 0]
    if marginal == "sequence":
        log_probs = log_probs.sum(-1, keepdim=True)
    drawn = log_probs.exp().unflatten(0, (-1, 16 if sampling == "stratified" else 2)).mean(1)
    error = (drawn.mean(0) - label_probs(lm, marginal)).abs()
    assert (error < ERRORS * drawn.std(0) / len(drawn) ** 0.5).all()
    assert (drawn.std(0) > 0.01 * drawn.mean(0)).all()


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_the_gradient_is_that_of_the_enumerated_marginal(marginal):
    lm = small_lm(marginal=marginal, num_samples=1024)
    parameters = (lm.transform.U, lm.base.get_input_embeddings().weight)
    value = -label_probs(lm, marginal).log().sum() / 2
    exact = torch.autograd.grad(value, parameters)
    drawn = []
    for seed in range(24):
        loss = lm(TEXT, labels=TEXT, seed=seed).loss
        drawn.append([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])
    for expected, *gradients in zip(exact, *drawn, strict=True):
        gradients = torch.stack(gradients)
        error = (gradients.mean(0) - expected.flatten()).abs()
        # The bias of log mean is about a thousandth of the gradient.
        allowed = ERRORS * gradients.std(0) / len(gradients) ** 0.5
        assert (error <= allowed + 2e-3 * expected.abs().max()).all()
        assert expected.norm() > 30 * allowed.norm() / ERRORS  # it would notice a wrong one


@pytest.mark.parametrize(
    ("marginal", "estimator"),
    [("token", "iwae"), ("sequence", "iwae"), ("token", "jvi_clip"), ("sequence", "resample")],
)
def test_the_rates_have_the_gradient_of_the_enumerated_marginal(marginal, estimator):
    options = {"backward_samples": 512} if estimator == "resample" else {}
    lm = small_lm(
        marginal=marginal, estimator=estimator, num_samples=1024, learn_rates=True, **options
    )
    logits = lm.transform.edits.rate_logits
    with torch.no_grad():
        logits += torch.tensor([0.4, -0.3, 0.2, -0.5])
    value = -label_probs(lm, marginal, [*lm.transform.edits.rates()]).log().sum() / 2
    (expected,) = torch.autograd.grad(value, logits)
    drawn = []
    for seed in range(48):
        loss = lm(TEXT, labels=TEXT, seed=seed).loss
        drawn.append(torch.autograd.grad(loss, logits)[0])
    gradients = torch.stack(drawn)
    error = (gradients.mean(0) - expected).abs()
    allowed = ERRORS * gradients.std(0) / len(gradients) ** 0.5
    assert (error <= allowed + 2e-3 * expected.abs().max()).all()
    assert expected.norm() > 4 * allowed.norm()  # it would notice a wrong one


@torch.no_grad()
def test_learned_rates_have_the_marginal_of_their_edits():
    lm = small_lm(learn_rates=True)
    lm.transform.edits.rate_logits.copy_(torch.tensor([1.0, -2.0, 0.5, -1.0]))
    rates = lm.transform.edits.rates().tolist()
    drawn = lm(TEXT, labels=TEXT, num_samples=16384, seed=SEED).log_probs[:, 0].exp()
    error = (drawn.mean(0) - label_probs(lm, "token", rates)).abs()
    assert (error < ERRORS * drawn.std(0) / len(drawn) ** 0.5).all()
    assert (drawn.mean(0) - label_probs(lm, "token")).abs().max() > 2 * error.max()


@pytest.mark.parametrize("mode", ["sequence", "token", "mixture"])
def test_decoded_tokens_have_the_frequencies_of_the_enumerated_marginal(mode):
    lm, count = small_lm(), 8192
    expected = marginal_probs(lm, PROMPT[0].tolist()).detach()
    torch.manual_seed(1)
    options = {"num_samples": 2} if mode == "mixture" else {}
    texts = lm.generate(
        PROMPT,
        mode=mode,
        seed=SEED,
        do_sample=True,
        top_k=0,
        max_new_tokens=1,
        num_return_sequences=count,
        **options,
    )
    shares = texts[:, 2].bincount(minlength=V) / count
    allowed = ERRORS * (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() < allowed).all()


def test_decoding_by_sequences_keeps_one_choice_of_edits_and_one_latent():
    # Deletions and swaps change what was laid down for the tokens before.
    lm, count = small_lm(kinds=("replace", "delete", "swap"), neighbors=1, init_scale=1.5), 8192
    rows = [joint_probs(lm, [4, 6], token)[token] for token in range(V)]
    expected = torch.stack(rows).detach().flatten()
    assert expected.sum().item() == pytest.approx(1, abs=1e-6)
    torch.manual_seed(1)
    texts = lm.generate(
        PROMPT,
        mode="sequence",
        seed=SEED,
        do_sample=True,
        top_k=0,
        max_new_tokens=2,
        num_return_sequences=count,
        eos_token_id=None,
    )
    shares = (texts[:, 2] * V + texts[:, 3]).bincount(minlength=V * V) / count
    allowed = ERRORS * (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() < allowed + 1 / count).all()
    apart = marginal_probs(lm, [4, 6])
    later = torch.stack([marginal_probs(lm, [4, 6, token]) for token in range(V)])
    independent = (apart[:, None] * later).flatten()  # the token marginal's
    assert ((shares - independent).abs() > allowed + 1 / count).any()
