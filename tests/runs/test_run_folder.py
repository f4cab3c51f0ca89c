"""Run folders and their JSON files."""

import json
import os
import stat
from pathlib import Path

import pytest

from fastperturb import runs


def test_a_new_output_dir_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = runs.open_output_dir(tmp_path / "a" / "b", overwrite=False)
    assert folder.is_dir()
    assert runs.open_output_dir(folder, overwrite=False) == folder


def test_a_folder_with_files_raises_an_error_that_names_overwrite(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(FileExistsError, match=f"{tmp_path}.*--overwrite"):
        runs.open_output_dir(tmp_path, overwrite=False)


def test_overwriting_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    runs.open_output_dir(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        runs.open_output_dir(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("payload", [{"kl": float("nan")}, {"path": Path("x")}])
def test_a_payload_that_is_not_json_leaves_the_old_file_whole(
    tmp_path: Path, payload: dict
) -> None:
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
