"""The Hugging Face Hub: pushing, loading back, and what comes before it."""

import os
from pathlib import Path

import huggingface_hub
from checkpoint_cases import assert_rejects, assert_same, perturbed, plain, with_lora

import fastperturb


def test_checkpoint_is_pushed_to_the_hub_and_loaded_back(tmp_path, monkeypatch):
    lm, uploads = perturbed(with_lora(plain())), []

    def upload(*, folder_path, **options):
        os.rename(folder_path, tmp_path / "hub")
        os.mkdir(folder_path)
        uploads.append(options)
        return "commit"

    def create(repo_id, **options):
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def download(repo_id, *, revision, token, allow_patterns):
        assert (repo_id, revision) == ("me/mine", "v1")
        assert set(allow_patterns) >= {path.name for path in (tmp_path / "hub").iterdir()}
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert lm.push_to_hub("mine", private=True, create_pr=True) == "commit"
    assert uploads[0]["repo_id"] == "me/mine" and uploads[0]["create_pr"]
    assert_same(fastperturb.load(plain(), "me/mine", revision="v1"), lm)


def test_error_without_a_network_says_how_to_download(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_rejects(plain(), "me/mine", "no connection.*hf download me/mine", FileNotFoundError)
    for folder in ("a/b/c", tmp_path / "none", "../none", "/none"):
        assert_rejects(plain(), folder, "there is no folder .* to load from", FileNotFoundError)


def test_local_folder_comes_before_the_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    folder = str(saved.relative_to(Path.cwd()))
    assert folder.count("/") == 1
    assert_same(fastperturb.load(plain(), folder), perturbed())
