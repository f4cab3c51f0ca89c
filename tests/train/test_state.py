"""Checkpoints of a run: whole or absent after kills and full disks; read only if undamaged."""

import ctypes
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from fastperturb.train import state

STATE, TENSORS, MODEL = "training_state.json", "training_state.safetensors", "model.bin"
SIZES = {"weight": 20_000, "moment": 20_000, "steps": 1}


def tensors_of(step):
    return {name: torch.arange(size) + step for name, size in SIZES.items()}


def save(folder, step, *, keep=2, write_model=None, **options):
    def write(staging):
        (staging / MODEL).write_bytes(b"%d" % step * 10_000)

    return state.save(
        folder,
        step,
        tensors=tensors_of(step),
        values={"step": step, "order": [3, 1, step]},
        write_model=write_model or write,
        keep=keep,
        **options,
    )


def assert_whole(saved, step=None):
    """Everything in a checkpoint is of its step."""
    assert step is None or saved.step == step
    assert saved.values == {"step": saved.step, "order": [3, 1, saved.step]}
    tensors = saved.tensors()
    assert tensors.keys() == SIZES.keys()
    assert all(torch.equal(tensors[name], t) for name, t in tensors_of(saved.step).items())
    assert (saved.path / MODEL).read_bytes() == b"%d" % saved.step * 10_000


def latest_step(folder):
    """The step of the latest checkpoint, after a check that all visible ones are whole."""
    for path in folder.glob("step-*"):
        assert_whole(state.read(path))
    saved = state.latest(folder)
    assert_whole(saved)
    return saved.step


def bytes_of(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Saving and reading back


def test_saved_tensors_and_values_read_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    every_bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    tensors = {
        "bf16": every_bf16,  # nan and inf among them
        "fp64": torch.randn(3, 4, dtype=torch.float64).T,
        "scalar": torch.tensor(7.0),
        "rng": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(5)),
    }
    values = {"rate": 0.1 + 0.2, "big": 2**63, "best": None, "nested": {"order": [1, 2.5, "x"]}}
    path = state.save(
        tmp_path / "new" / "checkpoints",
        120,
        tensors=tensors,
        values=values,
        write_model=lambda folder: (folder / MODEL).write_bytes(b"x"),
        keep=1,
    )
    assert path == tmp_path / "new" / "checkpoints" / "step-00000120"
    assert names(path) == sorted([MODEL, STATE, TENSORS])
    saved = state.latest(path.parent)
    assert (saved.path, saved.step, saved.values) == (path, 120, values)
    loaded = saved.tensors()
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert torch.equal(bytes_of(loaded[name]), bytes_of(value))


def test_the_files_of_a_checkpoint_have_the_permissions_of_any_new_file(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in [*path.iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1


def test_a_save_keeps_the_newest_and_the_protected_checkpoints(tmp_path):
    for step in (10, 20, 30, 40, 100_000_000):
        save(tmp_path, step, keep=2, protect={20})
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-100000000"]
    assert_whole(state.latest(tmp_path), 100_000_000)


def test_a_save_deletes_checkpoints_of_later_steps(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    assert_whole(state.latest(tmp_path), 15)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "step-00000010" / MODEL).write_bytes(b"damaged")
    save(tmp_path, 10)
    assert_whole(state.latest(tmp_path), 10)
    assert names(tmp_path) == ["step-00000010"]


def test_latest_of_a_folder_without_checkpoints_is_none(tmp_path):
    (tmp_path / "step-later").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert state.latest(tmp_path) is None
    assert state.latest(tmp_path / "missing") is None


def test_values_that_json_would_change_raise_before_anything_is_written(tmp_path):
    for values in ({"a": float("inf")}, {"a": (1, 2)}, {1: 2}, {"a": Path("x")}):
        with pytest.raises(ValueError, match="values must"):
            state.save(
                tmp_path, 1, tensors={}, values=values, write_model=lambda folder: None, keep=1
            )
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, 1, keep=0)
    assert names(tmp_path) == []


def test_a_model_written_into_subfolders_raises_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="must write plain files, and 'sub' is not one"):
        save(tmp_path, 2, write_model=lambda folder: (folder / "sub").mkdir())
    assert names(tmp_path) == ["step-00000001"]


# Killed


