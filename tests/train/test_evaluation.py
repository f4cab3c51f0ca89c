"""Evaluations while a run trains."""

import pytest
import tiny_run
from tiny_run import loop_of

from fastperturb import PerturbConfig
from fastperturb.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")


def test_ess_of_the_sequence_marginal_is_a_mean_over_sequences(folder, tmp_path):
    loop = loop_of(
        tiny_run.options(
            folder,
            output_dir=tmp_path,
            packing="stream",
            perturb=PerturbConfig(num_samples=4, latent_dim=4, marginal="sequence"),
            eval_data=(str(folder / "held_out.txt"),),
        )
    )
    assert 1 <= evaluate(loop.lm, loop.held_out, loop.options, loop.world)["ess"] <= 8
