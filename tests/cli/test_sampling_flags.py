"""The flags of `fastperturb train` that say how samples are drawn."""

import pytest

from fastperturb import PerturbConfig
from fastperturb.cli import main as cli
from fastperturb.train import TrainOptions


def perturb_of(*flags):
    argv = ["--model", "m", "--data", "d", *flags]
    return cli.parse(TrainOptions, argv, prog="fastperturb train").perturb


@pytest.mark.parametrize(
    "flags, changes",
    [
        ("--perturb.sampling stratified --perturb.group-size 4", {"group_size": 4}),
        ("--perturb.sampling stratified", {}),
        ("--perturb.sampling antithetic", {"sampling": "antithetic"}),
        ("--perturb.antithetic", {"sampling": "antithetic"}),
        ("--perturb.antithetic True --perturb.latent-dim 3", {"antithetic": True, "latent_dim": 3}),
        ("--perturb.no-antithetic --perturb.latent-dim 3", {"antithetic": False, "latent_dim": 3}),
    ],
)
def test_flags_set_the_sampling_and_the_old_flag_does_too(flags, changes):
    wanted = {} if "antithetic" in changes else {"sampling": "stratified"}
    assert perturb_of(*flags.split()) == PerturbConfig(**wanted | changes)


def test_the_old_flag_wins_over_the_sampling_of_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    for text in ("antithetic: true", "sampling: antithetic"):
        file.write_text(f"{{model: m, data: [d], perturb: {{{text}}}}}")
        assert perturb_of("--config", str(file)).sampling == "antithetic"
        assert (
            perturb_of("--config", str(file), "--perturb.no-antithetic").sampling == "independent"
        )
