"""Options about data are checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from letters import options_of


@pytest.mark.parametrize(
    "changes",
    [
        {"data": ()},
        {"block_size": 1},
        {"shuffle_buffer": 0},
        {"max_tokens": 1},
        {"document_separator": ""},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_invalid_option_is_named_in_the_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(options_of("a.txt"), **changes)