@functools.cache
def forking():
    """Processes that start in milliseconds, with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(function, *arguments):
    process = forking().Process(target=function, args=arguments)
    process.start()
    return process


def die_at(count, folder, step):
    """Save, and be killed at the count-th file operation in the folder."""
    left = count

    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
            left -= str(arguments[0]).startswith(str(folder))
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(folder, step, keep=1)


@pytest.mark.parametrize("again", [False, True], ids=["next_step", "same_step"])
def test_a_save_killed_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, again):
    save(tmp_path / "before", 1)
    steps, codes = [], []
    while 0 not in codes:
        folder = tmp_path / f"{len(codes)}"
        shutil.copytree(tmp_path / "before", folder)
        process = start(die_at, len(codes) + 1, folder, 1 if again else 2)
        process.join()
        codes.append(process.exitcode)
        steps.append(latest_step(folder))
    assert len(codes) > 15 and set(codes) == {-signal.SIGKILL, 0}
    assert steps == sorted(steps) and steps[-1] == (1 if again else 2)


def test_a_save_deletes_the_remains_of_killed_ones(tmp_path):
    save(tmp_path, 1)
    for name in (".saving-step-00000002", ".old-step-00000000"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def save_for_ever(folder):
    step = 0
    while True:
        step += 1
        save(folder, step)


def test_a_save_killed_at_a_random_moment_leaves_a_whole_latest_checkpoint(tmp_path):
    generator, in_the_middle = random.Random(0), 0
    for trial in range(25):
        folder = tmp_path / f"{trial}"
        process = start(save_for_ever, folder)
        while not (folder / "step-00000001").exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.06))
        process.kill()
        process.join()
        in_the_middle += any(name.startswith(".") for name in names(folder))
        assert latest_step(folder) >= 1
    assert in_the_middle > 0


# The disk


def in_process(function, *arguments):
    """Run a function in another process; fail or skip here as it does there."""
    receiver, sender = forking().Pipe(duplex=False)
    process = start(call, sender, function, *arguments)
    sender.close()
    verdict = receiver.recv()
    process.join()
    if verdict is not None:
        kind, text = verdict
        pytest.skip(text) if kind == "skip" else pytest.fail(text)


def call(sender, function, *arguments):
    try:
        function(*arguments)
    except pytest.skip.Exception as reason:
        sender.send(("skip", str(reason)))
    except BaseException:
        sender.send(("fail", traceback.format_exc()))
    else:
        sender.send(None)


def mount_small(folder):
    """Mount a tiny disk that only this process sees."""
    clone_newns = 0x00020000
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(clone_newns) != 0:
        pytest.skip("no right to make a mount namespace")
    mount(folder, "--make-rprivate", "/")
    mount(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))


def mount(folder, *arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not possible: {done.stderr}")


def assert_save_fails(folder, step, *codes, **options):
    before = tensors_of(step)
    listing = names(folder)
    with pytest.raises(OSError) as info:
        save(folder, step, **options)
    text = str(info.value)
    assert f"step-{step:08d}" in text and "free space" in text
    assert f"{folder / 'step-00000001'} is whole" in text
    assert any(code in text for code in codes), text
    assert names(folder) == listing
    assert_whole(state.latest(folder), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(step).items())


def fill_disk(folder):
    mount_small(folder)
    save(folder, 1, keep=5)  # takes a third of it
    save(folder, 2, keep=1)
    save(folder, 1, keep=1)
    (folder / "other").write_bytes(b"x" * 500_000)
    assert_save_fails(folder, 2, "No space left on device")

    def large(staging):
        (staging / MODEL).write_bytes(b"x" * 2_000_000)

    assert_save_fails(folder, 3, "No space left on device", write_model=large)
    (folder / "other").unlink()
    save(folder, 2, keep=1)  # the run went on, and there is room again
    assert_whole(state.latest(folder), 2)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_next_save_works(tmp_path):
    in_process(fill_disk, tmp_path)


def write_to_read_only_disk(folder):
    mount_small(folder)
    save(folder, 1)
    mount(folder, "-o", "remount,ro", str(folder))
    assert_save_fails(folder, 2, "Read-only file system")


def test_a_read_only_disk_leaves_the_last_checkpoint(tmp_path):
    in_process(write_to_read_only_disk, tmp_path)


def outgrow_the_limit(folder):
    save(folder, 1)
    limit = (folder / "step-00000001" / TENSORS).stat().st_size - 1
    # Python ignores SIGXFSZ, so that a write beyond the limit is an error.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert_save_fails(folder, 2, "File too large")


def test_a_file_that_outgrows_its_limit_leaves_the_last_checkpoint(tmp_path):
    in_process(outgrow_the_limit, tmp_path)


def test_a_file_in_place_of_the_folder_is_named_in_the_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="checkpoints.*there is no older one.*name a folder") as info:
        save(tmp_path / "checkpoints", 1)
    assert info.value.errno == errno.EEXIST


def test_a_failing_flush_is_a_failed_save(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    assert_save_fails(tmp_path, 2, "Input/output error")


# Damaged checkpoints


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2, the newer one to be damaged."""
    save(tmp_path, 1)
    return save(tmp_path, 2)


