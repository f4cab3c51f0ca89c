"""The demo from end to end: its results, its options and its claim."""

import json
from pathlib import Path

import pytest
import torch

from fastperturb.demo import command as demo
from fastperturb.demo.methods import SWEEP

REGIONS = ("in_support", "band1", "band2")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    methods = ("exact", "fixed", "learned_mlmc")
    options = demo.DemoOptions(output_dir=folder, seeds=(0, 3), steps=2, methods=methods, workers=2)
    assert demo.run(options) == 0
    return folder


def test_results_hold_one_row_per_method(small_run: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["exact", "fixed", "learned_mlmc"]
    for row in rows.values():
        assert set(row["kl"]) == set(row["kl_std"]) == set(REGIONS)
        assert all(value > 0 for value in [*row["kl"].values(), *row["kl_std"].values()])
        assert len(row["curve"]) == len(results["positions"]) == 12
    assert "movement" not in rows["exact"]
    assert set(rows["learned_mlmc"]["movement"]) == {"noisy", "precise"}
    assert rows["exact"]["samples"] == 1
    assert rows["fixed"]["samples"] == 16
    assert 1 < rows["learned_mlmc"]["samples"] < 3
    assert results["versions"]["torch"] == torch.__version__
    assert results["seconds"] > 0
    assert "2 processes" in results["device"]
    assert {"commit", "seeds", "steps"} <= set(results)


def test_fixed_noise_is_the_scale_that_is_best_out_of_support(small_run: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    assert [row["scale"] for row in results["sweep"]] == list(SWEEP)
    (fixed,) = (row for row in results["rows"] if row["method"] == "fixed")
    assert fixed in results["sweep"]
    assert all(
        fixed["kl"]["band1"] + fixed["kl"]["band2"] <= row["kl"]["band1"] + row["kl"]["band2"]
        for row in results["sweep"]
    )


def test_the_picture_is_a_png_of_both_panels(small_run: Path) -> None:
    content = (small_run / "extrapolation.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    assert width > 1.5 * height > 1000


def test_a_folder_with_files_is_rejected_before_training(small_run: Path) -> None:
    before = (small_run / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        demo.run(demo.DemoOptions(output_dir=small_run, steps=10**9))
    assert (small_run / "results.json").read_bytes() == before


def test_missing_matplotlib_is_reported_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.run(demo.DemoOptions(output_dir=tmp_path / "run", steps=10**9)) == 2
    assert "pip install 'fastperturb[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "seeds must be"),
        ({"seeds": (1, 1)}, r"got \(1, 1\)"),
        ({"seeds": (-1,)}, ">= 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"methods": ("exact", "learnt")}, "among .*'learned'.*, got 'learnt'"),
        ({"methods": ()}, "methods must be one or more"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_bad_options_are_rejected_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.DemoOptions(**options)  # type: ignore[arg-type]


def test_headlines_compare_learned_with_the_rivals_that_were_trained() -> None:
    kl = {"learned": (0.05, 0.2, 0.5), "fixed": (0.1, 0.4, 1.0)}
    rows = [{"method": name, "kl": dict(zip(REGIONS, values))} for name, values in kl.items()]
    (line,) = demo.headlines(rows)
    assert line.endswith("over fixed: 0.50 in support, 0.50 in band 1, 0.50 in band 2")
    assert demo.headlines(rows[1:]) == []


@pytest.mark.slow
def test_learned_noise_beats_fixed_noise_beats_none_out_of_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SWEEP", (0.1,))  # the scale that the whole sweep chooses
    methods = ("exact", "fixed", "learned", "learned_iwae_m4", "learned_quadratic_m2")
    demo.run(demo.DemoOptions(output_dir=tmp_path, seeds=(0, 1), steps=1000, methods=methods))
    results = json.loads((tmp_path / "results.json").read_text())
    kl = {row["method"]: row["kl"] for row in results["rows"]}
    shift = {row["method"]: row.get("movement") for row in results["rows"]}
    for region in REGIONS:
        assert kl["learned"][region] < kl["fixed"][region]
    for band, share in (("band1", 0.5), ("band2", 0.35)):
        assert kl["fixed"][band] < kl["exact"][band]
        assert kl["learned"][band] < share * kl["exact"][band]
        assert kl["learned_quadratic_m2"][band] < 0.7 * kl["learned_iwae_m4"][band]
    assert shift["learned"]["noisy"] > 2 * shift["learned"]["precise"]
    assert shift["learned_iwae_m4"]["noisy"] < 0.6 * shift["learned"]["noisy"]
