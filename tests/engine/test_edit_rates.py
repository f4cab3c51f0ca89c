"""Rates of edits that learn; test_hybrid_enumerated.py has their gradients by enumeration."""

import pytest
import torch
from edit_cases import LAYOUTS, base_model, edited_lm, hybrid_lm
from oracles import assert_same_gradients, loss_and_gradients

import fastperturb
from fastperturb import EditConfig, PerturbConfig, wrap
from fastperturb.engine.edit_layout import KINDS


def learning(kind=edited_lm, **options):
    """Return a model of edits, or of edits and noise, whose rates learn."""
    if kind is edited_lm:
        return edited_lm(rate=0.3, learn_rates=True, **options)
    return hybrid_lm(edits={"rate": 0.3, "learn_rates": True}, **options)


def edits_of(lm):
    return getattr(lm.transform, "edits", lm.transform)


@pytest.mark.parametrize("kind", [edited_lm, hybrid_lm])
def test_rates_start_at_the_rate_and_draw_its_edits(kind):
    lm = learning(kind)
    rates = edits_of(lm).rates()
    torch.testing.assert_close(rates, torch.full((4,), 0.3 / 4).double(), rtol=1e-6, atol=0)
    fixed = edited_lm(rate=0.3) if kind is edited_lm else hybrid_lm(edits={"rate": 0.3})
    if kind is hybrid_lm:
        fixed.transform.load_state_dict(lm.transform.state_dict(), strict=False)
    for layout in LAYOUTS:
        ours, theirs = (model(**layout(), seed=5).log_probs for model in (lm, fixed))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [edited_lm, hybrid_lm])
@pytest.mark.parametrize("estimator", ["iwae", "jvi_clip", "sumo", "mlmc"])
def test_every_chunking_has_the_gradient_of_all_samples_at_once(kind, estimator):
    for layout in LAYOUTS:
        results = []
        for plan in ({"plan": "batched"}, {"plan": "chunked", "chunk_size": 1}):
            lm = learning(kind, estimator=estimator, **plan)
            results.append(loss_and_gradients(lm, layout()))
        (one, ones), (two, twos) = results
        torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-6)
        assert any(name.endswith("rate_logits") for name in ones)
        assert_same_gradients(list(twos.values()), list(ones.values()), rel=1e-4, floor=1e-6)


def test_places_whose_action_is_free_have_a_score():
    lm = learning(kinds=("swap", "replace"))
    edits, ids = lm.transform, LAYOUTS[0]()["input_ids"]
    rows = torch.arange(len(ids))
    layout = {"rows": rows, "positions": None, "editable": None}
    drawn = edits(
        lm.base.get_input_embeddings().weight,
        *(ids, torch.tensor(5), torch.arange(64)),
        **layout,
        attention_mask=None,
        position_ids=None,
    ).drawn
    swapped = drawn.action == KINDS.index("swap")
    second = torch.nn.functional.pad(swapped[..., :-1], (1, 0))
    assert second.any() and torch.equal(drawn.free, ~edits.special[ids] & ~second)
    # log q in the simplest words: a factor for each free place.
    rates = edits.rates()
    swap, replace = rates
    first = torch.arange(ids.shape[1]) == 0
    log_q = torch.where(first, (1 - replace).log(), (1 - replace - swap).log())
    log_q = torch.where(drawn.action == KINDS.index("replace"), replace.log(), log_q)
    log_q = torch.where(swapped, swap.log(), log_q)
    expected = torch.autograd.grad((log_q * drawn.free).sum(), edits.rate_logits)
    assert torch.equal(edits.score(drawn), torch.zeros_like(log_q))
    ours = torch.autograd.grad(edits.score(drawn).sum(), edits.rate_logits)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_samples_that_weigh_alike_leave_the_rates_where_they_are(marginal):
    lm = learning(marginal=marginal)
    with torch.no_grad():
        lm.base.lm_head.weight.zero_()
    for layout in LAYOUTS[:3]:
        lm.zero_grad()
        lm(**layout(), seed=5).loss.backward()
        assert lm.transform.rate_logits.grad.abs().max() < 1e-6


def test_edits_that_hurt_become_rare_and_limits_hold():
    lm = learning(rate_limits=(0.05, 0.6), kinds=("replace", "insert"), num_samples=16)
    ids = torch.arange(3, 23).repeat(8, 1)  # always the same text
    base = [value for value in lm.base.parameters()]
    optimizer = torch.optim.Adam([{"params": base}, {"params": lm.transform.parameters()}], lr=0.03)
    for step in range(60):
        optimizer.zero_grad()
        lm(ids, labels=ids, seed=step).loss.backward()
        optimizer.step()
    assert 0.05 < lm.transform.rates().sum() < 0.29
    with torch.no_grad():
        lm.transform.rate_logits.fill_(50.0)
        assert lm.transform.rates().sum().item() == pytest.approx(0.6)
        lm.transform.rate_logits.fill_(-50.0)
        assert lm.transform.rates().sum().item() == pytest.approx(0.05)


@pytest.mark.parametrize("kind", [edited_lm, hybrid_lm])
def test_learned_rates_are_saved(kind, tmp_path):
    lm = learning(kind).eval()
    with torch.no_grad():
        edits_of(lm).rate_logits.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    lm.save_pretrained(tmp_path)
    loaded = fastperturb.load(base_model(), tmp_path).eval()
    assert loaded.config == lm.config
    assert torch.equal(edits_of(loaded).rates(), edits_of(lm).rates())
    ids = LAYOUTS[0]()["input_ids"]
    assert torch.equal(loaded.score(ids, seed=5).nll, lm.score(ids, seed=5).nll)


def test_fixed_rates_have_no_parameter():
    assert not list(edited_lm().transform.parameters())
    assert [name for name, _ in hybrid_lm().transform.named_parameters()] == ["U"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "needs a rate between rate_limits"),
        ({"rate": 0.7}, "needs a rate between rate_limits"),
        ({"rate_limits": (0.5, 0.2)}, "two rising numbers between 0 and 1"),
        ({"rate_limits": (0.1, 1.5)}, "two rising numbers between 0 and 1"),
        ({"estimator": "jensen"}, "has no estimator='jensen'"),
        ({"estimator": {"iwae": 1.0, "quadratic": 0.1}}, "has no estimator='quadratic'"),
    ],
)
def test_rates_that_cannot_learn_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EditConfig(**{"rate": 0.1, "learn_rates": True} | options)


def test_a_hybrid_names_an_estimator_under_which_rates_cannot_learn():
    with pytest.raises(ValueError, match="has no estimator='jensen'"):
        wrap(base_model(), PerturbConfig(estimator="jensen"), edits=EditConfig(learn_rates=True))
