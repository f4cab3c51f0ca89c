"""The same seed gives the same bits on CUDA, and deterministic algorithms raise nothing."""

import batches
import cuda_rules
import edit_cases
import pytest
import tiny
import torch

from fastperturb import estimators, ops
from fastperturb.config import ESTIMATORS, TRANSFORMS


def inputs():
    return batches.batch(left=2, unlabelled=2)


def model(**options):
    base = tiny.llama().train()
    return tiny.perturbed(base, **{"num_samples": 4, "latent_dim": 2, **options})


def step(lm, **call):
    lm(**{"seed": 5, **call}).loss.backward()


STEPS = {
    **{f"estimator {name}": {"estimator": name} for name in ESTIMATORS if name != "jvi"},
    **{f"transform {name}": {"transform": name} for name in TRANSFORMS},
    "context of the trunk": {"transform": "context", "context_source": "trunk"},
    "proposal": {"proposal": "gradient"},
    "proposal of sequences": {"proposal": "gradient", "scope": "sequence", "marginal": "sequence"},
    "mixture": {"estimator": {"iwae": 1.0, "quadratic": 0.5}},
    "chunked": {"plan": "chunked", "chunk_size": 2},
    "chunked quadratic": {"plan": "chunked", "chunk_size": 2, "estimator": "quadratic"},
    "auto": {"plan": "auto"},
    "resample": {"plan": "resample", "backward_samples": 2},
    "sequence marginal": {"marginal": "sequence", "estimator": "jvi_clip"},
    "sequence scope": {"scope": "sequence", "latent": "uniform"},
    "antithetic": {"antithetic": True, "latent": "rademacher"},
    "deterministic": {"deterministic": True},
    "min_scale": {"min_scale": 0.1},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_training_step_keeps_to_what_cuda_does_in_a_fixed_order(options):
    lm = model(**options)
    with cuda_rules.collected() as broken:
        step(lm, **inputs())
    assert not broken


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_proposal_for_packed_documents_keeps_to_it(scope):
    lm, call = model(proposal="gradient", scope=scope), inputs()
    del call["attention_mask"]
    call["position_ids"] = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5]).expand(3, -1)
    call["rows"] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]) + 2 * torch.arange(3)[:, None]
    with cuda_rules.collected() as broken:
        step(lm, **call)
    assert not broken


@pytest.mark.parametrize("options", [{}, {"marginal": "sequence", "estimator": "jvi_clip"}])
@pytest.mark.parametrize("kind", ["edits", "hybrid"])
def test_a_step_of_rates_that_learn_keeps_to_it(kind, options):
    rates = {"rate": 0.3, "learn_rates": True}
    lm = edit_cases.edited_lm(**rates, **options)
    if kind == "hybrid":
        lm = edit_cases.hybrid_lm(edits=rates, transform="context", **options)
    call = edit_cases.plain() if options else edit_cases.packed()
    with cuda_rules.collected() as broken:
        step(lm.train(), **call)
    assert not broken


@pytest.mark.parametrize("estimator", ["iwae", "resample", "sumo", "quadratic"])
def test_a_step_of_edits_keeps_to_it(estimator):
    lm = edit_cases.edited_lm(estimator=estimator).train()
    with cuda_rules.collected() as broken:
        step(lm, **edit_cases.packed())
    assert not broken


def score():
    lm = model().eval()
    owners = torch.tensor([0, 0, 1])[:, None].expand(3, 9)
    for call in (inputs(), {**inputs(), "rows": owners.contiguous()}):
        lm.score(**call, num_samples=8, seed=3, temperature=1.3)


def generate():
    prompt = batches.batch(right=0, left=3)
    del prompt["labels"]
    for mode in ("mixture", "sequence"):
        model().eval().generate(**prompt, mode=mode, max_new_tokens=3, seed=1)


def gradient_noise():
    model(plan="batched").gradient_noise(**inputs(), repeats=2, seed=1)


def standard_errors():
    lm = model(scope="sequence", latent_dim=1).eval()
    lm.base.requires_grad_(False)
    lm.standard_errors([inputs()], bread="outer", seed=1)


def resample():
    log_probs, mask = torch.randn(4, 3, 5, requires_grad=True), torch.ones(3, 5, dtype=torch.bool)
    value, _ = estimators.combine(log_probs, "resample", mask=mask, backward_samples=3)
    value.sum().backward()


def optimise():
    lm = model()
    optimizer = torch.optim.AdamW(lm.parameters())
    step(lm, **inputs())
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:the information about")  # of three rows
@pytest.mark.parametrize(
    "run", [optimise, score, generate, gradient_noise, standard_errors, resample]
)
def test_the_rest_of_the_library_keeps_to_it(run):
    with cuda_rules.collected() as broken:
        run()
    assert not broken


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("op", ["linear_logprob", "linear_quadratic"])
def test_heads_and_repeated_tokens_keep_to_it(op, frozen):
    hidden = torch.randn(*((3, 9, 8) if op == "linear_quadratic" else (9, 8)), requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=not frozen)
    target = torch.tensor([4, 4, -100, 4, 0, 30, 30, -100, 1])
    with cuda_rules.collected() as broken:
        getattr(ops, op)(hidden, weight, target, softcap=3.0).sum().backward()
    assert not broken


def test_the_rules_see_inside_our_ops_and_know_what_cuda_rejects():
    values, index = torch.ones(6), torch.tensor([0, 1, 1, 2, 2, 2])
    with cuda_rules.collected() as broken:
        values.cumsum(0), index.cumsum(0)
        index.bincount(values)
        torch.zeros(3).index_add_(0, index, values)
        torch.zeros(3).index_add_(0, index[[0, 1, 3]], values[:3])
        torch.zeros(3).scatter_add_(0, index, values)
        values.kthvalue(2)
    assert broken == [
        "cumsum raises",
        "bincount raises",
        "index_add_ adds by atomics",
        "scatter_add_ adds by atomics",
        "kthvalue raises",
    ]
