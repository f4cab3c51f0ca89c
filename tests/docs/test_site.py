"""The site builds without a warning, and needs nothing from another site."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
pytest.importorskip("material", reason="needs the extra `docs`")
pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_page_fetches_nothing_from_another_site(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?(https?:[^\"\s>]+)", text)
        fetched += re.findall(
            r"<link[^>]+rel=\"?stylesheet\"?[^>]+href=\"?(https?:[^\"\s>]+)", text
        )
        assert not fetched, page
        assert "fonts.googleapis" not in text and 'data-md-component="source"' not in text


@pytest.mark.slow
def test_the_search_index_knows_pages_options_and_names_of_the_api(site):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for word in (
        "min_scale",
        "linear_quadratic",
        "PerturbTrainer",
        "the perturbation has collapsed",
    ):
        assert word in index


@pytest.mark.slow
def test_pictures_of_results_are_copied_and_no_script_is(site):
    assert (site / "bench" / "results" / "demo" / "extrapolation.png").is_file()
    assert not list(site.rglob("*.py"))