def assert_rejected(path, match):
    """`read` raises, and `latest` goes back a step with a warning that names the path."""
    with pytest.raises(ValueError, match=match) as info:
        state.read(path)
    assert str(path) in str(info.value)
    with pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: .*{match}"):
        saved = state.latest(path.parent)
    assert_whole(saved, 1)


def sign(path, **changes):
    """A manifest whose digests agree, as somebody with intent would write it."""
    values = {**json.loads((path / STATE).read_text()), **changes}
    del values["sha256"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / STATE).write_text(json.dumps(values))


@pytest.mark.parametrize("name", [TENSORS, MODEL])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""],
    ids=["cut", "longer", "one_bit", "empty"],
)
def test_a_changed_file_is_rejected(two, name, damage):
    (two / name).write_bytes(damage((two / name).read_bytes()))
    assert_rejected(
        two, f"{name} was changed after it was saved, or is cut; copy the whole folder again"
    )


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda b: b[: len(b) // 2], "truncated, damaged or no JSON"),
        (lambda b: b"", "truncated, damaged or no JSON"),
        (lambda b: b"[" * 100_000, "truncated, damaged or no JSON"),
        (lambda b: b"[1]", "must hold a JSON object"),
        (lambda b: b"{}", "has format None: it is not fastperturb's"),
        (lambda b: b.replace(b'"step": 2', b'"step": 3'), "was changed after it was saved"),
    ],
    ids=["cut", "empty", "deep", "list", "nothing", "step"],
)
def test_a_changed_manifest_is_rejected(two, damage, match):
    (two / STATE).write_bytes(damage((two / STATE).read_bytes()))
    assert_rejected(two, match)


@pytest.mark.parametrize("name", [TENSORS, MODEL, STATE])
def test_a_missing_file_is_rejected(two, name):
    (two / name).unlink()
    assert_rejected(two, name)


def test_a_file_that_was_not_saved_is_ignored(two):
    (two / "notes.txt").write_text("nobody reads it")
    (two / "pytorch_model.bin").write_text("pickle")
    assert_whole(state.read(two), 2)


@pytest.mark.parametrize("name", [TENSORS, MODEL, STATE])
def test_a_link_is_not_followed(two, name, tmp_path):
    (two / name).rename(tmp_path / "elsewhere")
    (two / name).symlink_to(tmp_path / "elsewhere")
    assert_rejected(two, name)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "a/b", ""])
def test_a_manifest_cannot_name_files_of_other_folders(two, name, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("mine")
    files = json.loads((two / STATE).read_text())["files"]
    sign(two, files=files | {name: hashlib.sha256(b"mine").hexdigest()})
    opened = []
    monkeypatch.setattr(
        "builtins.open", lambda path, *rest, _open=open: opened.append(path) or _open(path, *rest)
    )
    with pytest.raises(ValueError, match="lacks the file"):
        state.read(two)
    assert {Path(path).parent for path in opened} == {two}


@pytest.mark.parametrize(
    "changes",
    [{"step": "2"}, {"step": True}, {"values": [1]}, {"files": {}}, {"files": 3}],
    ids=str,
)
def test_a_signed_manifest_with_wrong_types_is_rejected(two, changes):
    sign(two, **changes)
    assert_rejected(two, "is not understood")


def test_pickled_tensors_are_rejected(two):
    torch.save({"weight": torch.ones(3)}, two / TENSORS)
    files = json.loads((two / STATE).read_text())["files"]
    files[TENSORS] = hashlib.sha256((two / TENSORS).read_bytes()).hexdigest()
    sign(two, files=files)
    with pytest.raises(ValueError, match="no safetensors file"):
        state.read(two).tensors()


@pytest.mark.parametrize("version", [0, 2])
def test_another_format_raises_with_advice_and_is_not_skipped(two, version):
    sign(two, format_version=version, versions={"fastperturb": "9.9"})
    for find in (lambda: state.read(two), lambda: state.latest(two.parent)):
        with pytest.raises(
            state.UnsupportedFormat, match=f"has format {version}, .* wrote it, 9.9, or"
        ):
            find()


def test_a_missing_checkpoint_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*step-00000009"):
        state.read(tmp_path / "step-00000009")


def test_a_folder_of_damaged_checkpoints_raises_after_a_warning_for_each(two):
    for path in (two, two.with_name("step-00000001")):
        (path / TENSORS).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="step-0000000[12]") as caught,
        pytest.raises(ValueError, match="no checkpoint in .* is whole"),
    ):
        state.latest(two.parent)
    assert len(caught) == 2
