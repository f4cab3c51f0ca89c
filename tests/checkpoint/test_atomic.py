"""A save that is interrupted leaves the old checkpoint, the new one, or a clear error."""

import contextlib
import errno
import os

import pytest
import torch
import transformers
from checkpoint_cases import TENSORS, assert_rejects, assert_same, perturbed, plain, with_lora

import fastperturb


class Crash(BaseException):
    pass


def crash_at(monkeypatch, name, count, error=Crash):
    """Let the count-th call of os.`name` raise; the result tells whether it was reached."""
    real, calls = getattr(os, name), []

    def stand_in(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, stand_in)
    return lambda: len(calls) >= count


@pytest.mark.parametrize("kind", ["perturbation", "adapter", "base"])
@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_crash_anywhere_leaves_old_files_new_files_or_an_error(name, kind, tmp_path, monkeypatch):
    def base(seed):
        model = plain(frozen=kind != "base")
        torch.manual_seed(seed)
        if kind == "base":
            model.lm_head.reset_parameters()
        return with_lora(model) if kind == "adapter" else model

    old, new = perturbed(base(1)), perturbed(base(2), num_samples=4)
    with torch.no_grad():
        new.transform.U.add_(1.0)
    reached, outcomes, count = True, [], 0
    while reached:
        count += 1
        folder = tmp_path / f"{count}"
        old.save_pretrained(folder)
        with monkeypatch.context() as patched:
            crashed = crash_at(patched, name, count)
            with contextlib.suppress(Crash):
                new.save_pretrained(folder)
            reached = crashed()
        assert not list(folder.glob(".saving-*"))
        target = plain()
        if kind == "base":
            target = transformers.LlamaForCausalLM.from_pretrained(folder)
        try:
            loaded = fastperturb.load(target, folder)
        except (ValueError, FileNotFoundError) as error:
            assert "save" in str(error)
            outcomes.append("error")
            continue
        outcomes.append("old" if loaded.config == old.config else "new")
        assert_same(loaded, old if outcomes[-1] == "old" else new)
    assert outcomes[-1] == "new" and ("old" in outcomes or (name, kind) == ("replace", "base"))
    assert outcomes == sorted(outcomes, key=["old", "error", "new"].index)


def test_full_disk_leaves_the_old_files_and_raises(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    crash_at(monkeypatch, "fsync", 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="could not save to .*; what was there is as it was") as info:
        perturbed(transform="affine").save_pretrained(saved)
    assert info.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_failure_between_two_files_raises_and_their_mixture_is_rejected(saved, monkeypatch):
    with monkeypatch.context() as patched:
        crash_at(patched, "replace", 2, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match="could not replace every file of .*; save again"):
            perturbed(transform="affine").save_pretrained(saved)
    assert_rejects(plain(), saved, f"{TENSORS} ")
    perturbed(transform="affine").save_pretrained(saved)
    assert_same(fastperturb.load(plain(), saved), perturbed(transform="affine"))


def test_path_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        perturbed().save_pretrained(tmp_path / "file")
