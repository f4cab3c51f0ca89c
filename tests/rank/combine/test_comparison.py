"""Combinations of histories compared with the model and with baselines."""

import numpy as np
import pytest
import torch
from rank_cases import small_isan, small_sequences

from fastperturb.rank import compare, fit, follow, logit_matrix
from fastperturb.rank.ask import distributions_along, sample_continuations
from fastperturb.rank.combine.comparison import truncations
from fastperturb.rank.texts import with_prefixes


def kl_from(truth, log_probs):
    """KL(truth || log_probs) over the last axis."""
    return (truth.exp() * (truth - log_probs)).sum(-1)


def test_a_combination_of_as_many_histories_as_the_rank_is_the_model():
    model, target = small_isan(rank=3), (0, 1, 2)
    others = small_sequences(3, 3, seed=3)
    futures = with_prefixes(small_sequences(6, 4))
    values = logit_matrix(model, [*others, target], futures).values.astype(np.float64)
    weights = fit(values[:3], values[3:], ridges=[0.0]).weights
    tokens = torch.tensor(small_sequences(8, 5, seed=5))
    log_probs = follow(model, others, weights, tokens[:, :-1])[0]
    expected = distributions_along(model, target, tokens)
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)  # the matrix is held in fp32


def test_predictors_are_compared_along_continuations_of_the_model():
    model = small_isan(rank=3)
    histories, targets = small_sequences(20, 4), small_sequences(3, 4, seed=9)
    futures = with_prefixes(small_sequences(6, 3, seed=2))
    pools = {"all": logit_matrix(model, histories, futures)}
    pools["two"] = logit_matrix(model, histories[:2], futures)
    of_targets = logit_matrix(model, targets, futures)
    comparison = compare(
        model, pools, of_targets, steps=4, continuations=5, earlier=small_isan(rank=2), seed=1
    )
    predictors = (*comparison.combinations, *comparison.baselines)
    kl = {predictor.name: predictor.kl for predictor in predictors}
    assert set(kl) == {
        *("all", "two", "empty future", "last token", "last 2 tokens", "last 3 tokens"),
        *("unigram", "earlier checkpoint"),
    }
    assert all(values.shape == (3, 4) and (values > -1e-9).all() for values in kl.values())
    assert kl["all"].max() < 1e-4
    # A rank of 3 in 6 tokens: the next token's logits give the state, but two rows do not span it.
    assert kl["two"].sum() > 0.1 and kl["earlier checkpoint"].sum() > 0.1
    for example, target in zip(comparison.written, targets):
        assert example.target == target and example.combination == example.model
        log_probs = model.log_probs([target], [example.model[:2]])[0, 0]
        assert example.model[2] == log_probs.argmax() and len(example.model) == 4
    assert comparison.asked[0] == 1.0 and 0 <= comparison.asked[1:].min() < 1
    tokens = sample_continuations(model, targets[0], 4, 5, torch.Generator().manual_seed(1))
    truth = distributions_along(model, targets[0], tokens)
    truncated = distributions_along(model, targets[0][-2:], tokens)
    expected = kl_from(truth, truncated).mean(0)
    np.testing.assert_allclose(kl["last 2 tokens"][0], expected, rtol=1e-6)


def test_an_earlier_checkpoint_with_another_vocabulary_is_rejected():
    targets = logit_matrix(
        small_isan(), small_sequences(2, 4), with_prefixes(small_sequences(4, 3))
    )
    with pytest.raises(ValueError, match="earlier has a vocabulary of 5 tokens and the model one"):
        compare(small_isan(), {"own": targets}, targets, earlier=small_isan(vocab_size=5))


def test_the_unigram_is_the_best_constant_distribution():
    model = small_isan()
    targets = logit_matrix(model, small_sequences(2, 4), with_prefixes(small_sequences(4, 3)))
    comparison = compare(model, {"own": targets}, targets, steps=3, continuations=2, seed=4)
    unigram = next(predictor for predictor in comparison.baselines if predictor.name == "unigram")
    generator = torch.Generator().manual_seed(4)
    truths = []
    for target in targets.histories:
        tokens = sample_continuations(model, target, 3, 2, generator)
        truths.append(distributions_along(model, target, tokens))
    truth = torch.stack(truths)
    best = truth.exp().mean((0, 1, 2))
    expected = kl_from(truth, best.log()).mean((0, 1))
    np.testing.assert_allclose(unigram.kl.mean(0), expected, rtol=1e-6)
    for other in (best, *torch.rand(20, 6, dtype=torch.float64).softmax(-1)):
        kl = kl_from(truth, other.log()).mean((0, 1)).sum()
        assert unigram.kl.mean(0).sum() <= kl + 1e-9


def test_a_target_is_truncated_to_one_token_and_by_quarters():
    assert truncations(32) == [1, 8, 16, 24]
    assert truncations(5) == [1, 2, 3]
    assert truncations(2) == [1]
    assert truncations(1) == []
