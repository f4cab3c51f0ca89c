"""Fixtures of the data tests."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import letters
import pytest
from transformers import PreTrainedTokenizerFast

from fastperturb.data import sources


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return letters.make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document or two are read at a time, as thousands are of real data."""
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 6)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in letters.TEXTS))
    return str(path)
