"""Options from a YAML file: every mistake is named, with its file and the expected type."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fastperturb.cli import main as cli
from fastperturb.runs import option_files as options


@dataclass(frozen=True)
class Inner:
    draws: int = 8

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    output_dir: Path
    steps: int = 10
    learning_rate: float = 0.1
    overwrite: bool = False
    method: Literal["iwae", "jensen"] = "iwae"
    seeds: tuple[int, ...] = (0, 1, 2)
    limit: int | None = None
    inner: Inner = Inner()
    weights: str | Mapping[str, float] = "even"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def parse(file: Path, text: str, *flags: str) -> Any:
    file.write_text(text)
    return cli.parse(Options, ["--config", str(file), *flags], prog="fastperturb test")


def test_every_kind_of_value_arrives_in_the_options_type(file: Path) -> None:
    text = """
        output_dir: runs/x
        steps: 3
        learning_rate: 1e-3
        overwrite: true
        method: jensen
        seeds: [7]
        limit: null
        inner: {draws: 2}
        weights: {iwae: 1, quadratic: 1e-1}
    """
    weights = {"iwae": 1.0, "quadratic": 0.1}
    assert parse(file, text) == Options(
        Path("runs/x"), 3, 0.001, True, "jensen", (7,), None, Inner(2), weights
    )


@pytest.mark.parametrize("key", ["learning_rate", "learning-rate"])
def test_keys_are_option_names_with_underscores_or_dashes(file: Path, key: str) -> None:
    assert parse(file, f"{key}: 2\noutput-dir: x").learning_rate == 2.0


def test_flags_beat_the_file_and_the_file_beats_the_defaults(file: Path) -> None:
    text = "{output_dir: x, steps: 3, overwrite: true, inner: {draws: 2}}"
    parsed = parse(file, text, "--steps", "4", "--no-overwrite", "--inner.draws", "5")
    assert parsed == Options(Path("x"), steps=4, inner=Inner(5))
    assert parse(file, text).inner == Inner(2)


def test_a_flag_may_give_what_the_file_leaves_out(file: Path) -> None:
    assert parse(file, "steps: 3", "--output-dir", "y") == Options(Path("y"), steps=3)


def test_a_required_option_that_is_missing_is_named_in_the_error(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(file, "steps: 3")
    assert stopped.value.code == 2
    assert "--output-dir" in capsys.readouterr().err


def test_an_empty_file_changes_nothing(file: Path) -> None:
    assert parse(file, "# nothing yet\n", "--output-dir", "y") == Options(Path("y"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learning_rat: 1", "unknown option 'learning_rat' (did you mean 'learning_rate'?)"),
        ("zzz: 1", "unknown option 'zzz'. Choices: output_dir, steps, learning_rate, overwrite"),
        ("inner: {draw: 1}", "inner: unknown option 'draw' (did you mean 'draws'?)"),
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: 1.5", "steps: expected int, got 1.5"),
        ("steps: true", "steps: expected int, got True"),
        ("overwrite: 1", "overwrite: expected bool, got 1"),
        ("learning_rate: fast", "learning_rate: expected float, got 'fast'"),
        ("output_dir: 3", "output_dir: expected Path, got 3"),
        ("method: sgd", "method: expected one of iwae, jensen, got 'sgd'"),
        ("seeds: [1, two]", "seeds[1]: expected int, got 'two'"),
        ("seeds: 1", "seeds: expected tuple[int, ...], got 1"),
        ("limit: none at all", "limit: expected int | None, got 'none at all'"),
        ("inner: 3", "inner: expected a mapping of options, got 3"),
        ("inner: {draws: 0}", "inner: draws must be at least 1, got 0"),
        ("weights: {iwae: much}", "weights: expected str | collections.abc.Mapping[str, float]"),
        ("weights: {1: 2}", "got {1: 2}"),
        ("{output-dir: x, output_dir: y}", "option 'output_dir' is given twice"),
        ("[1, 2]", "expected a mapping of options, got [1, 2]"),
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
    ],
)
def test_a_mistake_is_named_in_the_error_with_its_file(
    file: Path, text: str, complaint: str
) -> None:
    with pytest.raises(ValueError) as error:
        parse(file, text, "--output-dir", "x")
    assert str(file) in str(error.value)
    assert complaint in str(error.value)


def test_a_missing_file_is_named_in_the_error(file: Path) -> None:
    with pytest.raises(ValueError, match=f"{file}: No such file"):
        options.load(file, Options)
