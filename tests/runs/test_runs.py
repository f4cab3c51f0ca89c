"""Run folders, their JSON files and where their numbers came from."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastperturb import runs


def test_a_new_output_dir_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = runs.open_output_dir(tmp_path / "a" / "b", overwrite=False)
    assert folder.is_dir()
    assert runs.open_output_dir(folder, overwrite=False) == folder


def test_a_folder_with_files_is_refused_and_the_error_names_overwrite(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(FileExistsError, match=f"{tmp_path}.*--overwrite"):
        runs.open_output_dir(tmp_path, overwrite=False)


def test_overwriting_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    runs.open_output_dir(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_never_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        runs.open_output_dir(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("payload", [{"kl": float("nan")}, {"path": Path("x")}])
def test_what_json_cannot_hold_leaves_the_old_file_whole(tmp_path: Path, payload: dict) -> None:
    file = tmp_path / "results.json"
    runs.write_json(file, {"rows": [1, 2]})
    with pytest.raises((ValueError, TypeError)):
        runs.write_json(file, payload)
    assert json.loads(file.read_text()) == {"rows": [1, 2]}
    assert os.listdir(tmp_path) == ["results.json"]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    runs.write_json(file, "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.write_json(file, "new")
    assert json.loads(file.read_text()) == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_json_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    runs.write_json(tmp_path / "results.json", {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "results.json")}
    assert len(modes) == 1


def test_provenance_tells_the_versions_in_use_and_fits_json() -> None:
    told = runs.provenance()
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["python"] == sys.version.split()[0]
    assert json.loads(json.dumps(told)) == told


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


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit_seen_from(checkout) == head
    (checkout / "fastperturb" / "version.py").write_text("__version__ = '0.0.0'\n")
    assert commit_seen_from(checkout) == f"{head}-dirty"


def test_a_package_inside_somebody_elses_repository_has_no_commit(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    (checkout / "fastperturb").rename(checkout / "site-packages" / "fastperturb")
    assert commit_seen_from(checkout / "site-packages") == "None"


def test_no_git_means_no_commit_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert runs.commit() is None
