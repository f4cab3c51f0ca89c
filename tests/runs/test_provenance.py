"""Versions, device and commit of a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastperturb import runs


def test_provenance_holds_the_versions_in_use_and_fits_json() -> None:
    provenance = runs.provenance()
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["python"] == sys.version.split()[0]
    assert json.loads(json.dumps(provenance)) == provenance


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with nothing but `runs` in its package, committed."""
    package = tmp_path / "fastperturb"
    package.mkdir()
    (package / "__init__.py").touch()
    source = Path(runs.__file__).parents[1]
    shutil.copytree(source / "runs", package / "runs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "version.py", package)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    git(tmp_path, *author, "commit", "--quiet", "-m", "all")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_seen_from(folder: Path) -> str:
    code = "from fastperturb import runs; print(runs.commit())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_dirty_when_files_differ(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit_seen_from(checkout) == head
    (checkout / "fastperturb" / "version.py").write_text("__version__ = '0.0.0'\n")
    assert commit_seen_from(checkout) == f"{head}-dirty"


def test_a_package_inside_somebody_elses_repository_has_no_commit(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    (checkout / "fastperturb").rename(checkout / "site-packages" / "fastperturb")
    assert commit_seen_from(checkout / "site-packages") == "None"


def test_without_git_there_is_no_commit_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert runs.commit() is None
