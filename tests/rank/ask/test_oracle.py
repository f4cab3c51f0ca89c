"""Oracles of plain functions, and the counting of queries."""

import pytest
import torch

from fastperturb.rank import FunctionOracle, Metered, QueryBudgetSpent


def test_a_function_is_called_once_for_each_pair_and_its_answers_are_normalised():
    contexts = []

    def function(context):
        contexts.append(context)
        return [float(len(context)), 2.0 * sum(context), 7.0]

    log_probs = FunctionOracle(function, 3).log_probs([(), (1, 2)], [(), (0,)])
    assert contexts == [(), (0,), (1, 2), (1, 2, 0)]
    assert log_probs.shape == (2, 2, 3) and log_probs.dtype == torch.float64
    expected = torch.tensor([3.0, 6.0, 7.0]).double().log_softmax(0)
    torch.testing.assert_close(log_probs[1, 1], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"\[V\] = \[4\] logits, got \[3\] after \(1,\)"):
        FunctionOracle(function, 4).log_probs([(1,)], [()])


def test_a_meter_counts_distinct_contexts_and_asks_nothing_beyond_the_budget():
    contexts = []

    def function(context):
        contexts.append(context)
        return [0.0, 1.0]

    meter = Metered(FunctionOracle(function, 2), budget=7)
    meter.log_probs([(), (0,)], [(), (0,), (0, 1)])  # () + (0,) is (0,) + ()
    assert meter.queries == 5
    contexts.clear()
    with pytest.raises(QueryBudgetSpent, match="5 of 7 were asked, and the next step needs 3"):
        meter.log_probs([(1,)], [(), (0,), (1,)])
    assert not contexts and meter.queries == 5
    meter.log_probs([(1,)], [(), (0,)])
    assert meter.queries == 7
    with pytest.raises(ValueError, match="budget must be .*got -1"):
        Metered(meter, budget=-1)
