"""The bench of samplings: what it draws, what it measures, and what it says without data."""

import json
import math
from pathlib import Path

import pytest
import torch

from bench.sampling import __main__ as command
from bench.sampling import measure, summary
from bench.sampling.measure import Draw, Sums
from fastperturb.noise import latent

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "sampling" / "results.json"


def test_equations_that_compare_groups_draw_two_of_them() -> None:
    for draw in measure.draws(0):
        expected = 1
        if draw.sampling == "stratified":
            expected = draw.num_samples // (2 if "quadratic" in draw.equations else 1)
        assert draw.strata == expected


def test_every_variant_is_drawn_once_a_repeat() -> None:
    variants = [draw.variant(equation) for draw in measure.draws(0) for equation in draw.equations]
    assert len(set(variants)) == len(variants)
    assert {v.num_samples for v in variants if v.equation == "iwae"} == set(measure.SAMPLES)


def test_sums_tell_the_variance_of_gradients_from_their_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    spread = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    sums = Sums(3)
    for _ in range(4000):
        drawn = torch.randn(3, dtype=torch.float64, generator=generator)
        error = 0.1 + 0.2 * torch.randn(2, 50, dtype=torch.float64, generator=generator)
        sums.add_error(error)
        sums.add_gradient(truth + bias + spread * drawn)
    row = sums.row(truth, split=1)
    assert row["bias"] == pytest.approx(0.1, abs=0.005)
    assert row["mse_token"] == pytest.approx(0.05, rel=0.02)
    assert row["mse_piece"] == pytest.approx(0.01 + 0.04 / 50, rel=0.03)
    assert row["variance_piece"] == pytest.approx(0.04 / 50, rel=0.06)
    assert row["variance_U"] == pytest.approx(4.0, rel=0.08)
    assert row["variance_W"] == pytest.approx(1.25, rel=0.08)
    assert row["squared_bias_U"] == pytest.approx(0.25, abs=0.07)
    assert row["squared_bias_W"] == pytest.approx(0.0, abs=0.01)
    assert row["signal_U"] == pytest.approx(3.5**2, rel=0.05)


def test_a_ratio_divides_sums_over_units() -> None:
    value = summary.ratio([1.0, 3.0], [1.0, 1.0])
    assert value["estimate"] == 2.0
    assert value["low"] == 1.0 and value["high"] == 3.0


def test_without_the_data_the_bench_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTPERTURB_DATA", str(tmp_path / "none"))
    monkeypatch.setattr("sys.argv", ["sampling", "--output-dir", str(tmp_path / "out")])
    command.main()
    assert "skipped" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_committed_results_have_every_variant_of_every_setting() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    variants = sum(len(draw.equations) for draw in measure.draws(0))
    assert len(rows) == variants * len(command.SETTINGS)
    for row in rows:
        for value in row["times_less"].values():
            assert value["low"] <= value["estimate"] <= value["high"]


def test_a_draw_has_the_strata_that_the_noise_deals_out() -> None:
    draw = Draw("stratified", 8, measure.ONE_GROUP)
    z = latent(0, (8, 1, 3, 2), latent="uniform", strata=draw.strata)
    stratum = ((z / math.sqrt(3) + 1) / 2 * 8).floor().long()
    assert torch.equal(stratum.sort(0).values[:, 0, 0, 0], torch.arange(8))
