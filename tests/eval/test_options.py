"""The options of evaluations."""

from pathlib import Path

import pytest
from eval_cases import options_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "models must have at least one entry"),
        ({"models": ("a=x", "a=y")}, "models has the name 'a' twice"),
        ({"domains": ("=x",)}, "domains must be NAME=WHERE, got '=x'"),
        ({"baseline": "b"}, r"baseline must be one of \['learned', 'plain'\], got 'b'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"temperatures": (1.0, 0.0)}, "temperatures must be numbers above 0"),
        ({"continuations": -1}, "continuations must be 0 or above"),
        ({"mauve_features": Path("x")}, "mauve_features needs continuations"),
        ({"mauve_features": Path("x"), "continuations": 2}, "x is not the folder of a model"),
        ({"max_documents": 0}, "max_documents must be at least 1"),
    ],
)
def test_options_out_of_range_are_rejected(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        options_of(folder, tmp_path, **changes)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "mauve",
            r"mauve_features needs the package mauve-text: pip install 'fastperturb\[mauve\]'",
        ),
        ("rouge_score", r"continuations needs the package rouge-score"),
        ("scipy", r"tune_on needs the package scipy: pip install 'fastperturb\[eval\]'"),
    ],
)
def test_a_missing_package_is_reported_before_anything_is_read(
    package, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "fastperturb.eval.options.find_spec",
        lambda name: None if name == package else object(),
    )
    with pytest.raises(ValueError, match=message):
        options_of(
            folder, tmp_path, continuations=1, mauve_features=folder / "base", tune_on="nowhere"
        )
