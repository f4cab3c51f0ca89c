"""Next-token distributions along continuations of a history."""

import torch
from rank_cases import small_isan

from fastperturb.rank.ask import distributions_along, mean_kl, sample_continuations


def test_continuations_are_sampled_from_the_oracle():
    oracle = small_isan(vocab_size=4)
    generator = torch.Generator().manual_seed(0)
    tokens = sample_continuations(oracle, (0, 1), 2, 20_000, generator)
    frequencies = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16) / len(tokens)
    first = oracle.log_probs([(0, 1)], [()])[0, 0]
    second = oracle.log_probs([(0, 1)], [(token,) for token in range(4)])[0]
    expected = (first[:, None] + second).exp().flatten()
    torch.testing.assert_close(frequencies.double(), expected, atol=0.015, rtol=0)  # 4 sd


def test_distributions_along_continuations_are_those_before_each_token():
    oracle, tokens = small_isan(), torch.tensor([[4, 5, 0], [4, 1, 2]])
    log_probs = distributions_along(oracle, (2, 3), tokens)
    for row, continuation in enumerate(tokens.tolist()):
        for step in range(3):
            expected = oracle.log_probs([(2, 3)], [tuple(continuation[:step])])[0, 0]
            torch.testing.assert_close(log_probs[row, step], expected, rtol=0, atol=1e-12)


def test_mean_kl_averages_over_continuations_and_keeps_steps():
    truth, other = torch.randn(2, 5, 3, 7).log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, truth, log_target=True, reduction="none")
    torch.testing.assert_close(
        torch.from_numpy(mean_kl(truth, other)).float(), expected.sum(-1).mean(0)
    )
