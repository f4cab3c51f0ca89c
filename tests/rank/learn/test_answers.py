"""Answers of an oracle that are asked for only once."""

import pytest
import torch

from bench.ranks.targets import Recording
from fastperturb.rank import ISAN
from fastperturb.rank.learn.answers import Answers


def test_answers_of_the_wrong_shape_are_rejected():
    class Wrong:
        vocab_size = 3

        def log_probs(self, histories, futures):
            return torch.zeros(len(futures), len(histories), 3)

    with pytest.raises(ValueError, match=r"\[H, F, V\] = \[1, 2, 3\], got \[2, 1, 3\]"):
        Answers(Wrong()).of([()], [(0,), (1,)])


def test_only_unknown_contexts_are_asked_in_the_fewest_grids():
    calls = []

    class Watched(Recording):
        def log_probs(self, histories, futures):
            calls.append((tuple(histories), tuple(futures)))
            return super().log_probs(histories, futures)

    answers = Answers(Watched(ISAN.random(3, 4, 2)))
    answers.of([(0,), (1,)], [(), (2,)])
    answers.of([(0,), (1,), (2,)], [(), (2,), (1,)])
    assert calls == [
        (((0,), (1,)), ((), (2,))),
        (((0,), (1,)), ((1,),)),
        (((2,),), ((), (2,), (1,))),
    ]
