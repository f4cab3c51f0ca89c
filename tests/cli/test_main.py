"""The command line as a user meets it."""

import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from fastperturb import runs
from fastperturb.cli import main as cli
from fastperturb.version import __version__


@dataclass(frozen=True)
class CopyOptions:
    """Copy nothing to nowhere."""

    output_dir: Path = Path("runs/copy")
    """Folder of the results."""

    overwrite: bool = False
    """Let output_dir be a folder that already holds files."""


def copy(options: CopyOptions) -> int:
    runs.open_output_dir(options.output_dir, overwrite=options.overwrite)
    return 7


def count(options: CopyOptions) -> int:
    return int("not a number")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command called `copy` whose `run` a test may replace."""
    module = ModuleType("a_command")
    module.CopyOptions, module.run = CopyOptions, copy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_command", module)
    monkeypatch.setitem(cli.COMMANDS, "copy", ("a_command:CopyOptions", "copies nothing"))
    return module


def test_version_is_printed_without_importing_torch() -> None:
    code = "from fastperturb.cli.main import main; main(['--version'])"
    code += "; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastperturb {__version__}\nFalse\n"


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_usage_lists_every_command(
    argv: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == status
    printed = capsys.readouterr()
    text = printed.out if status == 0 else printed.err
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert summary in text


def test_an_unknown_command_lists_the_closest_and_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["docter"]) == 2
    assert capsys.readouterr().err == (
        "fastperturb: error: unknown command 'docter' (did you mean 'doctor'?). "
        "Choices: demo, train, eval, study, rank, doctor\n"
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_output_dir_and_overwrite(name: str) -> None:
    module, _, options_class = cli.COMMANDS[name][0].partition(":")
    options = {field.name for field in fields(getattr(import_module(module), options_class))}
    assert {"output_dir", "overwrite"} <= options


def test_a_commands_status_is_the_programs_status(command: ModuleType, tmp_path: Path) -> None:
    assert cli.main(["copy", "--output-dir", str(tmp_path)]) == 7


def test_help_shows_options_with_their_meaning_and_the_config_file(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["copy", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in ("--config FILE.yaml", "--output-dir", "Folder of the results.", "--overwrite"):
        assert part in text


def test_an_error_of_ours_is_one_line_and_status_2(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").touch()
    assert cli.main(["copy", "--output-dir", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("fastperturb: error: ")
    assert "--overwrite" in text
    assert text.count("\n") == 1
    assert cli.main(["copy", "--output-dir", str(tmp_path), "--overwrite"]) == 7


def test_an_error_from_outside_the_package_keeps_its_traceback(command: ModuleType) -> None:
    command.run = count  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["copy"])


def test_a_typo_in_the_config_file_is_one_line_and_status_2(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("overwrit: true\n")
    assert cli.main(["copy", "--config", str(config)]) == 2
    assert capsys.readouterr().err == (
        f"fastperturb: error: {config}: unknown option 'overwrit' (did you mean 'overwrite'?). "
        "Choices: output_dir, overwrite\n"
    )


def test_a_typo_in_a_flag_is_status_2_and_shows_the_closest(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["copy", "--overwrit"])
    assert stopped.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
