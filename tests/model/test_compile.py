"""torch.compile of the wrapper: one graph serves all steps, whatever their seeds."""

import dataclasses
import logging

import oracles
import pytest
import torch
from batches import batch
from tiny import llama, perturbed
from torch._dynamo.utils import counters

import fastperturb
from fastperturb import EditConfig, PerturbConfig

STEPS = 14
slow = pytest.mark.slow
pytestmark = [
    # Warnings about the compiler's own code.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def only_once():
    """Forget what was compiled, and raise where anything is compiled a second time."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def seeds():
    """Return a seed for each step: numbers, tensors and none."""
    kinds = (lambda step: 17 * step + 2**62, lambda step: torch.tensor(step - 5), lambda step: None)
    return [kinds[step % 3](step) for step in range(STEPS)]


def train(lm, inputs):
    """Run steps forward and backward, the last with the seed of `oracles`; return its results."""
    trained = [value for value in lm.parameters() if value.requires_grad]
    for step, seed in enumerate(seeds()):
        out = lm(**inputs, seed=seed, num_items_in_batch=20 + step)
        torch.autograd.grad(out.loss, trained)
    return oracles.loss_and_gradients(lm, inputs)


def assert_compiles_once(lm, caplog):
    inputs = batch()
    expected, gradients = oracles.loss_and_gradients(lm, inputs)
    lm.compile(backend="aot_eager")
    out, ours = train(lm.train(), inputs)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    torch.testing.assert_close(out.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "plan",
    [
        "batched",
        "chunked",
        pytest.param("auto", marks=slow),
        pytest.param("resample", marks=slow),
    ],
)
def test_a_compiled_wrapper_compiles_nothing_after_its_first_step(plan, only_once, caplog):
    options = {"chunk_size": 2} if plan == "chunked" else {}
    lm = perturbed(llama(), num_samples=4, latent_dim=4, plan=plan, **options)
    assert_compiles_once(lm, caplog)
    if plan == "batched":
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("source", ["embedding", pytest.param("trunk", marks=slow)])
def test_a_context_is_computed_beside_the_compiled_part(source, only_once, caplog):
    options = {"transform": "context", "context_source": source}
    lm = perturbed(llama(), num_samples=4, latent_dim=4, plan="batched", **options)
    assert_compiles_once(lm, caplog)


@slow
@pytest.mark.parametrize("noise", [None, PerturbConfig(latent_dim=4)], ids=["edits", "hybrid"])
def test_compiled_edits_compile_nothing_more_while_no_sample_grows(only_once, caplog, noise):
    estimation = {"num_samples": 4, "plan": "batched"}
    config = EditConfig(rate=0.5, kinds=("replace", "swap"), **estimation)
    if noise is None:
        lm = fastperturb.edit(llama(), config)
    else:
        lm = fastperturb.wrap(llama(), dataclasses.replace(noise, **estimation), edits=config)
    assert_compiles_once(lm, caplog)


def test_a_wrapper_within_a_compiled_function_takes_seeds_that_are_tensors(only_once):
    lm, inputs = perturbed(llama(), num_samples=2, latent_dim=4, plan="batched"), batch()

    @torch.compile(backend="eager")
    def loss(seed):
        return 2 * lm(**inputs, seed=seed).loss

    for seed in range(STEPS):
        expected = 2 * lm(**inputs, seed=seed).loss
        torch.testing.assert_close(loss(torch.tensor(seed)), expected)


@slow
def test_the_levels_of_mlmc_compile_to_whole_graphs_with_the_loss_of_each_row(caplog):
    torch._dynamo.reset()
    counters.clear()
    inputs = batch(6)
    lm = perturbed(llama(), num_samples=8, latent_dim=4, estimator="mlmc", plan="batched")
    expected = [lm(**inputs, seed=seed).loss.item() for seed in range(2 * STEPS)]
    lm.compile(backend="aot_eager")
    losses = [lm(**inputs, seed=seed).loss.item() for seed in range(2 * STEPS)]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not counters["graph_break"]
    # Such as one of too many graphs.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    torch._dynamo.reset()
