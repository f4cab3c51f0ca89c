"""The optimizer of a run: who has which learning rate and weight decay."""

import pytest
import tiny_run
from tiny_run import loop_of

from fastperturb.train import LoraOptions

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_transform_has_its_own_rate_and_vectors_do_not_decay(folder, tmp_path):
    options = tiny_run.options(
        folder, lora=LoraOptions(rank=0), output_dir=tmp_path, weight_decay=0.1, max_steps=1
    )
    groups = {group["name"]: group for group in loop_of(options).optimizer.param_groups}
    rates = {name: (g["initial_lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {"base": (1e-2, 0.1), "vectors": (1e-2, 0.0), "transform": (5e-2, 0.0)}
    assert all(parameter.ndim == 1 for parameter in groups["vectors"]["params"])
