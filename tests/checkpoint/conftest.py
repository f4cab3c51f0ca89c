"""A checkpoint that the tests of a folder's files begin with."""

import pytest
from checkpoint_cases import perturbed


@pytest.fixture
def saved(tmp_path):
    """Save a perturbed model without an adapter and give its folder."""
    perturbed().save_pretrained(tmp_path)
    return tmp_path
