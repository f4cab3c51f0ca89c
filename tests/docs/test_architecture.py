"""The architecture page names the files that a call really goes through."""

import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

from docs import diagrams
from fastperturb import PerturbConfig, wrap

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def named_files(text: str) -> set[str]:
    return set(re.findall(r"`((?:model|engine|ops)/\w+\.py)`", text))


def files_of_a_call() -> list[str]:
    """The files of model/ and engine/ whose functions a batched call runs, in order."""
    lm = wrap(tiny.llama(), PerturbConfig(num_samples=2, plan="batched"))
    ids = torch.arange(3, 11)[None]
    package = str(ROOT / "fastperturb")
    files: dict[str, None] = {}

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            name = Path(frame.f_code.co_filename).relative_to(package).as_posix()
            if name.startswith(("model/", "engine/")):
                files[name] = None

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        lm(input_ids=ids, labels=ids)
    finally:
        sys.setprofile(before)
    return list(files)


def test_the_page_lists_the_files_of_a_call_and_no_others():
    section = PAGE.partition("## A call, file by file")[2].partition("\n## ")[0]
    listed = {name for name in named_files(section) if not name.startswith("ops/")}
    elsewhere = {"engine/edits.py", "engine/labelled.py"}  # for edits, and on a GPU
    assert listed - elsewhere == set(files_of_a_call())


@pytest.mark.parametrize("stage", diagrams.STAGES, ids=lambda stage: stage[1])
def test_each_stage_of_the_diagram_names_a_file_of_the_call(stage):
    assert stage[3] in files_of_a_call()


def test_every_file_that_the_page_names_exists():
    for name in named_files(PAGE):
        assert (ROOT / "fastperturb" / name).is_file(), name
