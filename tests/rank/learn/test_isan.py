"""Linear networks: their distribution, their answers as oracles, and their ranks."""

import itertools

import numpy as np
import pytest
import torch

from bench.ranks.targets import all_sequences, generic_ranks, numerical_ranks, uneven
from fastperturb.rank.learn.isan import ISAN, noisy_parity


def logprob_by_definition(model, sequence):
    state, total = model.start, 0.0
    for t, token in enumerate(sequence):
        logits = torch.from_numpy(state @ model.outputs[t])
        total += float(logits.log_softmax(-1)[token])
        if t < model.length - 1:
            state = state @ model.transitions[t][token]
    return total


@pytest.fixture
def growing():
    """A network whose states have another dimension at every time."""
    random = np.random.default_rng(3)
    widths = [2, 4, 3, 1]
    return ISAN(
        random.standard_normal(2),
        [random.standard_normal((3, a, b)) for a, b in itertools.pairwise(widths)],
        [random.standard_normal((a, 3)) for a in widths],
    )


def test_logprob_is_the_product_of_the_steps(growing):
    sequences = all_sequences(3, 4)
    expected = [logprob_by_definition(growing, sequence) for sequence in sequences]
    np.testing.assert_allclose(growing.logprob(sequences), expected, rtol=1e-12)


def test_probabilities_of_all_sequences_sum_to_one(growing):
    assert np.exp(growing.logprob(all_sequences(3, 4))).sum() == pytest.approx(1, abs=1e-12)


def test_a_prefix_is_as_likely_as_all_its_continuations_together(growing):
    whole = np.exp(growing.logprob(all_sequences(3, 4))).reshape(9, 9).sum(1)
    np.testing.assert_allclose(np.exp(growing.logprob(all_sequences(3, 2))), whole, rtol=1e-12)
    assert growing.logprob(np.empty((2, 0), dtype=np.int64)).tolist() == [0.0, 0.0]


def test_answers_as_an_oracle_are_the_logprob_that_a_token_adds(growing):
    histories, futures = [(), (2,), (0, 1), (2,)], [(), (1,)]
    answers = growing.log_probs(histories, futures)
    assert answers.dtype == torch.float64
    for row, history in enumerate(histories):
        for column, future in enumerate(futures):
            context = history + future
            expected = [
                logprob_by_definition(growing, (*context, token))
                - logprob_by_definition(growing, context)
                for token in range(3)
            ]
            np.testing.assert_allclose(answers[row, column].numpy(), expected, atol=1e-12)


def test_samples_follow_the_distribution():
    model, count = ISAN.random(3, 3, 2, seed=4), 40_000
    samples = model.sample(count, seed=1)
    counts = np.bincount(samples @ [9, 3, 1], minlength=27)
    expected = count * np.exp(model.logprob(all_sequences(3, 3)))
    chi_squared = (np.square(counts - expected) / expected).sum()
    assert chi_squared < 54.1  # 0.999 quantile at 26 degrees of freedom
    assert (samples == model.sample(count, seed=1)).all()
    assert (samples != model.sample(count, seed=2)).any()


@pytest.mark.parametrize(
    ("vocab_size", "length", "rank"), [(4, 5, 1), (4, 5, 3), (4, 6, 8), (2, 7, 5), (5, 5, 6)]
)
def test_a_random_target_has_the_ranks_of_its_documentation(vocab_size, length, rank):
    target = ISAN.random(vocab_size, length, rank, seed=rank)
    assert numerical_ranks(target, length) == generic_ranks(vocab_size, length, rank)


def test_ranks_never_exceed_the_states_dimensions(growing):
    assert numerical_ranks(growing, 4) == (1, 3, 3, 1)
    assert max(numerical_ranks(uneven(3, 6, 4, gain=1.0, seed=0), 6)) == 4


def test_a_random_targets_logits_have_the_given_scale():
    target = ISAN.random(32, 6, 8, scale=0.7, seed=2)
    state = target.start
    logits = [state @ target.outputs[0]]
    for t in range(5):
        state = state @ target.transitions[t][t]
        logits.append(state @ target.outputs[t + 1])
    assert np.std(logits) == pytest.approx(0.7, rel=0.2)


def test_noisy_parity_is_uniform_bits_and_their_parity():
    target = noisy_parity(4, [0, 2, 3], flip=0.2)
    sequences = all_sequences(2, 5)
    right = sequences[:, 4] == sequences[:, [0, 2, 3]].sum(1) % 2
    np.testing.assert_allclose(
        np.exp(target.logprob(sequences)), np.where(right, 0.8, 0.2) / 16, rtol=1e-12
    )
    assert numerical_ranks(target, 5) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logprob([[0, 1, 2, 0, 0]]), "4 tokens, so .* at most 4, got 5"),
        (lambda m: m.log_probs([(0, 1, 2)], [(), (1,)]), "4 tokens, so .* at most 3, got 4"),
        (lambda m: m.logprob([[0, 3]]), "tokens must be from 0 to 2, got 3"),
        (lambda m: m.log_probs([(-1,)], [()]), "tokens must be from 0 to 2, got -1"),
        (lambda m: m.logprob([[0.5]]), "tokens must be integers, got float64"),
        (lambda m: m.logprob([0, 1]), r"sequences must be \[N, tokens\], got shape \[2\]"),
        (lambda m: m.sample(-1), "count must be a number of sequences, got -1"),
    ],
)
def test_tokens_that_do_not_fit_are_rejected(growing, call, message):
    with pytest.raises(ValueError, match=message):
        call(growing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ISAN([1.0], [], []), "outputs must hold one matrix for every time.*0 outputs"),
        (lambda: ISAN([1.0], [[[[1.0]]]], [[[0.0]]]), "1 outputs and 1 transitions"),
        (lambda: ISAN([1.0, 2.0], [], [[[0.0, 1.0]]]), r"start must be \[1\], got \[2\]"),
        (
            lambda: ISAN([1.0], [np.ones((2, 1, 2))], [np.ones((1, 2)), np.ones((1, 2))]),
            r"transitions\[0\] must be \[2, 1, 1\], got \[2, 1, 2\]",
        ),
        (
            lambda: ISAN([1.0], [np.ones((2, 1, 1))], [np.ones((1, 2)), np.ones((1, 3))]),
            r"outputs\[1\] must be \[d_1, 2\], got \[1, 3\]",
        ),
        (lambda: ISAN.random(4, 5, 0), "rank must be at least 1, got 0"),
        (lambda: noisy_parity(4, [4], flip=0.1), r"secret must hold bits from 0 to 3, got \[4\]"),
        (lambda: noisy_parity(4, [1], flip=0.0), "flip must be a probability.*got 0"),
    ],
)
def test_matrices_and_options_that_do_not_fit_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
